"""Every step of the sampler in closed form, by distribution, and alone as in any batch; errors name the sequence."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aphro_core.request import SamplingParams
from aphro_core.worker.logprobs import token_logprobs
from aphro_core.worker.penalties import TokenCounts
from aphro_core.worker.sampler import SampledToken, Sampler, SamplingRow
from aphro_core.worker.step import SamplingError

CPU = torch.device("cpu")
TEN = torch.tensor([[2.0, -1.0, 0.5, 1.0, -3.0, 0.0, 1.5, -0.5, -2.0, 1.9]])


def row(seq_id: int = 1, **fields: Any) -> SamplingRow:
    """A row behind the prompt [3, 3, 4] and the output [0, 6, 6] unless ``fields`` say otherwise."""
    token_ids = fields.pop("token_ids", [3, 3, 4, 0, 6, 6])
    num_prompt_tokens = fields.pop("num_prompt_tokens", 3)
    stop_token_ids = fields.pop("stop_token_ids", ())
    position = fields.pop("position", len(token_ids))
    seed = fields.pop("seed", 7)
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": None, **fields})
    return SamplingRow(seq_id, params, seed, position, token_ids, num_prompt_tokens, stop_token_ids)


def pick(logits: Tensor, *rows: SamplingRow) -> list[int]:
    sampled = Sampler(logits.shape[1], CPU).sample(logits, rows)
    assert [token.seq_id for token in sampled] == [row.seq_id for row in rows]
    return [token.token_id for token in sampled]


def support(logits: Tensor, **fields: Any) -> set[int]:
    """The tokens that 300 draws meet: with few survivors of like probability, all of them."""
    rows = [row(seed=seed, temperature=fields.get("temperature", 1.0), **without(fields)) for seed in range(300)]
    return set(pick(logits.expand(300, -1), *rows))


def without(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "temperature"}


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    assert pick(TEN, row()) == [0]
    assert pick(torch.tensor([[1.0, 3.0, 3.0]]), row(token_ids=[0], num_prompt_tokens=1)) == [1]


def test_logit_bias_adds() -> None:
    assert pick(TEN, row(logit_bias={9: 0.2})) == [9]
    assert pick(TEN, row(logit_bias={0: -100.0, 9: -0.05})) == [9]


def test_min_tokens_masks_stop_tokens_until_the_output_is_long_enough() -> None:
    assert pick(TEN, row(min_tokens=4, stop_token_ids=[0, 99])) == [9]  # three output tokens so far
    assert pick(TEN, row(min_tokens=3, stop_token_ids=[0, 99])) == [0]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_output() -> None:
    assert pick(TEN, row(repetition_penalty=1.1)) == [9]  # token 0: 2.0 / 1.1 = 1.82 < 1.9
    assert pick(TEN, row(repetition_penalty=1.05)) == [0]
    assert pick(torch.tensor([[-1.0, -1.4]]), row(repetition_penalty=1.5, token_ids=[0], num_prompt_tokens=1)) == [1]


def test_frequency_and_presence_penalties_count_the_output_only() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 3], logits[0, 6], logits[0, 0] = 1.0, 3.0, 2.0
    # output: 0 once, 6 twice; 3 is in the prompt only
    assert pick(logits, row(frequency_penalty=0.9)) == [6]  # 3 - 1.8 = 1.2 against 2 - 0.9 = 1.1
    assert pick(logits, row(frequency_penalty=1.05)) == [3]  # 0.9, 0.95, 1
    assert pick(logits, row(presence_penalty=1.9)) == [6]  # 1.1, 0.1, 1
    assert pick(logits, row(presence_penalty=2.0, frequency_penalty=0.1)) == [3]
    assert pick(logits, row(frequency_penalty=-2.0)) == [6]


@given(
    prompt=st.lists(st.integers(0, 500), min_size=1, max_size=20), output=st.lists(st.integers(0, 500), max_size=300)
)
def test_counts_are_a_counter(prompt: list[int], output: list[int]) -> None:
    counts, tokens = TokenCounts(), list(prompt)
    for token_id in output:
        tokens.append(token_id)
        if token_id % 3:  # sometimes several at once
            counts.catch_up(tokens, len(prompt))
    counts.catch_up(tokens, len(prompt))
    expected = {token_id: 0 for token_id in prompt} | Counter(output)
    ids, numbers = counts.tensors()
    assert dict(zip(ids.tolist(), numbers.tolist(), strict=True)) == expected


def test_counts_follow_a_growing_sequence() -> None:
    sampler = Sampler(10, CPU)
    grown = row(frequency_penalty=0.5, repetition_penalty=1.01)
    for _ in range(40):
        token = sampler.sample(TEN, [grown])[0].token_id
        fresh = row(frequency_penalty=0.5, repetition_penalty=1.01, token_ids=list(grown.token_ids))
        assert token == sampler.sample(TEN, [fresh])[0].token_id
        grown.token_ids.append(token)
        grown.position += 1
    assert len(set(grown.token_ids)) > 5


def test_top_k_top_p_min_p_keep_what_they_say() -> None:
    probabilities = torch.tensor([[0.4, 0.3, 0.2, 0.06, 0.04]])
    base = {"token_ids": [0], "num_prompt_tokens": 1}
    logits = probabilities.log()
    assert support(logits, top_k=2, **base) == {0, 1}
    assert support(logits, top_p=0.69, **base) == {0, 1}
    assert support(logits, top_p=0.71, **base) == {0, 1, 2}
    assert support(logits, top_p=1e-6, **base) == {0}
    assert support(logits, min_p=0.49, **base) == {0, 1, 2}
    assert support(logits, min_p=0.51, **base) == {0, 1}
    assert support(logits, min_p=1.0, **base) == {0}
    # top_p is a share of what top_k left: 0.4 / 0.7 = 0.57
    assert support(logits, top_k=2, top_p=0.56, **base) == {0}
    # and of what min_p left: 0.4 / 0.9 = 0.44, 0.7 / 0.9 = 0.78
    assert support(logits, min_p=0.3, top_p=0.77, **base) == {0, 1}
    # min_p sees the temperature: at 1/2 the ratios square, (0.2 / 0.4) ** 2 = 0.25
    assert support(logits, min_p=0.26, temperature=0.5, **base) == {0, 1}


def test_ties_at_the_border_are_all_kept() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, -2.0]])
    base = {"token_ids": [0], "num_prompt_tokens": 1}
    assert support(logits, top_k=2, **base) == {0, 1, 2}
    assert support(logits, top_p=0.4, **base) == {0, 1, 2}


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 0), (1.0, 4)])
def test_frequencies_follow_softmax(temperature: float, top_k: int) -> None:
    num_draws = 20_000
    rows = [row(seed=5, position=1 + i, temperature=temperature, top_k=top_k) for i in range(num_draws)]
    drawn = torch.tensor(pick(TEN.expand(num_draws, -1), *rows))
    scores = TEN[0] / temperature
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -math.inf)
    expected = scores.softmax(dim=-1) * num_draws
    observed = torch.bincount(drawn, minlength=10).float()
    assert not bool(observed[expected == 0].any())
    kept = expected > 0
    statistic = float(((observed - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


MIXED = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.95},
    {"temperature": 1.2, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 400},
    {"temperature": 1.0, "repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    {"temperature": 0.9, "logit_bias": {11: 5.0, 12: -100.0}},
    {"min_tokens": 9, "stop_token_ids": [4, 5, 6]},
    {"temperature": 1.5, "logprobs": 3},
    {"logprobs": 0, "frequency_penalty": 2.0},
    {"temperature": 2.0, "top_p": 0.05},
]


def test_alone_as_in_a_mixed_batch() -> None:
    """Tokens and log-probabilities of a row do not depend on its neighbours, their order or their number."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(len(MIXED) * 3, 5003, generator=generator) * 3
    rows = [row(i, seed=i, **dict(MIXED[i % len(MIXED)])) for i in range(len(logits))]
    sampler = Sampler(5003, CPU)
    together = {token.seq_id: token for token in sampler.sample(logits, rows)}
    alone = {i: sampler.sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(len(rows))}
    order = torch.randperm(len(rows), generator=generator).tolist()[: len(rows) // 2]
    shuffled = sampler.sample(logits[order], [rows[i] for i in order])
    assert {i: token.token_id for i, token in together.items()} == {i: token.token_id for i, token in alone.items()}
    assert all(together[token.seq_id].token_id == token.token_id for token in shuffled)
    for i, token in alone.items():
        assert_same_logprobs(token, together[i])


def assert_same_logprobs(one: SampledToken, other: SampledToken) -> None:
    assert (one.logprobs is None) == (other.logprobs is None)
    if one.logprobs and other.logprobs:
        assert one.logprobs.token_ids == other.logprobs.token_ids
        assert one.logprobs.logprobs == pytest.approx(other.logprobs.logprobs, abs=1e-5)


def test_seed_and_position_decide() -> None:
    logits = torch.zeros(1, 1000)
    drawn = [pick(logits, row(seed=seed, position=position, temperature=1.0)) for seed in (1, 2) for position in (5, 6)]
    assert len({tuple(tokens) for tokens in drawn}) == 4
    assert drawn[0] == pick(logits, row(seq_id=99, seed=1, position=5, temperature=1.0))


def test_logits_are_left_as_they_are_and_logprobs_are_raw() -> None:
    logits = TEN.clone()
    params = {"temperature": 0.5, "logit_bias": {4: 50.0}, "repetition_penalty": 2.0, "logprobs": 2}
    token = Sampler(10, CPU).sample(logits, [row(**params)])[0]
    assert torch.equal(logits, TEN)
    assert token.token_id == 4
    assert token.logprobs is not None
    assert token.logprobs.token_ids == [4, 0, 9]
    expected = TEN[0].log_softmax(dim=-1)
    assert token.logprobs.logprobs == pytest.approx([float(expected[i]) for i in (4, 0, 9)], abs=1e-6)
    assert token.logprobs.rank == 10


def test_rank_counts_strictly_larger_logits() -> None:
    entries = token_logprobs(torch.tensor([[1.0, 2.0, 2.0, 3.0]] * 3), [2, 3, 0], [0, 20, 1])
    assert [entry.rank for entry in entries] == [2, 1, 4]
    assert [len(entry.token_ids) for entry in entries] == [1, 5, 2]  # 20 of a vocabulary of 4 are 4
    assert entries[1].token_ids[:2] == [3, 3]


@pytest.mark.parametrize("poison", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unsound_logits_name_the_sequence(poison: float, temperature: float) -> None:
    logits = TEN.repeat(3, 1)
    logits[1] = poison
    if not math.isinf(poison) or poison > 0:
        logits[1, 5:] = 0.0
    rows = [row(seq_id, temperature=temperature, top_p=0.9) for seq_id in (41, 42, 43)]
    with pytest.raises(SamplingError, match="sequence 42 at position 6") as caught:
        Sampler(10, CPU).sample(logits, rows)
    assert caught.value.seq_ids == [42]
    assert caught.value.hint


def test_a_row_without_allowed_tokens_says_so() -> None:
    with pytest.raises(SamplingError, match="no token is left by logit_bias and min_tokens"):
        pick(TEN, row(min_tokens=9, stop_token_ids=list(range(10))))


def test_a_bias_outside_the_vocabulary_names_the_token() -> None:
    with pytest.raises(SamplingError, match="sequence 1 has a logit_bias for token 10, allowed: 0 to 9"):
        pick(TEN, row(logit_bias={2: 1.0, 10: 1.0}))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[1, 10\] float32"):
        Sampler(10, CPU).sample(torch.zeros(2, 10), [row()])
    with pytest.raises(ValueError, match="bfloat16"):
        Sampler(10, CPU).sample(torch.zeros(1, 10, dtype=torch.bfloat16), [row()])
    assert Sampler(10, CPU).sample(torch.zeros(0, 10), []) == []


ELSEWHERE = {  # what the frontend and the scheduler answer
    *("n", "max_tokens", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos"),
    *("prompt_logprobs", "skip_special_tokens", "detokenize"),
}


def test_every_sampling_field_has_its_step() -> None:
    """A new field of SamplingParams must be read by the sampler or be named above as somebody else's."""
    read: set[str] = set()

    class Recorder:
        def __init__(self, params: SamplingParams) -> None:
            self._params = params

        def __getattr__(self, name: str) -> Any:
            read.add(name)
            return getattr(self._params, name)

    everything = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "presence_penalty": 1.0}
    rows = [row(**everything), row(min_tokens=1, logit_bias={1: 1.0}, logprobs=1)]
    for entry in rows:
        entry.sampling = Recorder(entry.sampling)  # type: ignore[assignment]
    pick(TEN.repeat(2, 1), *rows)
    read.discard("is_greedy")
    fields = set(SamplingParams.__struct_fields__)
    assert fields > ELSEWHERE
    assert read == fields - ELSEWHERE
