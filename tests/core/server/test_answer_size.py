"""Answers that could not be kept are refused before they are computed; the largest single one never is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphro_core.errors import RequestError
from aphro_core.request import Request, SamplingParams
from aphro_core.server.answer_size import MAX_LOGPROB_ENTRIES, check_answer_size

CONTEXT = 131072


def request(num_prompt_tokens: int = 5, **sampling: int | None) -> Request:
    return Request("r", [1] * num_prompt_tokens, SamplingParams(**sampling))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "requests",
    [
        [request(n=128, max_tokens=None, logprobs=20)],
        [request(n=128, max_tokens=2000, logprobs=20)],
        [request(max_tokens=2000, logprobs=20)] * 1000,
        [request(2000, max_tokens=1, prompt_logprobs=20)] * 1000,
    ],
    ids=["no max_tokens", "many choices", "many prompts", "echoed prompts"],
)
def test_too_many_together_are_refused(requests: list[Request]) -> None:
    with pytest.raises(RequestError) as caught:
        check_answer_size(requests, CONTEXT)
    assert caught.value.field == "logprobs"
    assert str(MAX_LOGPROB_ENTRIES) in caught.value.message


@given(st.integers(0, 20), st.sampled_from([None, 1, 131067]))
def test_one_choice_is_always_allowed(logprobs: int, max_tokens: int | None) -> None:
    check_answer_size([request(max_tokens=max_tokens, logprobs=logprobs)], CONTEXT)


@given(st.integers(1, 128), st.integers(1, 131067))
def test_without_logprobs_nothing_is_counted(n: int, max_tokens: int) -> None:
    check_answer_size([request(n=n, max_tokens=max_tokens)] * 8, CONTEXT)
