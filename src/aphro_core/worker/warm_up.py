"""Before a GPU serves: every kernel compiled, every library's handle made, every graph captured."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count

import torch

from aphro_core.config import EngineConfig
from aphro_core.messages.steps import NewSequence, ScheduledSequence, StepPlan
from aphro_core.request import SamplingParams
from aphro_core.worker.compile_ahead import can_compile_ahead, compiling_ahead
from aphro_core.worker.device_runner import DeviceRunner

_DIALS = (SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_k=20, top_p=0.9))


def warm_up(
    runner: DeviceRunner, config: EngineConfig, num_blocks: int, on_progress: Callable[[int, int], None]
) -> None:
    """Runs steps of every kind through the runner, in cache blocks that are given back, then captures its graphs.

    Before that all their kernels are compiled, by as many processes as this rank has cores for.
    """
    steps = count(1)
    most = min(
        config.scheduler.most_tokens, config.model.max_model_len - 2, (num_blocks - 1) * config.cache.block_size - 2
    )
    cores = len(os.sched_getaffinity(0)) // config.parallel.world_size
    if can_compile_ahead():
        with compiling_ahead(cores):
            _run_steps(runner, steps, most, config.cache.block_size)
            if not config.enforce_eager:
                runner.run_every_size()
        torch.cuda.synchronize()  # of what was computed there nothing is used
    _run_steps(runner, steps, most, config.cache.block_size)
    if not config.enforce_eager:
        runner.capture_graphs(on_progress)
    _reserve_pinned_memory()
    torch.cuda.synchronize()


def _run_steps(runner: DeviceRunner, steps: count[int], most: int, block_size: int) -> None:
    """Prompts of a few tokens and of as many as a step may have, alone and beside rows that decode, for each way of
    sampling. Tokens are all 0: what they are costs nothing."""
    few = min(20, most)
    for length, dials in [*((few, dials) for dials in _DIALS), (most, _DIALS[0])]:
        if length > 1:
            _run_pair(runner, steps, length, dials, block_size)


def _reserve_pinned_memory() -> None:
    """The driver takes milliseconds to pin a page; the allocator keeps what was pinned once, by powers of two."""
    sizes = [2**power for power in range(6, 21)]
    held = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes for _ in range(4)]
    del held


def _run_pair(runner: DeviceRunner, steps: count[int], length: int, dials: SamplingParams, block_size: int) -> None:
    """A prompt alone, then its next token beside another prompt, then both decode, then both leave."""
    blocks = list(range(-(-(length + 2) // block_size)))
    first = NewSequence(0, [0] * length, length, dials, 0)
    second = NewSequence(1, [0] * 2, 2, dials, 0)
    spare = [blocks[-1]]  # what stands in it does not matter
    plans = [
        ([ScheduledSequence(0, 0, length, [], blocks, True)], [first]),
        ([ScheduledSequence(0, length, 1, [], [], True), ScheduledSequence(1, 0, 2, [], spare, True)], [second]),
        ([ScheduledSequence(0, length + 1, 1, [], [], True), ScheduledSequence(1, 2, 1, [], [], True)], []),
    ]
    for scheduled, new in plans:
        step = runner.launch(StepPlan(next(steps), scheduled, new))
        if step is not None:
            step.result()
    runner.launch(StepPlan(next(steps), [], [], [0, 1]))
