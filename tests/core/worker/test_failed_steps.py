"""A step that fails on one rank of a group at any of its operations, with steps ahead of it: no wrong token, ever.

Ranks are real workers over Gloo, with the CPU's runner and with the GPU's. What a rank has to say of a step of which
others know nothing (no token is drawn of it, or it failed behind the last sum) counts from the next one on.

``STEP_FAULTS=60`` meets more of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from aphro_core.config import EngineConfig, ModelConfig, ParallelConfig
from aphro_core.distributed.links import Links
from aphro_core.distributed.stage_lines import token_link
from aphro_core.messages.steps import StartWorker, StepPlan, StepResult
from aphro_core.request import SamplingParams
from aphro_core.worker.step import LaunchedStep
from aphro_core.worker.worker import Worker
from tests.core.ranks import run_ranks
from tests.core.worker.one_rank import Planner, build_runner, sharding_plan
from tests.core.worker.test_device_runner import device_runner
from tests.core.worker.test_model_runner import Model

_GREEDY = SamplingParams(temperature=0.0)
_LONG, _SHORT = 4, 3  # of the model's prompts: 40 tokens and 15
_NUM_FAULTS = int(os.environ.get("STEP_FAULTS", "3"))  # of each plan, spread over its operations


class FailAt(TorchDispatchMode):
    """No memory for the operation of this number, counted from 0; None: counts only."""

    def __init__(self, number: int | None) -> None:
        super().__init__()
        self._number, self.count = number, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count - 1 == self._number:
            raise MemoryError(f"a fault in {func}")
        return func(*args, **(kwargs or {}))


class History:
    """The plans of two sequences, one of them with a prompt in three steps, in one of which it may have a single token,
    and the tokens that they are to get."""

    def __init__(self, model: Model, *, is_ahead: bool) -> None:
        self._model, self._is_ahead, self._planner = model, is_ahead, Planner()

    def plans(self, first_id: int) -> list[StepPlan]:
        planner, ids, third = self._planner, (first_id, first_id + 1), 1 if first_id // 10_000 % 2 else 16
        planner.add(ids[0], self._model.prompts[_SHORT], _GREEDY)
        plans = []
        for step in range(6):
            if step == 2:
                planner.add(ids[1], self._model.prompts[_LONG], SamplingParams(temperature=0.0, prompt_logprobs=0))
            shares = {ids[0]: 1 if step else planner.remaining(ids[0])}
            if step >= 2:
                shares[ids[1]] = {2: 16, 3: third, 4: 24 - third}.get(step, 1)
            if step == 3:
                del shares[ids[0]]  # a step that draws nothing
            plans.append(planner.plan(shares))
            for entry in plans[-1].scheduled:
                if entry.samples:
                    self._draw(entry.seq_id, entry.seq_id - first_id)
        return plans

    def _draw(self, seq_id: int, which: int) -> None:
        tokens = self._planner.tokens[seq_id]
        tokens.append(self._model.tokens[(_SHORT, _LONG)[which]][len(tokens)])
        self._planner._known_tokens[seq_id] += self._is_ahead

    def forget(self, first_id: int) -> StepPlan:
        for seq_id in (first_id, first_id + 1):
            self._planner.release(seq_id)
        self._planner._released = []
        return StepPlan(step_id=0, scheduled=[], forgets_all=True)

    def expected(self, plans: Sequence[StepPlan], first_id: int) -> list[list[int]]:
        starts = [len(self._model.prompts[which]) for which in (_SHORT, _LONG)]
        told = []
        for plan in plans:
            drawn = [entry for entry in plan.scheduled if entry.samples]
            tokens = [self._model.tokens[(_SHORT, _LONG)[e.seq_id - first_id]][e.start + e.num_tokens] for e in drawn]
            told.append(tokens)
        assert sum(map(len, told)) > 6
        assert starts == [15, 40]
        return told


def worker_of(links: Links, rank: int, tp: int, pp: int, runner: Any, shard: Any) -> Worker:
    model = ModelConfig(path="", served_name="", dtype="float32", max_model_len=128)
    parallel = ParallelConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp)
    worker = Worker(StartWorker(EngineConfig(model=model, parallel=parallel), rank, rank, "", 0), lambda _: None)
    worker._links, worker._shard, worker._runner = links, shard, runner
    return worker


def run_plans(worker: Worker, plans: Sequence[StepPlan], at: int, fault: FailAt) -> list[StepResult | None]:
    """Results are read at the end, where they may be."""
    steps: list[LaunchedStep | None] = []
    for number, plan in enumerate(plans):
        if number == at:
            with fault:
                steps.append(worker.launch(plan))
        else:
            steps.append(worker.launch(plan))
        worker.settle()
    return [None if step is None else step.result() for step in steps]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("way", "tp", "pp", "broken"),
    [("cpu", 2, 1, 1), ("cpu", 2, 2, 1), ("gpu", 2, 1, 0), ("gpu", 2, 1, 1), ("gpu", 1, 2, 0), ("gpu", 2, 2, 3)],
)
def test_no_wrong_token_after_a_fault_at_any_operation(
    model: Model, tmp_path: Path, way: str, tp: int, pp: int, broken: int
) -> None:
    sharding = sharding_plan(model.folder, tp, pp)

    def rank_of_group(links: Links, rank: int) -> Any:
        runner: Any
        if way == "cpu":
            runner = build_runner(model.folder, sharding, rank, links)
        else:
            if pp > 1:
                links = replace(links, tokens=token_link(sharding, rank))
            runner = device_runner(model, links, tp, pp, rank)
        worker = worker_of(links, rank, tp, pp, runner, sharding.ranks[rank])
        history = History(model, is_ahead=way == "gpu")
        return [one for at in range(6) for one in _faults_of_plan(worker, history, at, is_broken=rank == broken)]

    answers = run_ranks(tmp_path, sharding, rank_of_group, answer_seconds=30.0 * (1 + _NUM_FAULTS))
    judge(answers[tp * (pp - 1)], answers[broken])


def _faults_of_plan(worker: Worker, history: History, at: int, *, is_broken: bool) -> list[Any]:
    found = []
    count = 0
    for number in range(-1, _NUM_FAULTS):
        first_id = 10 * (1000 * at + number + 2)
        plans = history.plans(first_id)
        where = None if number < 0 else number * count // _NUM_FAULTS
        fault = FailAt(where if is_broken else None)
        results = run_plans(worker, plans, at, fault)
        count = count or fault.count
        found.append((results, history.expected(plans, first_id), f"operation {where} of plan {at}", number >= 0))
        worker.launch(history.forget(first_id))
        worker.settle()
    return found


def judge(spoken: list[Any], broken: list[Any]) -> None:
    num_late = 0
    for (results, expected, where, is_faulty), (own, _, _, _) in zip(spoken, broken, strict=True):
        reported = [result.step_id for result in own if result is not None and result.failure is not None]
        assert bool(reported) == is_faulty, where
        told = [None if result.failure else result.token_ids for result in results]
        first = told.index(None) if None in told else len(told)
        assert told[:first] == expected[:first], f"{where}: {told} instead of {expected}"
        if is_faulty:
            failed = next(number for number, result in enumerate(results) if result.step_id == reported[0])
            num_late += first > failed
            assert first <= failed + 2, f"{where}: it shows two steps later at most, where one draws nothing"
    assert num_late < len(spoken) / 3
