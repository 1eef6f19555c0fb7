"""Deterministic ranks: a sequence's log-probabilities are the same bits alone, in any step, cut anyhow, begun again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aphro_core import host
from aphro_core.distributed.links import Links
from aphro_core.layers.row_invariant import multiply_rows, safe_sizes
from aphro_core.request import SamplingParams
from aphro_core.worker.model_runner import ModelRunner
from tests.core.ranks import run_ranks
from tests.core.worker.one_rank import Planner, build_runner, sharding_plan
from tests.tiny import write_tiny_checkpoint

NEW_TOKENS = 5
LENGTHS = (1, 7, 150, 40, 33, 2)  # 150: beyond what is read row by row otherwise
GREEDY = SamplingParams(temperature=0.0, logprobs=5)
DRAWN = SamplingParams(temperature=0.8, top_p=0.9, seed=3, logprobs=5)


def prompts() -> list[list[int]]:
    source = random.Random(5)
    return [[source.randrange(5, 125) for _ in range(length)] for length in LENGTHS]


def sampling_of(seq_id: int) -> SamplingParams:
    return DRAWN if seq_id % 2 else GREEDY


Found = dict[int, list[tuple[int, list[float]]]]


def note(planner: Planner, found: Found, result: Any) -> None:
    if result is None:
        return
    for index, token_id in enumerate(planner.take(result).token_ids):
        found.setdefault(planner.drawing[index], []).append((token_id, result.logprobs[index].logprobs))


def alone(runner: ModelRunner) -> Found:
    planner, found = Planner(), Found()
    for seq_id, prompt in enumerate(prompts()):
        planner.add(seq_id, prompt, sampling_of(seq_id))
        for _ in range(NEW_TOKENS):
            note(planner, found, runner.execute(planner.plan({seq_id: planner.remaining(seq_id)})))
        planner.release(seq_id)
    return found


def together(runner: ModelRunner, seed: int) -> Found:
    """Random chunks of random sequences; now and then one loses its blocks and begins again with what it has."""
    source, planner, found = random.Random(seed), Planner(seed), Found()
    live = list(range(len(LENGTHS)))
    for seq_id in live:
        planner.add(seq_id, prompts()[seq_id], sampling_of(seq_id))
    while live:
        chosen = [seq_id for seq_id in live if source.random() < 0.8] or live[:1]
        shares = {seq_id: source.randint(1, planner.remaining(seq_id)) for seq_id in chosen}
        note(planner, found, runner.execute(planner.plan(shares)))
        for seq_id in list(live):
            if len(found.get(seq_id, ())) == NEW_TOKENS:
                live.remove(seq_id)
                planner.release(seq_id)
            elif source.random() < 0.1:
                tokens = planner.tokens[seq_id]
                planner.release(seq_id)
                planner.add(seq_id, tokens, sampling_of(seq_id), num_prompt_tokens=LENGTHS[seq_id])
    return found


@pytest.fixture
def all_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize(
    ("family", "has_own_products", "num_threads"),
    [("llama", True, 2), ("llama", False, 1), ("mixtral", True, 1), ("gemma3", False, 2)],
)
def test_the_same_bits_whatever_is_beside_it(
    tmp_path: Path, family: str, has_own_products: bool, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_own_products:
        monkeypatch.setattr(host, "has_product_kernels", lambda: False)
    torch.set_num_threads(num_threads)
    write_tiny_checkpoint(tmp_path, family, max_position_embeddings=256)
    plan = sharding_plan(tmp_path, 1, 1)
    runner = build_runner(tmp_path, plan, dtype=torch.bfloat16, is_deterministic=True)
    expected = alone(runner)
    for seed in range(2):
        assert together(runner, seed) == expected


def test_the_same_bits_on_three_ranks(tmp_path: Path) -> None:
    """Where the order of the sums over ranks could hang on the number of rows."""
    write_tiny_checkpoint(tmp_path, "llama", max_position_embeddings=256)
    plan = sharding_plan(tmp_path, 3, 1)

    def rank_of_group(links: Links, rank: int) -> Any:
        links.tensor.adds_in_order = True
        runner = build_runner(tmp_path, plan, rank, links, torch.bfloat16, is_deterministic=True)
        return _as_rank(runner)

    answers = run_ranks(tmp_path, plan, rank_of_group)
    assert answers[0] is True


def _as_rank(runner: ModelRunner) -> bool:
    """One sequence in one piece and then beside others; the ranks must make the same plans without seeing tokens."""
    planner, found = Planner(), []
    others = prompts()
    for round_ in range(3):
        ids = [10 * round_ + n for n in range(1 + 2 * round_)]
        for n, seq_id in enumerate(ids):
            planner.add(seq_id, others[(2 + n) % len(others)], GREEDY)
        cut = planner.plan({seq_id: min(planner.remaining(seq_id), 50 * round_ + 1) for seq_id in ids})
        rest = {seq_id: planner.remaining(seq_id) for seq_id in ids if planner.remaining(seq_id)}
        steps = [(planner.drawing, runner.execute(cut))]
        rest_plan = planner.plan(rest)
        steps.append((planner.drawing, runner.execute(rest_plan)))
        if steps[0][1] is None:
            continue
        found.append([one.logprobs[drawing.index(ids[0])].logprobs for drawing, one in steps if ids[0] in drawing])
    return all(one == found[0] for one in found)


@pytest.mark.parametrize("in_features", [64, 65])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_numbers_of_rows_that_change_no_bit_are_used(in_features: int, dtype: torch.dtype) -> None:
    weight = torch.randn(96, in_features, generator=torch.Generator().manual_seed(1)).to(dtype)

    def multiply(x: Tensor) -> Tensor:
        if len(x) >= 64:  # another order of adding
            return x.flip(1) @ weight.flip(1).T + 2**-7
        return x @ weight.T

    sizes = safe_sizes(multiply, in_features, dtype)
    assert max(sizes) < 64
    x = torch.randn(77, in_features, generator=torch.Generator().manual_seed(2)).to(dtype)
    whole = multiply_rows(multiply, x, sizes)
    for start, stop in ((0, 1), (3, 20), (50, 77)):
        assert torch.equal(multiply_rows(multiply, x[start:stop], sizes), whole[start:stop])


def test_where_a_row_hangs_on_its_place_each_goes_alone() -> None:
    def multiply(x: Tensor) -> Tensor:
        return x.sum(dim=1, keepdim=True) + torch.arange(len(x))[:, None]

    assert safe_sizes(multiply, 8, torch.float32) == (1,)
    x = torch.randn(5, 8)
    assert torch.equal(multiply_rows(multiply, x, (1,))[3:4], multiply_rows(multiply, x[3:4], (1,)))
