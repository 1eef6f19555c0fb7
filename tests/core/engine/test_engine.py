"""The step loop over a group that the test plays: failures are told, forgotten and survived; hangs are not."""

from __future__ import annotations

import math
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import pytest

from aphro_core.channel import Channel
from aphro_core.config import SchedulerConfig
from aphro_core.engine.api_link import ApiLink
from aphro_core.engine.engine import Engine
from aphro_core.engine.step_watch import StepWatch
from aphro_core.errors import EngineDeadError, first_cause
from aphro_core.messages import codec
from aphro_core.messages.requests import (
    AddSequence,
    EnginePulse,
    EngineReady,
    FromEngine,
    ResumeEngine,
    StepFailed,
    StepOutputs,
    StopEngine,
    ToEngine,
)
from aphro_core.messages.steps import StepFailure, StepPlan, StepResult, WorkerLoaded
from aphro_core.request import SamplingParams
from aphro_core.scheduler.scheduler import Scheduler

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class FakeGroup:
    """Answers each plan with the tokens 1, 1, ..., or with a failure for sequences in ``broken``."""

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []
        self.broken: set[int] = set()
        self.hangs = False
        self.has_dumped = False
        self._send, self.results = anyio.create_memory_object_stream[StepResult](math.inf)
        self.ranks = [WorkerLoaded(0, os.getpid(), socket.gethostname(), "cpu", 1, 1, 1, 1, 1, 1)]

    async def allocate(self, num_blocks: int) -> None: ...

    async def dump_stacks(self) -> None:
        self.has_dumped = True

    async def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        rows = [row.seq_id for row in plan.scheduled]
        if self.hangs and any(rows):
            return
        failure = StepFailure("MemoryError: no", rows) if self.broken & set(rows) else None
        token_ids = [] if failure else [1 for row in plan.scheduled if row.samples]
        await self.answer(StepResult(plan.step_id, token_ids, failure=failure))

    async def answer(self, result: StepResult) -> None:
        await self._send.send(result)


def build_scheduler() -> Scheduler:
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64)
    return Scheduler(config, num_blocks=16, block_size=4, max_model_len=32)


@asynccontextmanager
async def running(group: FakeGroup, step_seconds: float = 30.0) -> AsyncIterator[Channel[ToEngine, FromEngine]]:
    async with running_with_door(group, step_seconds) as (api, _):
        yield api
        await api.send(StopEngine())


@asynccontextmanager
async def running_with_door(
    group: FakeGroup, step_seconds: float = 30.0
) -> AsyncIterator[tuple[Channel[ToEngine, FromEngine], socket.socket]]:
    """Its first API process's end, and the way in for the next one's."""
    ours, theirs = socket.socketpair()
    door, its_door = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    api: Channel[ToEngine, FromEngine] = await Channel.over(ours, codec.api_side_of_engine())
    engine_end = await Channel[FromEngine, ToEngine].over(theirs, codec.engine_side_of_api())
    watch = StepWatch(step_seconds, step_seconds, anyio.current_time)
    link = ApiLink(engine_end, its_door)
    engine = Engine(link, group, build_scheduler, watch)

    async def announce() -> None:
        await link.send(EngineReady(16, 32, group.ranks))

    with door, its_door:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(engine.run, announce)
            await next_of(api, EngineReady)
            yield api, door
    await api.aclose()
    await engine_end.aclose()


async def next_of(api: Channel[ToEngine, FromEngine], kind: type[FromEngine]) -> FromEngine:
    with anyio.fail_after(5):
        while True:
            message = await api.receive()
            if isinstance(message, kind):
                return message


async def outputs_until(
    api: Channel[ToEngine, FromEngine], is_enough: Callable[[dict[int, list[int]]], bool]
) -> dict[int, list[int]]:
    got: dict[int, list[int]] = {}
    while not is_enough(got):
        message = await next_of(api, StepOutputs)
        assert isinstance(message, StepOutputs)
        for output in message.gains.outputs:
            got.setdefault(output.seq_id, []).extend(output.token_ids)
        for seq_id, token_id in zip(message.gains.seq_ids, message.gains.token_ids, strict=True):
            got.setdefault(seq_id, []).append(token_id)
    return got


def add(seq_id: int, max_tokens: int = 4, outputs: tuple[int, ...] = ()) -> AddSequence:
    return AddSequence(seq_id, [5, 6, 7], SamplingParams(), 0, max_tokens, [], list(outputs))


async def test_the_group_is_tried_out_before_it_is_announced() -> None:
    group = FakeGroup()
    async with running(group):
        assert {row.seq_id for plan in group.plans for row in plan.scheduled} == {0}
        assert group.plans[-1].released == [0]


async def test_a_group_that_cannot_compute_is_not_announced() -> None:
    group = FakeGroup()
    group.broken = {0}
    with pytest.raises(BaseExceptionGroup) as caught:
        async with running(group):
            pass
    assert "a trial step failed: MemoryError" in str(first_cause(caught.value))


async def test_after_a_failed_step_everything_is_forgotten_and_told_again() -> None:
    group = FakeGroup()
    async with running(group) as api:
        await api.send(add(1, max_tokens=20))
        await outputs_until(api, bool)
        group.broken = {2}
        await api.send(add(2))
        failed = await next_of(api, StepFailed)
        assert isinstance(failed, StepFailed)
        assert set(failed.seq_ids) in ({2}, {1, 2}), "whoever was in the step"
        (forgets,) = [at for at, plan in enumerate(group.plans) if plan.forgets_all]
        assert {row.seq_id for plan in group.plans[forgets:] for row in plan.scheduled} <= {0}, "then it is tried out"
        await api.send(add(3))  # from a sender who does not know yet
        await api.send(ResumeEngine())
        await api.send(add(1, max_tokens=6, outputs=(1, 1)))
        got = await outputs_until(api, lambda got: len(got.get(1, [])) == 4)
        assert got == {1: [1] * 4}


async def test_a_sequence_that_has_all_its_tokens_is_answered() -> None:
    async with running(FakeGroup()) as api:
        await api.send(add(1, max_tokens=2, outputs=(1, 1)))
        message = await next_of(api, StepOutputs)
        assert isinstance(message, StepOutputs)
        assert [(output.seq_id, output.finish_reason) for output in message.gains.outputs] == [(1, "length")]


async def test_a_step_that_does_not_end_is_a_hang_and_its_sequences_are_known() -> None:
    group = FakeGroup()
    with pytest.raises(BaseExceptionGroup) as caught:  # noqa: PT012
        async with running(group, step_seconds=0.3) as api:
            group.hangs = True
            await api.send(add(7))
            await anyio.sleep(3)
    error = first_cause(caught.value)
    assert isinstance(error, EngineDeadError)
    assert "rank 0 on" in error.message
    assert "hangs: a step has not ended within" in error.message
    assert group.has_dumped


async def test_pulses_come_while_a_step_computes() -> None:
    group = FakeGroup()
    async with running(group) as api:
        group.hangs = True
        await api.send(add(7))
        for _ in range(3):
            await next_of(api, EnginePulse)
        os.sched_yield()


async def next_api(door: socket.socket) -> Channel[ToEngine, FromEngine]:
    ours, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(door, [b"channel"], [theirs.fileno()])
    return await Channel[ToEngine, FromEngine].over(ours, codec.api_side_of_engine())


async def test_an_engine_outlives_its_api_process_and_forgets_what_that_had_asked() -> None:
    group = FakeGroup()
    async with running_with_door(group) as (first, door):
        api = first
        for number in range(3):
            await api.send(add(1, max_tokens=20))
            await outputs_until(api, bool)
            await api.aclose()
            api = await next_api(door)
            with anyio.fail_after(5):
                while not isinstance(message := await api.receive(), EngineReady):
                    assert isinstance(message, EnginePulse), "nothing of the requests of the one that died"
            assert sum(plan.forgets_all for plan in group.plans) == number + 1
            await api.send(add(1, max_tokens=2))  # which counts its sequences anew
            assert await outputs_until(api, lambda got: len(got.get(1, [])) == 2) == {1: [1, 1]}
        await api.send(StopEngine())
        await anyio.lowlevel.checkpoint()


async def test_a_step_that_fails_while_there_is_no_api_process_is_nobodys() -> None:
    group = FakeGroup()
    async with running_with_door(group) as (first, door):
        group.hangs = True
        await first.send(add(1, max_tokens=20))
        while not any(row.seq_id for plan in group.plans for row in plan.scheduled):
            await next_of(first, EnginePulse)
        await first.aclose()
        plan = next(plan for plan in group.plans if any(row.seq_id for row in plan.scheduled))
        group.hangs = False
        await group.answer(StepResult(plan.step_id, [], failure=StepFailure("MemoryError: no", [1])))
        api = await next_api(door)
        with anyio.fail_after(5):
            while not isinstance(message := await api.receive(), EngineReady):
                assert isinstance(message, EnginePulse)
        await api.send(add(1, max_tokens=2))
        assert await outputs_until(api, lambda got: len(got.get(1, [])) == 2) == {1: [1, 1]}
        await api.send(StopEngine())


async def test_without_any_api_process_an_engine_ends() -> None:
    with pytest.raises(BaseExceptionGroup) as caught:  # noqa: PT012
        async with running_with_door(FakeGroup()) as (api, door):
            await api.aclose()
            door.close()
            await anyio.sleep(5)
    assert "no other one has taken its engine over" in str(first_cause(caught.value))


class BusyGroup(FakeGroup):
    """Once it is busy nothing is answered but by the test, and the third step takes for ever to launch."""

    is_busy = False

    async def submit(self, plan: StepPlan) -> None:
        if not self.is_busy:
            await super().submit(plan)
            return
        self.plans.append(plan)
        if len(self.plans) == 3:
            await anyio.sleep_forever()


async def test_an_answer_is_told_before_the_next_step_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another step is in flight: that one computes meanwhile."""

    def runs_ahead() -> Scheduler:
        config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64)
        return Scheduler(config, num_blocks=16, block_size=4, max_model_len=32, max_in_flight=2, run_ahead=1)

    monkeypatch.setattr(sys.modules[__name__], "build_scheduler", runs_ahead)
    group = BusyGroup()
    async with running(group) as api:
        group.is_busy, group.plans = True, []
        await api.send(add(1, max_tokens=20))
        with anyio.fail_after(5):
            while len(group.plans) < 2:
                await anyio.lowlevel.checkpoint()
        await group.answer(StepResult(group.plans[0].step_id, [1]))
        assert await outputs_until(api, bool) == {1: [1]}


async def test_many_commands_at_once_do_not_keep_steps_from_being_launched() -> None:
    async with running(FakeGroup()) as api:
        await api.send(add(1, max_tokens=25))
        await outputs_until(api, bool)
        await api._stream.send(b"".join(api._codec.encode(add(seq_id)) for seq_id in range(2, 202)))
        waiting = []
        while not waiting or waiting[-1] < 150:
            message = await next_of(api, StepOutputs)
            assert isinstance(message, StepOutputs)
            waiting.append(message.stats.num_waiting)
        assert len(set(waiting)) > 5, waiting
