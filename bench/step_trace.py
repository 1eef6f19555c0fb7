"""What the steps of a whole scenario are, and where its seconds go: in mixed steps, in others, or between them.

    python bench/step_trace.py [--model llama3-8b] [--scenarios S3 S5] [--rounds 1] [--json FILE]
                               [--sizes '{"max_num_batched_tokens": 2048}' ...] [-tp 2]

The real scheduler and workers with dummy weights, driven as the engine does it (up to two plans in flight, answers on
another thread) but without an API process: what bench/scenarios.py takes beyond this is that. With ``-tp`` the times
are those of rank 0, whose thread plans as well. Of each step:
rows that decode, their context, prompt tokens, the GPU's time by events, what it waited before it, and what the host's
thread took to plan and to launch it; "allocations" are those of the driver's memory, which wait for the GPU. "At the
limits": the larger of the weights' bytes and the FLOPs of the rows, and the bytes of K and V, one after the other.
``--sizes``: fields of SchedulerConfig, once or more; each is a run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import torch
from ranks import Ranks, open_ranks
from workloads import CEILINGS, MODELS, SCENARIOS, requests

from aphro_core.config import EngineConfig, SchedulerConfig
from aphro_core.messages.requests import AddSequence
from aphro_core.messages.steps import StepPlan, StepResult
from aphro_core.parallel.memory import kv_block_bytes
from aphro_core.prepare import EngineOptions, Prepared, prepare
from aphro_core.reporter import SilentReporter
from aphro_core.request import SamplingParams
from aphro_core.scheduler.scheduler import Scheduler
from aphro_core.worker.results import Results

_SHARES = (0, 50, 90, 99)  # percentiles of the steps' time


@dataclass
class Step:
    """Seconds and tokens. ``gap``: between the end of the step before and the beginning of this one, on the GPU."""

    rows: int
    context: int
    prompts: list[tuple[int, int]]  # start, tokens
    planning: float
    launch: float
    allocations: int = 0
    gpu: float = 0.0
    gap: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        return sum(tokens for _, tokens in self.prompts)


class Lengths:
    """How many tokens of each sequence are computed, as far as plans were handed out."""

    def __init__(self) -> None:
        self._computed: dict[int, int] = {}
        self._rows: list[int] = []

    def read(self, plan: StepPlan) -> tuple[int, int, list[tuple[int, int]]]:
        """(rows that decode, their context, start and tokens of each chunk)."""
        prompts = []
        if plan.again is not None:
            for index in reversed(plan.again.without):
                del self._rows[index]
        else:
            self._rows = [entry.seq_id for entry in plan.scheduled if entry.num_tokens == 1]
            prompts = [(entry.start, entry.num_tokens) for entry in plan.scheduled if entry.num_tokens > 1]
            self._computed |= {entry.seq_id: entry.start for entry in plan.scheduled}
        for seq_id in self._rows:
            self._computed[seq_id] += 1
        return len(self._rows), sum(self._computed[seq_id] for seq_id in self._rows), prompts


class Traced:
    """Workers that are ready for any number of runs."""

    def __init__(self, prepared: Prepared, ranks: Ranks) -> None:
        self.config: EngineConfig = prepared.config
        self.ranks = ranks
        ranks.load()
        self.num_blocks, self.max_model_len = ranks.allocate()
        self.vocab_size = prepared.spec.vocab_size
        element = 2  # bytes
        shard = prepared.plan.ranks[0]
        self.kv_bytes = kv_block_bytes(prepared.spec, shard, 1, element)  # of a token, on one rank
        head_bytes = len(shard.vocab) * prepared.spec.hidden_size * element
        embedding = 0 if prepared.spec.tie_word_embeddings else head_bytes
        self.weights_bytes = ranks.loaded[0].weights_bytes - embedding  # read in each step, the head included
        self.head_bytes = head_bytes

    def run(self, scenario: str, repeat: int, scheduling: SchedulerConfig) -> tuple[float, list[Step], list[float]]:
        """Seconds of the whole, its steps, and the seconds between two tokens of a stream."""
        scheduler = Scheduler(
            scheduling,
            num_blocks=self.num_blocks,
            block_size=self.config.cache.block_size,
            max_model_len=self.max_model_len,
            max_in_flight=1 + self.config.run_ahead,
            run_ahead=self.config.run_ahead,
            enable_prefix_caching=False,
        )
        asked = requests(scenario, self.vocab_size, repeat)
        for number, (prompt, max_tokens) in enumerate(asked, 1):
            sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
            scheduler.add(AddSequence(number, prompt, sampling, seed=0, max_tokens=max_tokens, stop_token_ids=[]))
        return _drive(self.ranks, scheduler)


def _drive(worker: Ranks, scheduler: Scheduler) -> tuple[float, list[Step], list[float]]:
    answers: SimpleQueue[StepResult | BaseException] = SimpleQueue()
    steps: list[Step] = []
    marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    drawing: deque[list[int]] = deque()  # of the plans in flight: whose tokens they draw
    seen: dict[int, float] = {}
    between: list[float] = []
    lengths = Lengths()
    allocations = torch.cuda.memory_stats()["num_device_alloc"]
    started = time.perf_counter()
    with Results(answers.put, answers.put, worker.worker.enter_thread) as waiting:
        while True:
            before = time.perf_counter()
            while plan := scheduler.schedule():
                planned = time.perf_counter()
                mark = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                mark[0].record()
                step = worker.launch(plan)
                mark[1].record()
                assert step is not None
                waiting.put(step)
                marks.append(mark)
                read = lengths.read(plan)
                draws = [entry.seq_id for entry in plan.scheduled if entry.samples]
                drawing.append(lengths._rows.copy() if plan.again is not None else draws)
                steps.append(Step(*read, planned - before, time.perf_counter() - planned))
                allocated = torch.cuda.memory_stats()["num_device_alloc"] if read[2] else allocations
                steps[-1].allocations, allocations = allocated - allocations, allocated
                before = time.perf_counter()
            if not scheduler.has_work:
                break
            answer = answers.get()
            if isinstance(answer, BaseException):
                raise answer
            now = time.perf_counter()
            for seq_id in drawing.popleft():
                if seq_id in seen:
                    between.append(now - seen[seq_id])
                seen[seq_id] = now
            scheduler.update(answer)
        took = time.perf_counter() - started
    torch.cuda.synchronize()
    for index, (step_, (begin, end)) in enumerate(zip(steps, marks, strict=True)):
        step_.gpu = begin.elapsed_time(end) / 1e3
        step_.gap = marks[index - 1][1].elapsed_time(begin) / 1e3 if index else 0.0
    return took, steps, between


def report(name: str, traced: Traced, took: float, steps: list[Step], between: list[float], tokens: int) -> None:
    bandwidth, flops = next((value for key, value in CEILINGS.items() if key in name), CEILINGS["H200"])

    def at_limits(step: Step) -> float:
        rows = step.rows + step.prompt_tokens
        body = (traced.weights_bytes - traced.head_bytes) * rows  # 2 FLOPs a parameter, which has 2 bytes
        products = max(traced.weights_bytes / bandwidth, (body + traced.head_bytes * step.rows) / flops)
        return products + step.context * traced.kv_bytes / bandwidth

    ordered = sorted(between)
    p99 = ordered[len(ordered) * 99 // 100] if ordered else 0.0
    print(f"{took:.3f} s, {tokens / took:,.0f} tokens/s, ITL p99 {1e3 * p99:.1f} ms; {len(steps)} steps")
    print(
        "  | steps | GPU s | at the limits s | gaps s | planning ms | launch ms, most | allocations | rows | "
        "prompt tokens | us a row | GPU ms least, p50, p90, p99"
    )
    kinds = {
        "mixed": [step for step in steps if step.prompts and step.rows],
        "prompts only": [step for step in steps if step.prompts and not step.rows],
        **{
            f"decode, {low}-{high} rows": [one for one in steps if not one.prompts and low <= one.rows <= high]
            for low, high in ((1, 64), (65, 128), (129, 256), (257, 384), (385, 512))
        },
    }
    for kind, of_kind in kinds.items():
        if not of_kind:
            continue
        count, gpu = len(of_kind), sum(step.gpu for step in of_kind)
        rows, prompt = sum(step.rows for step in of_kind), sum(step.prompt_tokens for step in of_kind)
        times = sorted(step.gpu * 1e3 for step in of_kind)
        values = [
            f"{count} | {gpu:.3f} | {sum(map(at_limits, of_kind)):.3f} | {sum(step.gap for step in of_kind):.3f}",
            f"{1e3 * sum(step.planning for step in of_kind) / count:.2f}",
            f"{1e3 * sum(step.launch for step in of_kind) / count:.2f}, {1e3 * max(one.launch for one in of_kind):.0f}",
            f"{sum(step.allocations for step in of_kind)}",
            f"{rows / count:.0f} | {prompt / count:.0f} | {1e6 * gpu / (rows + prompt):.1f}",
            " ".join(f"{times[len(times) * share // 100]:.1f}" for share in _SHARES),
        ]
        print(f"  {kind:22} | {' | '.join(values)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="llama3-8b")
    parser.add_argument("--scenarios", nargs="+", choices=list(SCENARIOS), default=["S3", "S5"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", default=["{}"], help="fields of SchedulerConfig as JSON")
    parser.add_argument("--json", help="file that gets every step")
    parser.add_argument("-tp", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[arguments.model]))
        asked = EngineOptions(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            tensor_parallel_size=arguments.tp,
        )
        prepared = prepare(asked, SilentReporter())
        with open_ranks(prepared.config) as ranks:
            trace(arguments, Traced(prepared, ranks))


def trace(arguments: argparse.Namespace, traced: Traced) -> None:
    name = torch.cuda.get_device_name()
    traced.run("S2", -1, traced.config.scheduler)
    kept: list[dict[str, Any]] = []
    for scenario in arguments.scenarios:
        tokens = sum(len(p) if SCENARIOS[scenario].is_prefill else n for p, n in requests(scenario, 4096, 0))
        for sizes in arguments.sizes:
            changed = msgspec.structs.replace(traced.config.scheduler, **json.loads(sizes))
            for repeat in range(arguments.rounds):
                took, steps, between = traced.run(scenario, repeat, changed)
                print(f"\n{arguments.tp} x {name}, {arguments.model}, {scenario}, {sizes}: ", end="")
                report(name, traced, took, steps, between, tokens)
                kept.append({"scenario": scenario, "sizes": sizes, "seconds": took, "steps": list(map(asdict, steps))})
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"card": name, "model": arguments.model, "runs": kept}) + "\n")


if __name__ == "__main__":
    main()
