"""Draws behind min_p, top_k and top_p: against transformers, both ways alike; and the reductions they stand on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aphro_core.request import SamplingParams
from aphro_core.worker.gumbel import GumbelNoise, draw_keys
from aphro_core.worker.reductions import argmax, row_sum
from aphro_core.worker.sampler import Sampler, SamplingRow
from aphro_core.worker.truncation import build_truncation, draw_from_all, draw_from_top

CPU = torch.device("cpu")


def survivors_by_transformers(scores: Tensor, token_ids: list[int], params: SamplingParams) -> Tensor:
    """``scores`` [1, vocab] through transformers' processors, in our order."""
    from transformers.generation.logits_process import (
        LogitsProcessor,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    steps: list[LogitsProcessor] = [
        RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
        TemperatureLogitsWarper(params.temperature),
    ]
    steps += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    steps += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    steps += [TopPLogitsWarper(params.top_p)] if params.top_p < 1.0 else []
    for step in steps:
        scores = step(torch.tensor([token_ids]), scores)
    return scores


@settings(deadline=None, max_examples=30)
@given(
    generator_seed=st.integers(0, 2**20),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 7, 128, 200, 999, 1500]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.001, 0.1, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
)
def test_like_transformers(generator_seed: int, spread: float, **fields: Any) -> None:
    """The drawn token is the argmax of noise over transformers' processed scores, whichever way the draw takes."""
    generator = torch.Generator().manual_seed(generator_seed)
    logits = torch.randn(1, 1000, generator=generator) * spread
    token_ids = torch.randint(1000, (50,), generator=generator).tolist()
    params = SamplingParams(**fields)
    processed = survivors_by_transformers(logits.clone(), token_ids, params)
    positions = range(50, 62)
    noise = GumbelNoise(1000, CPU).add_(torch.zeros(12, 1000), draw_keys([(3, i) for i in positions], CPU))
    rows = [SamplingRow(1, params, 3, position, token_ids, 20) for position in positions]
    drawn = Sampler(1000, CPU).sample(logits.expand(12, -1), rows)
    assert [token.token_id for token in drawn] == (processed + noise).argmax(dim=-1).tolist()


@settings(deadline=None, max_examples=40)
@given(
    generator_seed=st.integers(0, 2**20),
    spread=st.sampled_from([0.01, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 5, 128, 129, 3000]),
    top_p=st.sampled_from([1.0, 0.95, 0.3]),
    min_p=st.sampled_from([0.0, 0.05]),
)
def test_candidates_and_the_whole_row_draw_the_same(generator_seed: int, spread: float, **fields: Any) -> None:
    logits = torch.randn(6, 4001, generator=torch.Generator().manual_seed(generator_seed)) * spread
    logits = (logits * 8).round() / 8  # many ties
    scores = logits - logits.amax(dim=-1, keepdim=True)
    cut = build_truncation([SamplingParams(**fields)] * 6, 4001, CPU)
    keys, noise = draw_keys([(generator_seed, i) for i in range(6)], CPU), GumbelNoise(4001, CPU)
    tokens, is_settled = draw_from_top(scores.clone(), cut, keys, noise)
    everywhere = draw_from_all(scores.clone(), cut, keys, noise)
    assert tokens[is_settled].tolist() == everywhere[is_settled].tolist()
    if spread == 5.0 and fields["top_k"] in (1, 5):
        assert bool(is_settled.all())  # the quick way is not for show


@pytest.mark.parametrize("width", [1, 127, 128, 129, 1000, 1280])
def test_reductions_of_long_rows(width: int) -> None:
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(width)).mul(2).round()
    padded = torch.cat([x, torch.full((5, 3), 99.0)], dim=1)[:, :width]  # rows that are not contiguous
    first = [int((line == line.max()).nonzero()[0]) for line in x]
    assert argmax(x).tolist() == argmax(padded).tolist() == first
    torch.testing.assert_close(row_sum(x), x.sum(dim=-1, keepdim=True))


def test_row_sum_does_not_depend_on_the_other_rows() -> None:
    x = torch.rand(16, 49152 + 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(row_sum(x)[3], row_sum(x[3:4])[0])
