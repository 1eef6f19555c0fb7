"""The steps before serving, on the GPU's runner with CPU tensors: which kinds there are, and that nothing stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from aphro_core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from aphro_core.distributed import stage_links
from aphro_core.distributed.links import Links
from aphro_core.distributed.stage_links import TokenLink
from aphro_core.messages.steps import StepPlan
from aphro_core.worker import warm_up as module
from tests.core.ranks import run_ranks
from tests.core.worker.one_rank import BLOCK_SIZE, NUM_BLOCKS, sharding_plan
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
    monkeypatch.setattr(Links, "meet", lambda self, device: done.append("met"))
    with mock.patch.object(torch.cuda, "synchronize"):
        module.warm_up(runner, config, NUM_BLOCKS, 2, lambda phase, done, total: None)
    assert done == ["steps", "compiled", "met", "steps"]


class Lines:
    """Stands for lines by peer memory: messages over Gloo, and none where no kernel is launched."""

    def __init__(self) -> None:
        self.is_noting = False
        self.num_put = self.num_taken = 0
        self._sent: list[object] = []

    def put(self, x: torch.Tensor, line: tuple[int, int], *, is_fatal: bool) -> None:
        if not self.is_noting:
            self.num_put += 1
            self._sent.append((work := x.clone(), dist.isend(work, dst=line[0], tag=line[1])))

    def take_(self, x: torch.Tensor, line: tuple[int, int], *, is_fatal: bool) -> torch.Tensor:
        if self.is_noting:
            return x.zero_()
        self.num_taken += 1
        dist.recv(x, src=line[0], tag=line[1])
        return x


def test_stages_come_out_of_it_in_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of steps whose kernels are only noted nothing is sent by peer memory, and nobody may go on waiting for it."""
    write_tiny_checkpoint(tmp_path, "llama")
    config = EngineConfig(
        model=ModelConfig(path=str(tmp_path), served_name="tiny", dtype="float32", max_model_len=128),
        cache=CacheConfig(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE),
        scheduler=SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=100),
        device="cuda",
        enforce_eager=True,
    )

    def rank_of_two(links: Links, rank: int) -> tuple[int, int, int]:
        lines = Lines()

        @contextmanager
        def compiling(num_processes: int) -> Iterator[Callable[[], None]]:
            lines.is_noting = True
            yield lambda: None
            lines.is_noting = False

        hidden: Any = (1 - rank, 1)
        links.stage.go_by(hidden if rank else None, None if rank else hidden)
        tokens: Any = (1 - rank, 2)
        links = replace(links, tokens=TokenLink(1 - rank, None, tokens))
        runner = device_runner(SimpleNamespace(folder=tmp_path), links, 1, 2, rank)
        monkeypatch.setattr(stage_links, "put", lines.put)
        monkeypatch.setattr(stage_links, "take_", lines.take_)
        monkeypatch.setattr(module, "can_compile_ahead", lambda: True)
        monkeypatch.setattr(module, "compiling_ahead", compiling)
        monkeypatch.setattr(module, "_reserve_pinned_memory", lambda: None)
        monkeypatch.setattr(module, "_SHORT", 33)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        module.warm_up(runner, config, NUM_BLOCKS, 2, lambda phase, done, total: None)
        due = 0 if runner._returning is None else len(runner._returning._due)
        return lines.num_put, lines.num_taken, due

    first, last = run_ranks(tmp_path, sharding_plan(tmp_path, 1, 2), rank_of_two, timeout_seconds=10.0)
    assert first[0] == last[1] > 0
    assert last[0] == first[1] + first[2] > 0


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
