"""A request and its answer: sampling parameters with their limits, outputs shaped as the field expects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from aphro_core.errors import RequestError

FinishReason = Literal["stop", "length", "abort"]

MAX_N: Final = 128
MAX_LOGPROBS: Final = 20
MAX_STOP_STRINGS: Final = 64
MAX_STOP_LENGTH: Final = 1024  # characters
MAX_STOP_TOKEN_IDS: Final = 1024
MAX_LOGIT_BIAS: Final = 1024
MAX_SEED: Final = 2**63 - 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next tokens are drawn. Field names, defaults and meanings are vLLM's.

    ``temperature`` 0 is greedy. ``top_k`` 0 or -1 is off, ``top_p`` 1 is off, ``min_p`` 0 is off. ``max_tokens``
    ``None`` means "as long as the context allows". ``seed`` ``None`` draws one per request. The token drawn at a
    position is a function of (seed, position, logits) alone. Raises :class:`RequestError` that names the field.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = msgspec.field(default_factory=dict)
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        msgspec.structs.force_setattr(self, "stop", stop)
        msgspec.structs.force_setattr(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        # float32, which tokens are drawn in, knows no smaller ones: the likeliest token alone is meant
        msgspec.structs.force_setattr(self, "top_p", max(self.top_p, 1e-6) if self.top_p > 0 else self.top_p)
        msgspec.structs.force_setattr(self, "top_k", max(self.top_k, 0) if self.top_k in (-1, 0) else self.top_k)
        msgspec.structs.force_setattr(self, "logit_bias", dict(self.logit_bias or {}))
        _check_ranges(self)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5


# field -> (lowest, highest), both allowed; None = no bound on that side
_RANGES: Final[dict[str, tuple[float | None, float | None]]] = {
    "n": (1, MAX_N),
    "max_tokens": (1, None),
    "min_tokens": (0, None),
    "temperature": (0.0, 100.0),
    "top_k": (0, None),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 10.0),
    "seed": (0, MAX_SEED),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}


def _check_ranges(params: SamplingParams) -> None:
    for name, (lowest, highest) in _RANGES.items():
        value = getattr(params, name)
        if value is None:
            continue
        if _is_nan(value) or (lowest is not None and value < lowest) or (highest is not None and value > highest):
            raise RequestError(f"{name} is {value}, allowed: {_render_range(lowest, highest)}", field=name)
    if not 0.0 < params.top_p <= 1.0:
        raise RequestError(f"top_p is {params.top_p}, allowed: more than 0, up to 1", field="top_p")
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise RequestError(
            f"min_tokens is {params.min_tokens}, allowed: 0 to max_tokens ({params.max_tokens})", field="min_tokens"
        )
    _check_lists(params)


def _check_lists(params: SamplingParams) -> None:
    if len(params.stop) > MAX_STOP_STRINGS:
        raise RequestError(f"stop has {len(params.stop)} entries, allowed: up to {MAX_STOP_STRINGS}", field="stop")
    for text in params.stop:
        if not text or len(text) > MAX_STOP_LENGTH:
            raise RequestError(
                f"stop has an entry of {len(text)} characters, allowed: 1 to {MAX_STOP_LENGTH}", field="stop"
            )
    if len(params.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise RequestError(
            f"stop_token_ids has {len(params.stop_token_ids)} entries, allowed: up to {MAX_STOP_TOKEN_IDS}",
            field="stop_token_ids",
        )
    if any(token_id < 0 for token_id in params.stop_token_ids):
        raise RequestError("stop_token_ids has a negative id, allowed: 0 and up", field="stop_token_ids")
    if len(params.logit_bias) > MAX_LOGIT_BIAS:
        raise RequestError(
            f"logit_bias has {len(params.logit_bias)} entries, allowed: up to {MAX_LOGIT_BIAS}", field="logit_bias"
        )
    for token_id, bias in params.logit_bias.items():
        if token_id < 0 or not -100.0 <= bias <= 100.0:
            raise RequestError(
                f"logit_bias has {token_id}: {bias}, allowed: token ids from 0, values -100 to 100", field="logit_bias"
            )


def _is_nan(value: float) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _render_range(lowest: float | None, highest: float | None) -> str:
    if highest is None:
        return f"{lowest} and up"
    return f"{lowest} to {highest}"


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the frontend takes it: prompt ids, how to sample, and whose prefix cache it may share."""

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    prompt: str | None = None
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of one token, its rank in the vocabulary (1 = most likely) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# token id -> Logprob: the sampled (or prompt) token first, then the most likely ones
PositionLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class OutputDelta:
    """What one choice of a request gained since the last delta. ``finish_reason`` is set on its last one."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    # on the first delta of a request that asked for them: one entry a prompt token, None for the first
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int = 0


@dataclass(slots=True)
class CompletionOutput:
    """One finished choice, with vLLM's names."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def extend(self, delta: OutputDelta) -> None:
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        if delta.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs += delta.logprobs
            gained = sum(next(iter(position.values())).logprob for position in delta.logprobs)
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + gained
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


@dataclass(slots=True)
class RequestOutput:
    """All of a request's answer, with vLLM's names."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    finished: bool = False
    num_cached_tokens: int = 0
    metrics: dict[str, Any] | None = None

    def extend(self, delta: OutputDelta) -> None:
        self.outputs[delta.index].extend(delta)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        self.finished = all(choice.finish_reason is not None for choice in self.outputs)
