"""Prompts and conversations as token ids; long ones are encoded in a thread, so that no other request waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

from aphro_core.errors import RequestError
from aphro_core.server.contract import Frontend, Tokenizer

_THREAD_CHARS: Final = 2000  # a shorter text is encoded sooner than a thread would start on it
_MAX_THREADS: Final = 2  # of texts; chats, which wait for a template besides, have as many of their own
_MAX_DETOKENIZED: Final = 2**16  # or the model's context; the library writes them in one piece, and nothing else runs
_MAX_CHARS_PER_TOKEN: Final = 512  # longer than any real vocabulary's average: a text beyond it need not be tried

Result = TypeVar("Result")


class PromptEncoder:
    """The served model's tokenizer, with the limits that a server needs. Raises RequestError throughout."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        # a thread goes on though its client has left, and keeps its place until it has ended
        self._texts = ThreadPoolExecutor(_MAX_THREADS, "encode-text")
        self._chats = ThreadPoolExecutor(_MAX_THREADS, "encode-chat")

    async def encode(self, text: str, add_special_tokens: bool, field: str) -> list[int]:
        tokenizer = self._tokenizer(field)
        self._check_length(len(text), field)
        encode = partial(tokenizer.encode, text, add_special_tokens)
        return encode() if len(text) <= _THREAD_CHARS else await _run(self._texts, encode)

    async def encode_chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool, template_args: Mapping[str, Any]
    ) -> list[int]:
        tokenizer = self._tokenizer("messages")
        most = self._frontend.max_model_len
        if len(messages) > most:  # each has a token at least: its end
            limit = f"{most} tokens, so never more than {most} messages"
            raise RequestError(f"messages has {len(messages)} entries, allowed: {limit}", field="messages")
        self._check_length(sum(len(text) for message in messages for text in message.values()), "messages")
        # the template runs in another process: however small the chat, this loop does not wait for it
        encode = partial(tokenizer.encode_chat, messages, add_generation_prompt, **template_args)
        return await _run(self._chats, encode)

    def check_prompt(self, token_ids: list[int], field: str) -> list[int]:
        """The ids, each known to be in the vocabulary, and not more than the model ever takes."""
        most = self._frontend.max_model_len - 1
        if len(token_ids) > most:
            raise RequestError(
                f"{field} has {len(token_ids)} tokens, allowed: up to {most} (this model's maximum context length is "
                f"{most + 1} tokens, one of them for the answer): shorten it",
                field=field,
            )
        return self.check_ids(token_ids, field)

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
        most = max(_MAX_DETOKENIZED, self._frontend.max_model_len)
        if len(token_ids) > most:
            raise RequestError(f"{field} has {len(token_ids)} token ids, allowed: up to {most}", field=field)
        self.check_ids(token_ids, field)
        decode = partial(tokenizer.decode, token_ids, skip_special_tokens=False)
        return decode() if len(token_ids) <= _THREAD_CHARS else await _run(self._texts, decode)

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


async def _run(pool: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
    """Wait for it in turn. A client that leaves is not waited for: what has begun ends for nobody."""
    return await asyncio.wrap_future(pool.submit(work))
