"""A step that fails on one rank of a group, before any of its collectives: it ends on all, and tells no token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aphro_core.distributed import Links
from aphro_core.messages.steps import StepPlan
from aphro_core.request import SamplingParams
from aphro_core.worker.step import SamplingError
from tests.core.ranks import run_ranks
from tests.core.worker.one_rank import Planner, build_runner, sharding_plan
from tests.tiny import write_tiny_checkpoint

_CALLS = ("all_reduce_", "gather_columns", "receive", "send")


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

    places = [(links.tensor, name) for name in _CALLS[:2]] + [(links.stage, name) for name in _CALLS[2:]]
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
    [
        ("llama", 2, 1, 0),
        ("llama", 2, 1, 1),
        ("mixtral", 2, 1, 1),
        ("llama", 1, 2, 0),
        ("llama", 2, 2, 1),
        ("llama", 2, 2, 3),
    ],
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
                        found.append(None if result is None else [token.token_id for token in result.sampled])
                    except SamplingError:
                        found.append("no token")
                    except RuntimeError as error:
                        found.append("failed" if str(error) == "a fault" else str(error))
                if found[-1] == "failed":
                    assert runner.settle(plan)
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
