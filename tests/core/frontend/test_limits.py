"""What a model allows of a request: refused before the engine hears of it, with the number that would have worked."""

from __future__ import annotations

from typing import Any

import pytest

from aphro_core.errors import RequestError
from aphro_core.frontend.limits import ModelLimits
from aphro_core.request import Request, SamplingParams

LIMITS = ModelLimits(vocab_size=100, max_model_len=16, eos_token_ids=(2,))


def request(num_prompt_tokens: int = 4, **sampling: Any) -> Request:
    return Request("r", [5] * num_prompt_tokens, SamplingParams(**sampling))


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "allowed"),
    [(4, None, 12), (15, None, 1), (4, 12, 12), (15, 1, 1), (1, 3, 3)],
)
def test_output_tokens_within_the_context(num_prompt_tokens: int, max_tokens: int | None, allowed: int) -> None:
    assert LIMITS.check(request(num_prompt_tokens, max_tokens=max_tokens)) == allowed


@pytest.mark.parametrize(
    ("wrong", "field", "complaint"),
    [
        (request(0), "prompt", "has no tokens"),
        (request(16), "prompt", r"has 16 tokens, allowed: up to 15 .*maximum context length is 16 tokens"),
        (request(10, max_tokens=7), "max_tokens", r"is 7, allowed: 1 to 6 .*is 16 tokens, and the prompt has 10"),
        (request(10, max_tokens=None, min_tokens=7), "min_tokens", "is 7, allowed: 0 to 6"),
        (request(stop_token_ids=[100], max_tokens=1), "stop_token_ids", "token id 100, allowed: 0 to 99"),
        (request(logit_bias={7: 1.0, 100: 1.0}, max_tokens=1), "logit_bias", "token id 100, allowed: 0 to 99"),
        (Request("r", [1, 100], SamplingParams()), "prompt", "token id 100, allowed: 0 to 99"),
        (Request("r", [1, -1], SamplingParams()), "prompt", "token id -1, allowed"),
        (Request("r", [1, True], SamplingParams()), "prompt", "token id of type bool, allowed: int"),
        (Request("r", ["a"], SamplingParams()), "prompt", "token id of type str"),  # type: ignore[list-item]
        (request(n=True), "n", "n: Expected `int`, got `bool`"),
        (request(logprobs=True), "logprobs", "got `bool`"),
        (request(seed=1.5), "seed", "got `float`"),
    ],
)
def test_refusals_name_field_value_and_limit(wrong: Request, field: str, complaint: str) -> None:
    """Wrong types too: the engine's decoder would take them for damage, and everybody's requests would pay."""
    with pytest.raises(RequestError, match=complaint) as caught:
        LIMITS.check(wrong)
    assert caught.value.field == field
