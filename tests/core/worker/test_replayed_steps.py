"""Steps made again from what was noted of one give the same bits as steps that are computed call by call."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from aphro_core import host
from aphro_core.parallel.memory import REPLAYED_BYTES
from aphro_core.worker import replayed_steps
from aphro_core.worker.model_runner import ModelRunner
from aphro_core.worker.replayed_steps import ReplayedSteps
from tests.core.worker.one_rank import GREEDY, Planner, build_runner, sharding_plan
from tests.tiny import write_tiny_checkpoint

LENGTHS = (9, 70, 3, 120)
NEW_TOKENS = 24  # blocks are begun, and tables outgrow what was noted
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # whole units of the products

Found = dict[int, list[tuple[int, list[float]]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_tiny_checkpoint(folder, "llama", **SIZES)
    return folder


def tokens(runner: ModelRunner) -> Found:
    """Prompts come one by one and leave one by one, so that rows come and go between steps that are alike."""
    source, planner, found = random.Random(1), Planner(), Found()
    left: dict[int, int] = {}
    for step in range(NEW_TOKENS * 2):
        if step % 5 == 0 and step // 5 < len(LENGTHS):
            seq_id = step // 5
            planner.add(seq_id, [source.randrange(5, 125) for _ in range(LENGTHS[seq_id])], GREEDY)
            left[seq_id] = NEW_TOKENS
        for seq_id in [seq_id for seq_id, count in left.items() if not count]:
            planner.release(seq_id)
            del left[seq_id]
        result = runner.execute(planner.plan({seq_id: planner.remaining(seq_id) for seq_id in left}))
        if result is None:
            continue
        for index, token_id in enumerate(planner.take(result).token_ids if left else ()):
            left[planner.drawing[index]] -= 1
            found.setdefault(planner.drawing[index], []).append((token_id, result.logprobs[index].logprobs))
    return found


@pytest.mark.skipif(not host.has_product_kernels(), reason="this CPU has no products of ours")
def test_the_same_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = build_runner(folder, sharding_plan(folder, 1, 1), dtype=torch.bfloat16)
    found = tokens(runner)
    assert runner.steps.num_kept > 3
    plain = build_runner(folder, sharding_plan(folder, 1, 1), dtype=torch.bfloat16)
    monkeypatch.setattr(ReplayedSteps, "_size", lambda self, batch: None)
    assert tokens(plain) == found
    assert plain.steps.num_kept == 0


@pytest.mark.skipif(not host.has_product_kernels(), reason="this CPU has no products of ours")
def test_what_is_kept_has_a_bound(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = build_runner(folder, sharding_plan(folder, 1, 1), dtype=torch.bfloat16)
    found = tokens(runner)
    kept, num_bytes = runner.steps.num_kept, runner.steps.num_bytes
    hidden_states = SIZES["hidden_size"] * torch.bfloat16.itemsize
    assert kept * hidden_states < num_bytes < REPLAYED_BYTES / 10
    for allowed in (num_bytes // 2, 100):  # some of them; not even one
        monkeypatch.setattr(replayed_steps, "REPLAYED_BYTES", allowed)
        fewer = build_runner(folder, sharding_plan(folder, 1, 1), dtype=torch.bfloat16)
        assert tokens(fewer) == found
        assert fewer.steps.num_bytes <= allowed
        assert fewer.steps.num_kept < kept
    assert fewer.steps.num_kept == 0


def test_long_tables_that_are_not_kept_leave_short_ones_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 rows with tables of 1,024 blocks not quite half as many would fit."""
    steps = build_runner(folder, sharding_plan(folder, 1, 1), dtype=torch.bfloat16).steps
    foreign: set[str] = set()
    step = SimpleNamespace(foreign=foreign, num_bytes=2 * REPLAYED_BYTES, note=lambda *step: torch.zeros(1))
    monkeypatch.setattr(replayed_steps, "_Step", lambda decoder, size: step)
    steps._note((40, 1024), Mock(), None)
    found = {(rows, blocks): steps._can_keep(rows, blocks) for rows in (19, 20, 40, 128) for blocks in (8, 1024, 2048)}
    assert found == {(rows, blocks): rows <= 19 or blocks == 8 for rows, blocks in found}
    assert not steps._can_keep(129, 8)


def test_steps_that_call_torch_are_computed_as_ever(folder: Path) -> None:
    runner = build_runner(folder, sharding_plan(folder, 1, 1), dtype=torch.float32)
    assert len(tokens(runner)) == len(LENGTHS)
    assert runner.steps.num_kept == 0
