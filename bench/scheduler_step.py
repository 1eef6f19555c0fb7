"""What the scheduler costs a step: microseconds for schedule and update, by running rows, decoding in a steady state.

    python bench/scheduler_step.py [--steps 300] [--max-in-flight 1] [--run-ahead 0]

Blocks of 16 tokens, prefix cache on; sequences begin at different lengths, so that block borders are spread over the
steps as in service. Medians over the steps. The budget is 150 us and 3 us a running row for the whole engine thread, of
which scheduling is a part. With ``--max-in-flight`` a step has an even part of the rows.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections import deque

from aphro_core.config import SchedulerConfig
from aphro_core.messages.requests import AddSequence
from aphro_core.messages.steps import StepPlan, StepResult
from aphro_core.request import SamplingParams
from aphro_core.scheduler.scheduler import Scheduler

ROWS = (1, 32, 256, 512)
BLOCK_SIZE = 16


def build(num_rows: int, num_steps: int, max_in_flight: int, run_ahead: int) -> Scheduler:
    """A scheduler with ``num_rows`` sequences that will decode for at least ``num_steps`` rows each."""
    max_model_len = 64 + BLOCK_SIZE + num_steps + 8
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=num_rows, max_num_batched_tokens=num_rows * 128),
        num_blocks=num_rows * (max_model_len // BLOCK_SIZE + 2),
        block_size=BLOCK_SIZE,
        max_model_len=max_model_len,
        max_in_flight=max_in_flight,
        run_ahead=run_ahead,
    )
    for seq_id in range(num_rows):
        scheduler.add(
            AddSequence(
                seq_id=seq_id,
                prompt_token_ids=[seq_id] * (64 + seq_id % BLOCK_SIZE),
                sampling=SamplingParams(max_tokens=None),
                seed=seq_id,
                max_tokens=max_model_len,
                stop_token_ids=[2],
            )
        )
    return scheduler


def answer(plan: StepPlan) -> StepResult:
    num_tokens = plan.again.num_rows if plan.again else sum(row.samples for row in plan.scheduled)
    return StepResult(plan.step_id, [7] * num_tokens)


def measure(num_rows: int, num_steps: int, max_in_flight: int, run_ahead: int) -> tuple[int, float, float]:
    """Rows in a step, and the microseconds that it takes in schedule() and in update()."""
    scheduler = build(num_rows, num_steps, max_in_flight, run_ahead)
    plans: deque[StepPlan] = deque()
    samples: list[tuple[int, float, float]] = []
    gc.collect()
    gc.disable()
    while len(samples) < num_steps:
        started = time.perf_counter()
        plan = scheduler.schedule()
        spent_schedule = time.perf_counter() - started
        if plan is not None:
            plans.append(plan)
            if len(plans) < max_in_flight and scheduler.stats().num_waiting:
                continue  # the pipeline fills
        oldest = plans.popleft()
        result = answer(oldest)
        started = time.perf_counter()
        scheduler.update(result)
        spent_update = time.perf_counter() - started
        if plan is not None and not plan.new and not oldest.new:
            samples.append((plan.num_rows, spent_schedule, spent_update))
    gc.enable()
    rows, schedule, update = (statistics.median(column) for column in zip(*samples, strict=True))
    return int(rows), schedule * 1e6, update * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--max-in-flight", type=int, default=1)
    parser.add_argument("--run-ahead", type=int, default=0, help="of those in flight: 1 as on a GPU")
    args = parser.parse_args()
    print(f"{'running':>8} {'rows a step':>12} {'schedule us':>12} {'update us':>10} {'us a row':>9} {'budget us':>10}")
    for num_running in ROWS:
        rows, schedule, update = measure(num_running, args.steps, args.max_in_flight, args.run_ahead)
        per_row, budget = (schedule + update) / rows, 150 + 3 * num_running
        print(f"{num_running:8} {rows:12} {schedule:12.1f} {update:10.1f} {per_row:9.2f} {budget:10}")


if __name__ == "__main__":
    main()
