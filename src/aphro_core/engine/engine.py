"""The step loop: commands in, schedule, execute, update, tokens out; a step that failed is told and forgotten."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import anyio
from anyio.abc import TaskGroup

from aphro_core.channel import ChannelClosedError
from aphro_core.engine.api_link import ApiLink
from aphro_core.engine.progress import Progress, describe_hang
from aphro_core.engine.step_watch import StepWatch
from aphro_core.engine.trial import trial_steps
from aphro_core.errors import EngineDeadError, RequestError
from aphro_core.executor.executor import Executor
from aphro_core.messages.requests import (
    AbortSequences,
    AddSequence,
    EnginePulse,
    Gains,
    ResumeEngine,
    SequenceOutput,
    StartEngine,
    StepFailed,
    StepOutputs,
    StopEngine,
)
from aphro_core.messages.steps import StepFailure, StepPlan, StepResult
from aphro_core.scheduler.scheduler import Scheduler

_PULSE_SECONDS: Final = 0.25
_AT_ONCE: Final = 8  # commands that are taken before answers are looked for
_STACKS_SECONDS: Final = 0.3  # for the ranks of a group that hangs to write their stacks


class Engine:
    """Drives one scheduler over one group of workers, for the API process at the other end of ``api``.

    When that dies, its requests are forgotten, and the engine goes on for the next one.
    """

    def __init__(
        self,
        api: ApiLink,
        executor: Executor,
        build_scheduler: Callable[[], Scheduler],
        watch: StepWatch,
    ) -> None:
        self._api = api
        self._executor = executor
        self._build_scheduler = build_scheduler
        self._scheduler = build_scheduler()
        self._watch = watch
        self._progress = Progress(executor.ranks, time.monotonic)
        self._plans: deque[StepPlan] = deque()  # in flight
        self._results: list[StepResult] = []
        self._refused: list[SequenceOutput] = []
        self._owes_stats = False
        self._awaits_resume = False
        self._is_orphan = False
        self._has_api = anyio.Event()
        self._num_answered = self._num_commands = 0
        self._wake = anyio.Event()

    @property
    def in_flight(self) -> list[int]:
        """The sequences of the steps in flight."""
        return self._scheduler.seq_ids_in_flight()

    async def run(self, announce: Callable[[], Awaitable[None]]) -> None:
        """Try the group out, ``announce`` it to each API process, serve until StopEngine.

        Raises EngineDeadError when the group hangs, or no API process is left.
        """
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._take_results)
            tasks.start_soon(self._watch_progress)
            await self._try_out()
            await announce()
            tasks.start_soon(self._take_commands, tasks)
            await self._step_for_ever(announce)

    async def _take_commands(self, tasks: TaskGroup) -> None:
        while True:
            try:
                command = await self._api.receive()
            except ChannelClosedError:
                self._is_orphan, self._has_api = True, anyio.Event()
                self._wake.set()
                await self._api.wait_next()
                self._has_api.set()
                continue
            match command:
                case StopEngine():
                    tasks.cancel_scope.cancel()
                    return
                case ResumeEngine():
                    self._awaits_resume = False
                case _ if self._awaits_resume:
                    continue  # sent before the API process knew that all is forgotten
                case AddSequence() as add:
                    self._add(add)
                case AbortSequences(seq_ids=seq_ids):
                    self._scheduler.abort(seq_ids)
                    self._owes_stats = True  # what they held is free, and perhaps no step follows to say so
                case StartEngine():
                    raise ValueError("a second StartEngine")
            self._wake.set()
            self._num_commands += 1
            if self._plans and self._num_commands % _AT_ONCE == 0:
                await anyio.lowlevel.checkpoint()  # many may have come at once, and answers wait behind them

    def _add(self, add: AddSequence) -> None:
        try:
            output = self._scheduler.add(add)
        except RequestError:  # the frontend checks the same limits; this is the last gate
            output = SequenceOutput(seq_id=add.seq_id, token_ids=[], finish_reason="abort")
        if output is not None:
            self._refused.append(output)

    async def _take_results(self) -> None:
        async for result in self._executor.results:
            self._results.append(result)
            self._wake.set()

    async def _step_for_ever(self, announce: Callable[[], Awaitable[None]]) -> None:
        while True:
            if self._is_orphan:
                await self._start_over(announce)
            news = [Gains(self._refused)] if self._refused or self._owes_stats else []
            self._refused, self._owes_stats = [], False
            failure = self._take_answers(news)
            computes = bool(self._plans)  # a step behind those answers: the next one is in no hurry
            if failure is None and not computes:
                await self._submit_plans()
            if not self._is_orphan:  # the next API process counts its sequences anew
                for gains in news:
                    await self._api.send(StepOutputs(gains, self._scheduler.stats()))
            if failure is not None:
                await self._recover(failure)
            elif computes:
                await self._submit_plans()
            if not self._is_orphan:
                await self._wait_for_news()

    def _take_answers(self, news: list[Gains]) -> StepFailure | None:
        """Update the scheduler with each answer, up to one that failed: what follows was computed on top of it."""
        while self._results:
            result = self._next_answer()
            if result.failure is not None:
                return result.failure
            news.append(self._scheduler.update(result))
        return None

    def _next_answer(self) -> StepResult:
        self._watch.answered()
        self._plans.popleft()
        self._num_answered += 1
        return self._results.pop(0)

    async def _submit_plans(self) -> None:
        while not self._awaits_resume and (plan := self._scheduler.schedule()):
            await self._submit(plan)

    async def _submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)
        self._watch.submitted(plan.num_tokens)
        await self._executor.submit(plan)

    async def _wait_for_news(self) -> None:
        if not self._results and not self._refused:
            await self._wake.wait()
        self._wake = anyio.Event()

    # --- failures ---

    async def _recover(self, failure: StepFailure) -> None:
        """Forget every sequence, prove that the group still works, and say so."""
        self._awaits_resume = True
        suspects = failure.seq_ids
        if suspects is None:
            suspects = self._scheduler.seq_ids_in_flight(oldest_only=True)
        await self._forget_all()
        await self._try_out()
        if not self._is_orphan:
            await self._api.send(StepFailed(failure.message, suspects, failure.detail))

    async def _start_over(self, announce: Callable[[], Awaitable[None]]) -> None:
        """The API process has died: nobody waits for what it had asked. Be there for the next one."""
        self._awaits_resume = True
        await self._forget_all()
        while self._is_orphan:
            has_api = self._has_api
            await has_api.wait()
            self._is_orphan = has_api is not self._has_api  # it has died, too
        self._awaits_resume = False
        await announce()

    async def _forget_all(self) -> None:
        """Let what is in flight end, then forget every sequence, here and in the workers."""
        while self._plans:
            await self._wait_answer()
        self._scheduler = self._build_scheduler()
        self._refused.clear()
        await self._submit(StepPlan(step_id=0, scheduled=[], forgets_all=True))
        await self._wait_answer()

    async def _try_out(self) -> None:
        """Raises EngineDeadError when the group cannot compute a step of no request at all."""
        for plan in trial_steps():
            await self._submit(plan)
            failure = (await self._wait_answer()).failure
            if plan.new:
                self._watch.forget()  # what is set up once, at a first step, is no measure of others
            if failure is not None:
                error = EngineDeadError(f"a trial step failed: {failure.message}", hint="see the log above")
                error.add_note(failure.detail)
                raise error

    async def _wait_answer(self) -> StepResult:
        while not self._results:
            await self._wait_for_news()
        return self._next_answer()

    async def _watch_progress(self) -> None:
        """Tell the API process that this loop runs, and whether steps advance; raise when one will not end."""
        while True:
            await anyio.sleep(_PULSE_SECONDS)
            stalled = self._progress.look(self._num_answered, is_in_flight=bool(self._plans))
            if self._watch.overdue_seconds() > 0:
                await self._executor.dump_stacks()
                await anyio.sleep(_STACKS_SECONDS)
                raise describe_hang(self._executor.ranks, self._watch.allowed_seconds(self._plans[0].num_tokens))
            await self._api.send(EnginePulse(step=self._scheduler.stats().step, stalled=stalled))
