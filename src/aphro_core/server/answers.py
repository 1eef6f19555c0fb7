"""Our output as OpenAI's JSON: chunks of a stream and whole answers, log-probabilities, exact usage."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import Any, ClassVar, Final, TypeVar

import anyio.lowlevel
import msgspec

from aphro_core.errors import OverloadedError
from aphro_core.request import CompletionOutput, Logprob, OutputDelta, PositionLogprobs
from aphro_core.server.contract import Tokenizer
from aphro_core.server.openai import Generation

_LEAST_LOGPROB: Final = -9999.0  # minus infinity has no spelling in JSON
_ENCODE: Final = msgspec.json.Encoder().encode
_PIECE: Final = 64  # positions whose log-probabilities are written in one go

Json = dict[str, Any]
Result = TypeVar("Result")
Steps = Generator[None, None, Result]  # work that may pause where it yields


class Answer(ABC):
    """The answer to one body. Choice ``prompt * n + index`` is choice ``index`` of that prompt.

    Feed every delta to :meth:`chunk` (a stream) or to :meth:`add`, then take :meth:`whole`.
    """

    object_whole: ClassVar[str]
    object_chunk: ClassVar[str]

    def __init__(self, generation: Generation, served_name: str, tokenizer: Tokenizer | None) -> None:
        self.generation = generation
        self._tokenizer = tokenizer
        self._n = generation.requests[0].sampling.n
        self._head: Json = {"id": generation.id, "created": int(time.time()), "model": served_name}
        self._chunk_head = {**self._head, "object": self.object_chunk}
        self._num_cached_tokens = [0] * len(generation.requests)
        self._num_output_tokens = 0
        self._choices = [CompletionOutput(index) for index in range(self._n * len(generation.requests))]
        self._prompt_logprobs: list[list[PositionLogprobs | None]] = [[] for _ in generation.requests]

    def add(self, prompt: int, delta: OutputDelta) -> None:
        self._choices[self._count(prompt, delta)].extend(delta)

    def chunk(self, prompt: int, delta: OutputDelta) -> bytes:
        """One chunk of the stream, as JSON."""
        return _at_once(self._chunk(prompt, delta))

    async def long_chunk(self, prompt: int, delta: OutputDelta) -> bytes:
        """The same of a delta that tells of a whole prompt; others run meanwhile."""
        return await _in_turns(self._chunk(prompt, delta))

    def _chunk(self, prompt: int, delta: OutputDelta) -> Steps[bytes]:
        index = self._count(prompt, delta)
        choice = yield from self._stream_choice(prompt, index, delta)
        choice["finish_reason"] = delta.finish_reason
        if self.generation.return_token_ids:
            choice["token_ids"] = delta.token_ids
        if delta.stop_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        chunk = {**self._chunk_head, "choices": [choice]}
        if self.generation.include_usage:
            chunk["usage"] = None
        return _ENCODE(chunk)

    def usage_chunk(self) -> bytes:
        """The last chunk of a stream that asked for usage."""
        return _ENCODE({**self._chunk_head, "choices": [], "usage": self.usage()})

    async def whole(self) -> bytes:
        """The whole answer. Log-probabilities of many tokens take seconds to write; others run meanwhile."""
        choices = []
        for index, output in enumerate(self._choices):
            choice = await _in_turns(self._whole_choice(index // self._n, index, output))
            choice |= {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
            if self.generation.return_token_ids:
                choice["token_ids"] = output.token_ids
                choice["prompt_token_ids"] = self.generation.requests[index // self._n].prompt_token_ids
            choices.append(choice)
        return _ENCODE({**self._head, "object": self.object_whole, "choices": choices, "usage": self.usage()})

    def usage(self) -> Json:
        num_prompt_tokens = sum(len(request.prompt_token_ids) for request in self.generation.requests)
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self._num_output_tokens,
            "total_tokens": num_prompt_tokens + self._num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached_tokens)},
        }

    @abstractmethod
    def _stream_choice(self, prompt: int, index: int, delta: OutputDelta) -> Steps[Json]: ...

    @abstractmethod
    def _whole_choice(self, prompt: int, index: int, output: CompletionOutput) -> Steps[Json]: ...

    def _count(self, prompt: int, delta: OutputDelta) -> int:
        """Keep what usage and echo need; the index of the choice among all."""
        if delta.finish_reason == "abort":
            raise OverloadedError("the server ended this request before it was finished", draining=True)
        if self.generation.hides_output:
            delta.text, delta.token_ids, delta.logprobs = "", [], None
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs[prompt] = delta.prompt_logprobs
        self._num_output_tokens += len(delta.token_ids)
        self._num_cached_tokens[prompt] = max(self._num_cached_tokens[prompt], delta.num_cached_tokens)
        return prompt * self._n + delta.index

    def _token(self, token_id: int, logprob: Logprob) -> str:
        if self.generation.tokens_as_ids or (logprob.decoded_token is None and self._tokenizer is None):
            return f"token_id:{token_id}"
        if logprob.decoded_token is None:
            assert self._tokenizer is not None
            return self._tokenizer.token_text(token_id)
        return logprob.decoded_token


class CompletionAnswer(Answer):
    object_whole = object_chunk = "text_completion"

    def __init__(self, generation: Generation, served_name: str, tokenizer: Tokenizer | None) -> None:
        super().__init__(generation, served_name, tokenizer)
        self._text_offsets = [0] * len(self._choices)
        self._begun = [not generation.echo] * len(self._choices)

    def _stream_choice(self, prompt: int, index: int, delta: OutputDelta) -> Steps[Json]:
        echoes, self._begun[index] = not self._begun[index], True
        return self._choice(prompt, index, delta.text, delta.logprobs, echoes)

    def _whole_choice(self, prompt: int, index: int, output: CompletionOutput) -> Steps[Json]:
        return self._choice(prompt, index, output.text, output.logprobs, self.generation.echo)

    def _choice(
        self, prompt: int, index: int, text: str, logprobs: list[PositionLogprobs] | None, echoes: bool
    ) -> Steps[Json]:
        positions: list[PositionLogprobs | None] = [*(logprobs or ())]
        ids: list[int] = [next(iter(position)) for position in logprobs or ()]
        if echoes:
            text = (self.generation.requests[prompt].prompt or "") + text
            positions = [*self._prompt_logprobs[prompt], *positions]
            ids = [*self.generation.requests[prompt].prompt_token_ids[: len(positions) - len(ids)], *ids]
        wanted = self.generation.num_logprobs is not None
        told = (yield from self._logprobs(index, ids, positions)) if wanted else None
        return {"index": index, "text": text, "logprobs": told}

    def _logprobs(self, index: int, ids: Sequence[int], positions: Sequence[PositionLogprobs | None]) -> Steps[Json]:
        tokens: list[str] = []
        token_logprobs: list[float | None] = []
        top_logprobs: list[dict[str, float] | None] = []
        text_offset: list[int] = []
        for token_id, position in zip(ids, positions, strict=True):
            own = Logprob(0.0) if position is None else position[token_id]
            tokens.append(self._token(token_id, own))
            token_logprobs.append(None if position is None else finite(own.logprob))
            top_logprobs.append(None if position is None else self._top(position))
            text_offset.append(self._text_offsets[index])
            self._text_offsets[index] += len(tokens[-1])
            if not len(tokens) % _PIECE:
                yield
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": text_offset,
        }

    def _top(self, position: PositionLogprobs) -> dict[str, float]:
        """By text; of two tokens that read alike the likelier one counts."""
        top: dict[str, float] = {}
        for token_id, entry in position.items():
            text = self._token(token_id, entry)
            top[text] = max(finite(entry.logprob), top.get(text, _LEAST_LOGPROB))
        return top


class ChatAnswer(Answer):
    object_whole = "chat.completion"
    object_chunk = "chat.completion.chunk"

    def __init__(self, generation: Generation, served_name: str, tokenizer: Tokenizer | None) -> None:
        super().__init__(generation, served_name, tokenizer)
        self._begun = [False] * len(self._choices)

    def _stream_choice(self, prompt: int, index: int, delta: OutputDelta) -> Steps[Json]:
        content = {"content": delta.text} if self._begun[index] else {"role": "assistant", "content": delta.text}
        self._begun[index] = True
        return {"index": index, "delta": content, "logprobs": (yield from self._logprobs(delta.logprobs))}

    def _whole_choice(self, prompt: int, index: int, output: CompletionOutput) -> Steps[Json]:
        message = {"role": "assistant", "content": output.text}
        return {"index": index, "message": message, "logprobs": (yield from self._logprobs(output.logprobs))}

    def _logprobs(self, given: list[PositionLogprobs] | None) -> Steps[Json | None]:
        num_top, positions = self.generation.num_logprobs, given or []
        if num_top is None:
            return None
        pieces: list[bytes] = []  # written at once: as objects they take ten times as much memory
        for start in range(0, len(positions), _PIECE):
            piece = [self._position(position, num_top) for position in positions[start : start + _PIECE]]
            pieces.append(_ENCODE(piece)[1:-1])
            if len(piece) == _PIECE:
                yield
        return {"content": msgspec.Raw(b"[%b]" % b",".join(pieces)), "refusal": None}

    def _position(self, position: PositionLogprobs, num_top: int) -> Json:
        entries = [self._entry(token_id, entry) for token_id, entry in position.items()]
        likeliest = sorted(entries, key=lambda entry: -entry["logprob"])[:num_top]
        return {**entries[0], "top_logprobs": likeliest}

    def _entry(self, token_id: int, entry: Logprob) -> Json:
        raw = None if self._tokenizer is None else list(self._tokenizer.token_bytes(token_id))
        return {"token": self._token(token_id, entry), "logprob": finite(entry.logprob), "bytes": raw}


def finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)


def _at_once(steps: Steps[Result]) -> Result:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result


async def _in_turns(steps: Steps[Result]) -> Result:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result
        await anyio.lowlevel.checkpoint()
