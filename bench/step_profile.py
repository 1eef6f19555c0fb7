"""Where each microsecond of a decode step on a GPU goes: kernels by name, gaps between them, and what the host costs.

    python bench/step_profile.py [--model llama3-8b] [--rows 1 32 256] [--context 640] [--steps 30] [--top 14]
                                 [--prompts 512 512 512] [-q fp8] [--layers 8] [-tp 2]

Dummy weights of a shape. For each number of rows: the time of every kernel in a step (profiler), their sum, the wall
time of the captured graph, which holds all of a decode step, and the period of whole steps launched one after the
other, as the engine does; the differences are gaps between kernels, and between graphs. "launch" is the time that the
host's thread needs for a step, which must stay below the period. ``--prompts``: steps that compute new prompts
of these lengths beside the rows; "graph" is then theirs, if they have one. ``-tp``: the times of rank 0, whose sums
wait for the others; its graph is not timed alone.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from ranks import Ranks, open_ranks
from workloads import CEILINGS, MODELS, WEIGHT_BYTES

from aphro_core.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from aphro_core.messages.steps import NewSequence, RowsAgain, ScheduledSequence, StepPlan
from aphro_core.request import SamplingParams
from aphro_core.worker.device_runner import DeviceRunner
from aphro_core.worker.worker import Worker

BLOCK_SIZE = 16


class Stepper:
    """Rows that decode behind a context that was never computed: what stands in the cache costs the same."""

    def __init__(self, worker: Ranks, rows: int, context: int, num_blocks: int) -> None:
        self._worker = worker
        self._rows = rows
        self._position = context
        per_row = num_blocks // rows
        self._blocks = [list(range(row * per_row, (row + 1) * per_row)) for row in range(rows)]
        self._used = -(-context // BLOCK_SIZE)
        self._step = 0
        self._num_blocks = num_blocks
        self._prompts: list[int] = []
        self.lengths: list[int] = []

    def begin(self, dials: SamplingParams) -> None:
        new = [NewSequence(row, [1] * (self._position + 1), self._position, dials, row) for row in range(self._rows)]
        self._used = self._position // BLOCK_SIZE + 1
        self._run([self._blocks[row][: self._used] for row in range(self._rows)], new)

    def decode(self) -> object:
        begins = self._position // BLOCK_SIZE + 1 > self._used
        self._used += begins
        return self._run([blocks[self._used - 1 : self._used] if begins else [] for blocks in self._blocks], [])

    def end(self) -> None:
        self._step += 1
        self._worker.launch(StepPlan(self._step, [], [], list(range(self._rows)) + self._prompts))

    def _run(self, new_blocks: list[list[int]], new: list[NewSequence]) -> object:
        self._step += 1
        if not new and not self.lengths:  # as the scheduler says it of rows that go on
            self._position += 1
            blocks = [(row, block) for row, begun in enumerate(new_blocks) for block in begun]
            return self._worker.launch(StepPlan(self._step, again=RowsAgain(self._rows, [], blocks)))
        scheduled = [ScheduledSequence(row, self._position, 1, [], new_blocks[row], True) for row in range(self._rows)]
        self._position += 1
        released, self._prompts = self._prompts, []
        for length in [] if new else self.lengths:
            seq_id = 2**20 + self._step * 100 + len(self._prompts)
            blocks = list(range(self._num_blocks - -(-length // BLOCK_SIZE), self._num_blocks))
            scheduled.append(ScheduledSequence(seq_id, 0, length, [], blocks, True))
            new = [*new, NewSequence(seq_id, [1] * length, length, SamplingParams(temperature=0.0), 0)]
            self._prompts.append(seq_id)
        return self._worker.launch(StepPlan(self._step, scheduled, new, released))


def configure(folder: str, max_rows: int, arguments: argparse.Namespace) -> EngineConfig:
    shape = MODELS[arguments.model] | ({"num_hidden_layers": arguments.layers} if arguments.layers else {})
    (Path(folder) / "config.json").write_text(json.dumps(shape))
    most_tokens = max(8192, sum(arguments.prompts) + max_rows)
    return EngineConfig(
        model=ModelConfig(
            path=folder,
            served_name=arguments.model,
            dtype="bfloat16",
            max_model_len=shape["max_position_embeddings"],
            load_format="dummy",
            quantization=arguments.q,
        ),
        cache=CacheConfig(num_blocks=max_rows * (arguments.context // BLOCK_SIZE + 20) + 600),
        parallel=ParallelConfig(tensor_parallel_size=arguments.tp),
        scheduler=SchedulerConfig(max_num_seqs=max_rows, max_num_prefill_tokens=most_tokens),
        device="cuda",
    )


def prepare_ranks(ranks: Ranks) -> int:
    """The number of blocks."""
    ranks.load()
    num_blocks, _ = ranks.allocate()
    loaded = ranks.loaded[0]
    peak = torch.cuda.max_memory_reserved() - loaded.weights_bytes - num_blocks * loaded.block_bytes
    print(f"GiB besides weights and cache: planned {loaded.activation_bytes / 2**30:.2f}, taken {peak / 2**30:.2f}")
    return num_blocks


def seconds(run: Callable[[], object], times: int) -> tuple[float, float]:
    """(median seconds between two of ``times`` runs by the device's clock, mean seconds that the host took each)."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    torch.cuda.synchronize()
    started = time.perf_counter()
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    host = (time.perf_counter() - started) / times
    torch.cuda.synchronize()
    periods = [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]
    return statistics.median(periods[times // 4 :]), host


def print_host_profile(run: Callable[[], object], times: int, top: int) -> None:
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(times):
        run()
    profile.disable()
    torch.cuda.synchronize()
    pstats.Stats(profile).sort_stats("tottime").print_stats(top)


def kernels(run: Callable[[], object], times: int) -> tuple[Counter[str], Counter[str]]:
    """Seconds and launches of a step by kernel name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(times):
            run()
        torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:  # type: ignore[attr-defined]
            spent[event.name] += event.device_time_total / 1e6 / times
            count[event.name] += 1
    return spent, Counter({name: round(number / times) for name, number in count.items()})


@torch.inference_mode()
def graph_seconds(worker: Worker, rows: int, prompts: list[int], times: int) -> float:
    runner = worker._runner
    assert isinstance(runner, DeviceRunner)
    shape = runner._shapes.of_rows(rows)
    if prompts:
        shape = runner._shapes.with_chunks(rows + sum(prompts), rows, len(prompts))
        if not runner._shapes.has(shape):
            return float("nan")
    return seconds(lambda: runner._padded.run(shape), times)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="llama3-8b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--context", type=int, default=640)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--top", type=int, default=14)
    parser.add_argument("--prompts", type=int, nargs="*", default=[])
    parser.add_argument("--layers", type=int, help="of the model, to fit a card that does not hold all")
    parser.add_argument("-q", choices=[name for name in WEIGHT_BYTES if name], help="quantise the weights")
    parser.add_argument("--host", action="store_true", help="also a profile of the thread that launches")
    parser.add_argument("--sampled", action="store_true", help="temperature 1 instead of greedy")
    parser.add_argument("-tp", type=int, default=1)
    arguments = parser.parse_args()
    max_rows = max(arguments.rows) + len(arguments.prompts)
    with tempfile.TemporaryDirectory() as folder, open_ranks(configure(folder, max_rows, arguments)) as ranks:
        show(ranks, prepare_ranks(ranks), arguments)


def show(ranks: Ranks, num_blocks: int, arguments: argparse.Namespace) -> None:
    name = torch.cuda.get_device_name()
    worker = ranks.worker
    bandwidth = next((value[0] for key, value in CEILINGS.items() if key in name), CEILINGS["H200"][0])
    print(f"{arguments.tp} x {name}, {arguments.model}, context {arguments.context}")
    for rows in arguments.rows:
        stepper = Stepper(ranks, rows, arguments.context, num_blocks)
        stepper.begin(SamplingParams() if arguments.sampled else SamplingParams(temperature=0.0))
        stepper.lengths = arguments.prompts
        period, host = seconds(stepper.decode, arguments.steps)
        alone = arguments.tp == 1
        graph = graph_seconds(worker, rows, arguments.prompts, arguments.steps) if alone else float("nan")
        spent, count = kernels(stepper.decode, 8)
        if arguments.host:
            print_host_profile(stepper.decode, 8, arguments.top)
        stepper.end()
        total = sum(spent.values())
        print(f"\n{rows} rows: {rows / period:,.0f} tokens/s; microseconds a step:")
        print(f"  period {period * 1e6:8.0f}   graph {graph * 1e6:8.0f}   kernels {total * 1e6:8.0f}", end="")
        print(f"   outside the graph {(period - graph) * 1e6:6.0f}   launch {host * 1e6:6.0f}")
        weights = worker._weights_bytes
        print(f"  weights alone would take {weights / bandwidth * 1e6:.0f}")
        for kernel, took in spent.most_common(arguments.top):
            print(f"  {took * 1e6:8.1f}  {count[kernel]:4d} x  {kernel[:90]}")


if __name__ == "__main__":
    main()
