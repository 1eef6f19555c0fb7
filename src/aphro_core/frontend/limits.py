"""What the served model allows of a request: lengths and token ids. Pure; the ranges of parameters are request.py's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import msgspec

from aphro_core.errors import RequestError
from aphro_core.request import Request, SamplingParams


@dataclass(frozen=True)
class ModelLimits:
    """``max_model_len`` counts tokens of prompt and output together; ``eos_token_ids`` end an answer unless ignored."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]

    def check(self, request: Request) -> int:
        """The output tokens that the request may get: ``max_tokens``, or what the context leaves.

        Raises RequestError that names the field, its value and what is allowed.
        """
        num_prompt_tokens = len(request.prompt_token_ids)
        self._check_prompt(num_prompt_tokens)
        sampling = request.sampling
        _check_types(sampling)
        self._check_ids(request.prompt_token_ids, "prompt")
        self._check_ids(sampling.stop_token_ids, "stop_token_ids")
        self._check_ids(sampling.logit_bias, "logit_bias")
        room = self.max_model_len - num_prompt_tokens
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise RequestError(
                f"max_tokens is {sampling.max_tokens}, allowed: 1 to {room} (this model's maximum context length is "
                f"{self.max_model_len} tokens, and the prompt has {num_prompt_tokens})",
                field="max_tokens",
            )
        max_tokens = room if sampling.max_tokens is None else sampling.max_tokens
        if sampling.min_tokens > max_tokens:
            raise RequestError(f"min_tokens is {sampling.min_tokens}, allowed: 0 to {max_tokens}", field="min_tokens")
        if sampling.min_tokens and len({*sampling.stop_token_ids, *self.eos_token_ids}) >= self.vocab_size:
            raise RequestError("min_tokens forbids every token: stop_token_ids has them all", field="min_tokens")
        return max_tokens

    def _check_prompt(self, num_prompt_tokens: int) -> None:
        if num_prompt_tokens < 1:
            raise RequestError("the prompt has no tokens, allowed: 1 and up", field="prompt")
        if num_prompt_tokens >= self.max_model_len:
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens, allowed: up to {self.max_model_len - 1} (this model's "
                f"maximum context length is {self.max_model_len} tokens, one of them for the answer): shorten it",
                field="prompt",
            )

    def _check_ids(self, token_ids: Collection[int], field: str) -> None:
        kinds = {kind.__name__ for kind in set(map(type, token_ids)) - {int}}
        if kinds:
            raise RequestError(f"{field} has a token id of type {min(kinds)}, allowed: int", field=field)
        for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= token_id < self.vocab_size:
                raise RequestError(
                    f"{field} has the token id {token_id}, allowed: 0 to {self.vocab_size - 1} (its vocabulary)",
                    field=field,
                )


def _check_types(sampling: SamplingParams) -> None:
    """A parameter of another type than declared would be refused by the engine's decoder: a fault there, not here."""
    try:
        msgspec.convert(msgspec.to_builtins(sampling), SamplingParams)
    except (msgspec.ValidationError, TypeError) as error:
        problem, _, where = str(error).partition(" - at `$.")
        name = where.rstrip("`").partition("[")[0]
        raise RequestError(f"{name or 'a sampling parameter'}: {problem}", field=name or None) from None
