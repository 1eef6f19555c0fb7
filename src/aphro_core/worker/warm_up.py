"""Before a GPU serves: every kernel compiled, every library's handle made, every graph captured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Final

import torch

from aphro_core.config import EngineConfig
from aphro_core.messages.steps import NewSequence, ScheduledSequence, StepPlan
from aphro_core.request import SamplingParams
from aphro_core.worker.compile_ahead import can_compile_ahead, compiling_ahead
from aphro_core.worker.device_runner import DeviceRunner

_SHORT: Final = 128  # tokens; longer prompts take the kernels of the longest
_LENGTHS: Final = (*range(64, 1024, 64), *range(1024, 2049, 128))  # longer ones all take the largest tiles
_DIALS = (SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_k=20, top_p=0.9))


def warm_up(
    runner: DeviceRunner,
    config: EngineConfig,
    num_blocks: int,
    num_processes: int,
    on_progress: Callable[[str, int, int], None],
) -> None:
    """Runs steps of every kind through the runner, in cache blocks that are given back, then captures its graphs.

    Before that all their kernels are compiled, by ``num_processes``. Where layers are made alike few of them run until
    graphs are captured: the others launch the same kernels.
    """
    on_progress("kernels", 0, 1)
    steps = count(1)
    most = min(
        config.scheduler.most_tokens, config.model.max_model_len - 2, (num_blocks - 1) * config.cache.block_size - 2
    )
    num_short = min(config.scheduler.max_num_seqs, config.scheduler.most_tokens // max(min(_SHORT, most), 1))
    if can_compile_ahead():
        with compiling_ahead(num_processes) as begin, runner.rehearsing():
            if not config.enforce_eager:
                runner.run_every_kind()
                begin()
            _run_steps(runner, steps, most, num_short, config)
            runner.compile_head()
            # what was to be sent there by a kernel was not: nobody may wait for it outside
            runner.launch(StepPlan(next(steps), [], forgets_all=True))
        torch.cuda.synchronize()  # of what was computed there nothing is used
        runner.meet()
    with runner.rehearsing():
        _run_steps(runner, steps, most, num_short, config)
    runner.open_head()
    on_progress("kernels", 1, 1)
    if not config.enforce_eager:
        runner.capture_graphs(partial(on_progress, "graphs"))
    replayed = 0 if config.enforce_eager else runner.graph_tokens
    most = min(most, config.scheduler.max_num_batched_tokens)
    with runner.rehearsing():
        _run_lengths(runner, steps, range(replayed + 1, most + 1), config.cache.block_size)
    _reserve_pinned_memory()
    torch.cuda.synchronize()


def _run_steps(runner: DeviceRunner, steps: count[int], most: int, num_short: int, config: EngineConfig) -> None:
    """Prompts of a few tokens and of as many as a step may have, alone and beside rows that decode, for each way of
    sampling; and ``num_short`` short ones, as many as a step may have: kernels may take them otherwise than a long
    one. Tokens are all 0: what they are costs nothing."""
    few, block_size = min(20, most), config.cache.block_size
    for length, dials in [*((few, dials) for dials in _DIALS), (most, _DIALS[0])]:
        if length > 1:
            _run_pair(runner, steps, length, dials, block_size, is_alone=config.scheduler.max_num_seqs == 1)
    if num_short > 1:
        _run_short(runner, steps, num_short, min(_SHORT, most), block_size)


def _reserve_pinned_memory() -> None:
    """The driver takes milliseconds to pin a page; the allocator keeps what was pinned once, by powers of two."""
    sizes = [2**power for power in range(6, 21)]
    held = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes for _ in range(4)]
    del held


def _run_lengths(runner: DeviceRunner, steps: count[int], lengths: range, block_size: int) -> None:
    """One prompt of each of these lengths that a library may take another kernel for, in steps beside streams that no
    graph was captured of. It loads a kernel when it is first called, and waits for the steps in flight then: the
    streams would wait, too."""
    for length in _LENGTHS:
        if length in lengths:
            _run_short(runner, steps, 1, length, block_size)


def _run_pair(
    runner: DeviceRunner, steps: count[int], length: int, dials: SamplingParams, block_size: int, *, is_alone: bool
) -> None:
    """A prompt alone, then its next token beside another prompt, then both decode, then both leave. ``is_alone``: a
    step has one sequence, and there is no other."""
    blocks = list(range(-(-(length + 2) // block_size)))
    first = NewSequence(0, [0] * length, length, dials, 0)
    second = NewSequence(1, [0] * 2, 2, dials, 0)
    spare = [blocks[-1]]  # what stands in it does not matter
    plans = [
        ([ScheduledSequence(0, 0, length, [], blocks, True)], [first]),
        ([ScheduledSequence(0, length, 1, [], [], True), ScheduledSequence(1, 0, 2, [], spare, True)], [second]),
        ([ScheduledSequence(0, length + 1, 1, [], [], True), ScheduledSequence(1, 2, 1, [], [], True)], []),
    ]
    if is_alone:
        plans = [plans[0], ([ScheduledSequence(0, length, 1, [], [], True)], [])]
    for scheduled, new in plans:
        step = runner.launch(StepPlan(next(steps), scheduled, new))
        if step is not None:
            step.result()
    runner.launch(StepPlan(next(steps), [], [], [0] if is_alone else [0, 1]))


def _run_short(runner: DeviceRunner, steps: count[int], num_prompts: int, length: int, block_size: int) -> None:
    """Prompts that all write the same blocks, since what stands in them does not matter, and then leave."""
    blocks = list(range(-(-length // block_size)))
    new = [NewSequence(seq_id, [0] * length, length, _DIALS[0], 0) for seq_id in range(num_prompts)]
    scheduled = [ScheduledSequence(seq_id, 0, length, [], blocks, True) for seq_id in range(num_prompts)]
    step = runner.launch(StepPlan(next(steps), scheduled, new))
    if step is not None:
        step.result()
    runner.launch(StepPlan(next(steps), [], [], list(range(num_prompts))))
