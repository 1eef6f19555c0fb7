"""A step that fails on one rank of a group, before any of its collectives: it ends on all, and tells no token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aphro_core.distributed.links import Links
from aphro_core.messages.steps import StepPlan
from aphro_core.request import SamplingParams
from aphro_core.worker.device_runner import DeviceRunner
from aphro_core.worker.step import SamplingError
from tests.core.ranks import run_ranks
from tests.core.worker.one_rank import Planner, build_runner, sharding_plan
from tests.core.worker.test_device_runner import device_runner
from tests.core.worker.test_model_runner import Model
from tests.tiny import write_tiny_checkpoint

_CALLS = ("all_reduce_", "gather_columns", "broadcast_", "receive", "send")


@contextmanager
def failing(links: Links, at: int | None) -> Iterator[None]:
    """The ``at``-th collective of the block is not reached: something raises just before."""
    count = 0

    def wrap(inner: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count - 1 == at:
                raise RuntimeError("a fault")
            return inner(*arguments)

        return call

    places = [(links.tensor, name) for name in _CALLS[:3]] + [(links.stage, name) for name in _CALLS[3:]]
    for place, name in places:
        setattr(place, name, wrap(getattr(place, name)))
    try:
        yield
    finally:
        for place, name in places:
            delattr(place, name)


def step_of_three(planner: Planner, first_id: int) -> StepPlan:
    """Two sequences that were begun go on, one begins and wants to know its prompt's log-probabilities."""
    for seq_id in (first_id, first_id + 1):
        planner.add(seq_id, [3 + seq_id % 2, 5, 8, 13, 21, 34])
    planner.add(first_id + 2, list(range(7, 30)), SamplingParams(temperature=0.0, prompt_logprobs=1))
    return planner.plan({first_id: 6, first_id + 1: 6, first_id + 2: 23})


@pytest.mark.parametrize(
    ("family", "tp", "pp", "broken"),
    [("mixtral", 2, 1, 1), ("llama", 2, 2, 1), ("llama", 2, 2, 2)],
)
def test_a_step_that_fails_on_one_rank_ends_on_all(tmp_path: Path, family: str, tp: int, pp: int, broken: int) -> None:
    write_tiny_checkpoint(tmp_path, family)
    sharding = sharding_plan(tmp_path, tp, pp)
    num_faults = 7

    def rank_of_group(links: Links, rank: int) -> Any:
        runner, planner = build_runner(tmp_path, sharding, rank, links), Planner()
        found = []
        for at in range(num_faults):
            for fault in (at if rank == broken else None, None):
                plan = step_of_three(planner, 10 * len(found))
                links.begin_step()
                with failing(links, fault):
                    try:
                        result = runner.execute(plan)
                        found.append(None if result is None else result.token_ids)
                    except SamplingError:
                        found.append("no token")
                    except RuntimeError as error:
                        found.append("failed" if str(error) == "a fault" else str(error))
                if found[-1] == "failed":
                    runner.settle(plan)
                for entry in plan.scheduled:
                    planner.release(entry.seq_id)
        return found

    answers = run_ranks(tmp_path, sharding, rank_of_group)
    speaks = answers[tp * (pp - 1)]
    sound = speaks[1::2]
    assert all(len(tokens) == 3 and tokens == sound[0] for tokens in sound), "a step after a failed one is as any other"
    num_failed = answers[broken][0::2].count("failed")
    assert num_failed >= 3
    for spoken, own in zip(speaks[0::2], answers[broken][0::2], strict=True):
        assert spoken == (sound[0] if own != "failed" else "failed" if broken == tp * (pp - 1) else "no token")


@pytest.mark.parametrize("broken", [0, 1])
def test_a_step_that_fails_on_one_gpu_rank_ends_on_all(tmp_path: Path, broken: int) -> None:
    """The GPU's way, on CPU tensors: prompts, then decode steps of padded rows; tokens are told by tp rank 0."""
    model = Model("llama", tmp_path)

    def rank_of_group(links: Links, rank: int) -> Any:
        runner, planner = device_runner(model, links, tp=2, rank=rank), Planner()
        found: list[tuple[Any, Any]] = []
        for at in range(1, 16, 3):
            for fault in (at if rank == broken else None, None):
                ids = [10 * len(found), 10 * len(found) + 1]
                for seq_id in ids:
                    planner.add(seq_id, [3, 5, 8, 13, 21, 34], SamplingParams(temperature=0.0))
                steps = [planner.plan({ids[0]: 5, ids[1]: 6}), planner.plan({ids[0]: 1})]
                with failing(links, fault):
                    found.append(tuple(launched(runner, links, plan) for plan in steps))
                for seq_id in ids:
                    planner.release(seq_id)
        return found

    answers = run_ranks(tmp_path, sharding_plan(tmp_path, 2, 1), rank_of_group)
    sound = answers[0][1::2]
    assert all(steps == sound[0] and None not in steps for steps in sound)
    failed = [steps for steps in answers[broken][0::2] if "failed" in steps]
    assert len(failed) >= 4
    for told, own in zip(answers[0][0::2], answers[broken][0::2], strict=True):
        assert told == sound[0] or "failed" in own
        assert all(
            tokens == right or tokens in ("failed", "no token") for tokens, right in zip(told, sound[0], strict=True)
        )


def launched(runner: DeviceRunner, links: Links, plan: StepPlan) -> Any:
    links.begin_step()
    try:
        step = runner.launch(plan)
    except RuntimeError as error:
        runner.settle(plan)
        return "failed" if str(error) == "a fault" else str(error)
    if step is None:
        return "not told"
    result = step.result()
    return "no token" if result.failure else result.token_ids
