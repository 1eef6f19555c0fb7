"""A frontend without a model: answers with a given text, a byte a token, and remembers how each request ended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio

from aphro_core.errors import AphroError, OverloadedError
from aphro_core.request import Logprob, OutputDelta, PositionLogprobs, Request

BOS = 256
VOCAB_SIZE = 260


class ByteTokenizer:
    """A token is a byte of UTF-8; 256 is the beginning of a sequence."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [*([BOS] if add_special_tokens else []), *text.encode()]

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], /, add_generation_prompt: bool = True, **template_args: Any
    ) -> list[int]:
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        text += "".join(f"[{name}={value}]" for name, value in template_args.items())
        return self.encode(text + ("<assistant>" if add_generation_prompt else ""))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text = bytes(token_id for token_id in token_ids if token_id < 256).decode(errors="replace")
        return text if skip_special_tokens else "<s>" * list(token_ids).count(BOS) + text

    def token_text(self, token_id: int) -> str:
        return "<s>" if token_id == BOS else bytes([token_id]).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return b"<s>" if token_id == BOS else bytes([token_id])


@dataclass(frozen=True)
class FakeHealth:
    phase: str = "ready"
    ready: bool = True


class FakeMetrics:
    content_type = "text/plain; version=0.0.4"

    def render(self) -> bytes:
        return b"aphro:num_requests_running 0\n"


@dataclass
class FakeFrontend:
    """``answer`` is every choice's text. A step is one token of every choice; ``hold`` steps come, then none."""

    answer: str = "Hello, wörld 🙂"
    served_name: str = "fake"
    max_model_len: int = 4096
    vocab_size: int = VOCAB_SIZE
    tokenizer: ByteTokenizer | None = field(default_factory=ByteTokenizer)
    metrics: FakeMetrics = field(default_factory=FakeMetrics)
    state: FakeHealth = FakeHealth()
    step_seconds: float = 0.0
    first_step_seconds: float = 0.0
    hold: int | None = None
    refuses: Exception | None = None
    dies: Exception | None = None  # where ``hold`` would stop
    num_cached_tokens: int = 0
    requests: list[Request] = field(default_factory=list)
    num_open: int = 0
    aborted: list[str] = field(default_factory=list)

    def health(self) -> FakeHealth:
        return self.state

    def check_admission(self) -> None:
        if isinstance(self.refuses, (OverloadedError, AphroError)):
            raise self.refuses

    @asynccontextmanager
    async def stream(self, request: Request) -> AsyncIterator[AsyncIterator[OutputDelta]]:
        if self.refuses is not None:
            raise self.refuses
        self.requests.append(request)
        self.num_open += 1
        unfinished = set(range(request.sampling.n))
        try:
            yield self._deltas(request, unfinished)
        finally:
            self.num_open -= 1
            if unfinished:
                self.aborted.append(request.request_id)

    async def _deltas(self, request: Request, unfinished: set[int]) -> AsyncIterator[OutputDelta]:
        ids = list(self.answer.encode())
        max_tokens = request.sampling.max_tokens or 10**9
        finish_reason = "length" if len(ids) > max_tokens else "stop"
        ids = ids[:max_tokens]
        await anyio.sleep(self.first_step_seconds)
        shown = 0
        for step in range(len(ids)):
            if step == self.hold:
                if self.dies is not None:
                    raise self.dies
                await anyio.sleep_forever()
            await anyio.sleep(self.step_seconds)
            is_last = step == len(ids) - 1
            text = bytes(ids[: step + 1]).decode(errors="ignore" if not is_last else "replace")
            for index in range(request.sampling.n):
                yield OutputDelta(
                    index=index,
                    text=text[shown:],
                    token_ids=[ids[step]],
                    logprobs=self._logprobs(request, ids[step : step + 1]),
                    prompt_logprobs=self._prompt_logprobs(request) if step == 0 and index == 0 else None,
                    num_cached_tokens=self.num_cached_tokens,
                )
            shown = len(text)
        for index in range(request.sampling.n):
            unfinished.discard(index)
            yield OutputDelta(index=index, text="", token_ids=[], finish_reason=finish_reason)  # type: ignore[arg-type]

    def _logprobs(self, request: Request, ids: Sequence[int]) -> list[PositionLogprobs] | None:
        if request.sampling.logprobs is None:
            return None
        return [position_logprobs(token_id, request.sampling.logprobs) for token_id in ids]

    def _prompt_logprobs(self, request: Request) -> list[PositionLogprobs | None] | None:
        if request.sampling.prompt_logprobs is None:
            return None
        return [
            position_logprobs(token_id, request.sampling.prompt_logprobs) if position else None
            for position, token_id in enumerate(request.prompt_token_ids)
        ]


def position_logprobs(token_id: int, num: int) -> PositionLogprobs:
    """The token itself at rank 2, and ``num`` likeliest ones: the one after it in the alphabet, itself, ..."""
    tokenizer = ByteTokenizer()
    likeliest = [token_id + 1, token_id, *range(token_id + 2, token_id + 40)]
    table = {
        other % 256: Logprob(-float(rank), rank, tokenizer.token_text(other % 256))
        for rank, other in enumerate(likeliest, 1)
    }
    kept = dict(list(table.items())[:num])
    return {token_id: Logprob(-2.0, 2, tokenizer.token_text(token_id)), **kept}
