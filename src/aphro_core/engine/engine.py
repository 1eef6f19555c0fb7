"""The step loop: commands in, schedule, execute, update, tokens out."""

from __future__ import annotations

import anyio
from anyio.abc import TaskGroup

from aphro_core.channel import Channel
from aphro_core.errors import EngineDeadError, RequestError
from aphro_core.executor.executor import Executor
from aphro_core.messages.requests import (
    AbortSequences,
    AddSequence,
    FromEngine,
    SequenceOutput,
    StartEngine,
    StepOutputs,
    StopEngine,
    ToEngine,
)
from aphro_core.messages.steps import StepResult
from aphro_core.scheduler.scheduler import Scheduler


class Engine:
    """Drives one scheduler over one group of workers, for the API process at the other end of ``api``."""

    def __init__(
        self,
        api: Channel[FromEngine, ToEngine],
        executor: Executor,
        scheduler: Scheduler,
        *,
        step_timeout_seconds: float,
    ) -> None:
        self._api = api
        self._executor = executor
        self._scheduler = scheduler
        self._step_timeout_seconds = step_timeout_seconds
        self._results: list[StepResult] = []
        self._refused: list[SequenceOutput] = []
        self._owes_stats = False
        self._wake = anyio.Event()

    async def run(self) -> None:
        """Serve until StopEngine. Raises ChannelClosedError when the API process is gone."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._take_commands, tasks)
            tasks.start_soon(self._take_results)
            await self._step_for_ever()

    async def _take_commands(self, tasks: TaskGroup) -> None:
        while True:
            match await self._api.receive():
                case AddSequence() as add:
                    self._add(add)
                case AbortSequences(seq_ids=seq_ids):
                    self._scheduler.abort(seq_ids)
                    self._owes_stats = True  # what they held is free, and perhaps no step follows to say so
                case StopEngine():
                    tasks.cancel_scope.cancel()
                    return
                case StartEngine():
                    raise ValueError("a second StartEngine")
            self._wake.set()

    def _add(self, add: AddSequence) -> None:
        try:
            self._scheduler.add(add)
        except RequestError:  # the frontend checks the same limits; this is the last gate
            self._refused.append(SequenceOutput(seq_id=add.seq_id, token_ids=[], finish_reason="abort"))

    async def _take_results(self) -> None:
        async for result in self._executor.results:
            self._results.append(result)
            self._wake.set()

    async def _step_for_ever(self) -> None:
        while True:
            outputs, self._refused = self._refused, []
            results, self._results = self._results, []
            for result in results:
                outputs += self._scheduler.update(result)
            while plan := self._scheduler.schedule():
                await self._executor.submit(plan)
            if outputs or results or self._owes_stats:
                self._owes_stats = False
                await self._api.send(StepOutputs(outputs=outputs, stats=self._scheduler.stats()))
            await self._wait_for_news()

    async def _wait_for_news(self) -> None:
        if not self._results and not self._refused:
            limit = self._step_timeout_seconds if self._scheduler.num_in_flight else None
            with anyio.move_on_after(limit) as scope:
                await self._wake.wait()
            if scope.cancelled_caught:
                raise EngineDeadError(
                    f"no rank has answered a step within {limit:g} s",
                    hint="a worker hangs, most often in a collective: look at it with `py-spy dump --pid PID`",
                )
        self._wake = anyio.Event()
