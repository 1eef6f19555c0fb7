"""The steps before serving, on the GPU's runner with CPU tensors: which kinds there are, and that nothing stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from aphro_core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from aphro_core.messages.steps import StepPlan
from aphro_core.worker import warm_up as module
from tests.core.worker.one_rank import BLOCK_SIZE, NUM_BLOCKS
from tests.core.worker.test_device_runner import device_runner
from tests.tiny import write_tiny_checkpoint


@pytest.mark.parametrize("max_num_seqs", [3, 1])
def test_steps_of_every_kind_leave_nothing_behind(
    max_num_seqs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_checkpoint(tmp_path, "llama")
    runner = device_runner(SimpleNamespace(folder=tmp_path))
    config = EngineConfig(
        model=ModelConfig(path=str(tmp_path), served_name="tiny", dtype="float32", max_model_len=128),
        cache=CacheConfig(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE),
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=100),
        device="cuda",
        enforce_eager=True,
    )
    plans: list[StepPlan] = []
    launch = runner.launch

    def noted(plan: StepPlan) -> object:
        plans.append(plan)
        return launch(plan)

    monkeypatch.setattr(runner, "launch", noted)
    monkeypatch.setattr(module, "_reserve_pinned_memory", lambda: None)
    monkeypatch.setattr(module, "_SHORT", 33)
    with mock.patch.object(torch.cuda, "synchronize"):
        module.warm_up(runner, config, NUM_BLOCKS, 2, lambda phase, done, total: None)
    lengths = [sorted(entry.num_tokens for entry in plan.scheduled) for plan in plans if plan.scheduled]
    assert ([33, 33, 33] in lengths) == (max_num_seqs == 3)  # as many short prompts as a step may have
    assert [20] in lengths
    assert max(map(max, lengths)) <= 100
    assert ([1, 2] in lengths) == ([1, 1] in lengths) == (max_num_seqs == 3)
    assert [1] in lengths or max_num_seqs > 1
    assert max(map(len, lengths)) == max_num_seqs
    assert runner._sequences == {}


def test_ranks_meet_between_compiling_and_steps_that_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which one compiles faster is by chance, and how long another may take no kernel knows."""
    write_tiny_checkpoint(tmp_path, "llama")
    runner = device_runner(SimpleNamespace(folder=tmp_path))
    config = EngineConfig(
        model=ModelConfig(path=str(tmp_path), served_name="tiny", dtype="float32", max_model_len=128),
        device="cuda",
        enforce_eager=True,
    )
    done: list[str] = []

    @contextmanager
    def compiling(num_processes: int) -> Iterator[Callable[[], None]]:
        yield lambda: None
        done.append("compiled")

    monkeypatch.setattr(module, "can_compile_ahead", lambda: True)
    monkeypatch.setattr(module, "compiling_ahead", compiling)
    monkeypatch.setattr(module, "_run_steps", lambda *arguments: done.append("steps"))
    monkeypatch.setattr(module, "_run_lengths", lambda *arguments: None)
    monkeypatch.setattr(module, "_reserve_pinned_memory", lambda: None)
    monkeypatch.setattr(runner._links.tensor, "meet", lambda device: done.append("met"))
    with mock.patch.object(torch.cuda, "synchronize"):
        module.warm_up(runner, config, NUM_BLOCKS, 2, lambda phase, done, total: None)
    assert done == ["steps", "compiled", "met", "steps"]


@pytest.mark.parametrize(("is_eager", "expected"), [(True, [16, 32, 64]), (False, [64])])
def test_lengths_that_graphs_have_are_not_run_again(
    tmp_path: Path, is_eager: bool, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_checkpoint(tmp_path, "llama")
    runner = device_runner(SimpleNamespace(folder=tmp_path), graph_tokens=32)
    config = EngineConfig(
        model=ModelConfig(path=str(tmp_path), served_name="tiny", dtype="float32", max_model_len=128),
        scheduler=SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=100),
        device="cuda",
        enforce_eager=is_eager,
    )
    run: list[int] = []
    monkeypatch.setattr(runner, "capture_graphs", lambda on_progress: run.clear())
    monkeypatch.setattr(module, "can_compile_ahead", lambda: False)
    monkeypatch.setattr(module, "_LENGTHS", (16, 32, 64, 128))
    monkeypatch.setattr(module, "_run_steps", lambda *arguments: None)
    monkeypatch.setattr(module, "_run_short", lambda runner, steps, num_prompts, length, block_size: run.append(length))
    monkeypatch.setattr(module, "_reserve_pinned_memory", lambda: None)
    with mock.patch.object(torch.cuda, "synchronize"):
        module.warm_up(runner, config, NUM_BLOCKS, 2, lambda phase, done, total: None)
    assert run == expected
