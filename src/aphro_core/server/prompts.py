"""Prompts and conversations as token ids; long ones are encoded in a thread, so that no other request waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import anyio
import anyio.to_thread

from aphro_core.errors import RequestError
from aphro_core.server.contract import Frontend, Tokenizer

_THREAD_CHARS: Final = 2000  # a shorter text is encoded sooner than a thread would start on it
_MAX_THREADS: Final = 4
_MAX_CHARS_PER_TOKEN: Final = 512  # longer than any real vocabulary's average: a text beyond it need not be tried

Result = TypeVar("Result")


class PromptEncoder:
    """The served model's tokenizer, with the limits that a server needs. Raises RequestError throughout."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._threads = anyio.CapacityLimiter(_MAX_THREADS)

    async def encode(self, text: str, add_special_tokens: bool, field: str) -> list[int]:
        tokenizer = self._tokenizer(field)
        self._check_length(len(text), field)
        return await self._run(partial(tokenizer.encode, text, add_special_tokens), len(text))

    async def encode_chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool, template_args: Mapping[str, Any]
    ) -> list[int]:
        tokenizer = self._tokenizer("messages")
        size = sum(len(message["content"]) for message in messages)
        self._check_length(size, "messages")
        render = partial(tokenizer.encode_chat, messages, add_generation_prompt, **template_args)
        # the template runs in another process: however small the chat, this loop does not wait for it
        return await self._run(render, max(size, _THREAD_CHARS + 1))

    def check_ids(self, token_ids: list[int], field: str) -> list[int]:
        """The ids, each known to be in the vocabulary."""
        size = self._frontend.vocab_size
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < size:
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < size)
            raise RequestError(f"{field} has the token id {wrong}, allowed: 0 to {size - 1}", field=field)
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out; empty on a server without a tokenizer."""
        tokenizer = self._frontend.tokenizer
        return "" if tokenizer is None else tokenizer.decode(token_ids, skip_special_tokens=False)

    async def decode_text(self, token_ids: list[int], field: str) -> str:
        tokenizer = self._tokenizer(field)
        self.check_ids(token_ids, field)
        return await self._run(partial(tokenizer.decode, token_ids, skip_special_tokens=False), len(token_ids))

    async def _run(self, work: Callable[[], Result], size: int) -> Result:
        if size <= _THREAD_CHARS:
            return work()
        return await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._threads)

    def _tokenizer(self, field: str) -> Tokenizer:
        tokenizer = self._frontend.tokenizer
        if tokenizer is None:
            message = f"{field} needs a tokenizer, and this server runs without one: send token ids to /v1/completions"
            raise RequestError(message, field=field)
        return tokenizer

    def _check_length(self, num_chars: int, field: str) -> None:
        most = _MAX_CHARS_PER_TOKEN * self._frontend.max_model_len
        if num_chars > most:
            limit = f"{self._frontend.max_model_len} tokens, so never more than {most} characters"
            raise RequestError(f"{field} has {num_chars} characters, allowed: {limit}", field=field)
