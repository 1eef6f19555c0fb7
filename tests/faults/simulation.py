"""A frontend, engines that die, and clients that come and go, in virtual time: one seed is one history.

The frontend and the scheduler are the real ones; the engine's loop and its workers are played, message by message.
Every choice comes from the seed: what is delivered when, which step fails, when an engine dies and what it takes along.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from aphro_core.config import SchedulerConfig
from aphro_core.errors import EngineDeadError, RequestError, RequestFailedError
from aphro_core.frontend.frontend import Frontend
from aphro_core.messages.requests import (
    AbortSequences,
    AddSequence,
    EngineReady,
    FromEngine,
    Gains,
    ResumeEngine,
    StepFailed,
    StepOutputs,
    ToEngine,
)
from aphro_core.messages.steps import StepPlan, StepResult
from aphro_core.request import Request, SamplingParams
from aphro_core.scheduler.scheduler import Scheduler
from tests.core.scheduler.fake_worker import FakeWorker, run_alone

VOCAB, MAX_LEN = 50, 40


class SimulatedEngine:
    """One epoch: what it was told and has not read, what it has computed and not sent, and a group that may fail."""

    def __init__(self, rng: random.Random, poison: set[int], culprits: set[int], salts: dict[int, str]) -> None:
        self.inbox: deque[ToEngine] = deque()
        self.outbox: deque[FromEngine] = deque()
        self.is_dead = False
        self._poison = poison  # first prompt tokens: a step with one of them kills the group
        self._culprits = culprits  # a step with one of them fails
        self._salts = salts
        self._in_flight: deque[tuple[StepPlan, StepResult | None]] = deque()
        self._known: dict[int, AddSequence] = {}
        self._run_ahead = rng.choice([0, 0, 1])
        self._num_stages = rng.choice([1, 1, 2])
        self._awaits_resume = False
        self._send_turns = rng.choice([1, 1, 2, 8])
        self._start_group()

    def _start_group(self) -> None:
        """The scheduler begins anew; so do the workers, who were told to forget all."""
        self.scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16),
            num_blocks=24,
            block_size=4,
            max_model_len=MAX_LEN,
            max_in_flight=self._num_stages + self._run_ahead,
            run_ahead=self._run_ahead,
        )
        self._worker = FakeWorker(
            num_blocks=24, block_size=4, max_num_seqs=4 + 4, max_num_batched_tokens=16, vocab_size=VOCAB
        )
        self._in_flight.clear()

    async def send(self, message: ToEngine) -> None:
        for _ in range(self._send_turns):  # a full pipe takes its time
            await anyio.lowlevel.checkpoint()
        if self.is_dead:
            raise EngineDeadError("gone")
        self.inbox.append(message)

    def read(self) -> None:
        match self.inbox.popleft():
            case ResumeEngine():
                self._awaits_resume = False
            case _ if self._awaits_resume:
                return
            case AddSequence() as add:
                assert add.seq_id not in self._known, "told twice"
                self._known[add.seq_id] = add
                output = self.scheduler.add(add)
                if output is not None:
                    self._send(Gains([output]))
            case AbortSequences(seq_ids=seq_ids):
                self.scheduler.abort(seq_ids)

    def schedule(self) -> None:
        """Raises EngineDeadError where the step kills the group."""
        plan = None if self._awaits_resume else self.scheduler.schedule()
        if plan is None:
            return
        plan = self._worker.spell_out(plan)
        self._worker.note_rows(plan)
        first = {row.seq_id: self._known[row.seq_id].prompt_token_ids[0] for row in plan.scheduled}
        if self._poison & set(first.values()):
            self._in_flight.append((plan, None))
            raise EngineDeadError("a worker died")
        if self._culprits & set(first.values()) or any(result is None for _, result in self._in_flight):
            self._in_flight.append((plan, None))
        else:
            self._in_flight.append((plan, self._worker.execute(plan, self._salts)))

    def answer(self) -> None:
        plan, result = self._in_flight.popleft()
        if result is not None:
            self._send(self.scheduler.update(result))
            return
        self._awaits_resume = True
        self._known.clear()
        self._start_group()
        self.outbox.append(StepFailed("failed", [row.seq_id for row in plan.scheduled]))

    @property
    def in_flight(self) -> list[int]:
        return [row.seq_id for plan, _ in self._in_flight for row in plan.scheduled]

    @property
    def can_answer(self) -> bool:
        return bool(self._in_flight)

    @property
    def is_idle(self) -> bool:
        return not (self.inbox or self.outbox or self._in_flight or self.scheduler.has_work)

    def _send(self, gains: Gains) -> None:
        self.outbox.append(StepOutputs(gains, self.scheduler.stats()))


@dataclass
class Client:
    """What one of them asked for, and what became of it."""

    number: int
    request: Request
    max_tokens: int
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    token_ids: list[int] = field(default_factory=list)
    error: Exception | None = None
    is_done: bool = False


class History:
    """One seed, from the first client to the last answer."""

    def __init__(self, seed: int) -> None:
        self._rng = rng = random.Random(seed)
        self._now = 0.0
        self._poison = {7} if rng.random() < 0.3 else set()
        self._culprits = {8} if rng.random() < 0.3 else set()
        self.clients: list[Client] = []
        self.num_deaths = self.num_failed_steps = 0
        self._engine: SimulatedEngine | None = None
        self._salts: dict[int, str] = dict.fromkeys(range(1, 400), "")
        self._deaths_left = rng.randint(0, 4)
        self.frontend = Frontend(
            None,
            served_name="m",
            vocab_size=VOCAB,
            max_model_len=MAX_LEN,
            eos_token_ids=(),
            max_queued_requests=64,
            clock=lambda: self._now,
        )

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            self._start_engine(tasks)
            num_clients = self._rng.randint(1, 8)
            for step in range(3000):
                for _ in range(self._rng.randint(1, 4)):  # what the others do meanwhile
                    await anyio.lowlevel.checkpoint()
                if len(self.clients) < num_clients and self.frontend.health().phase != "starting":
                    if self._rng.random() < 0.2 or step > 500:
                        self._add_client(tasks)
                elif len(self.clients) == num_clients and self._is_over():
                    break
                self._event(tasks)
            else:
                raise AssertionError("no end in sight")
            tasks.cancel_scope.cancel()

    def _is_over(self) -> bool:
        return all(client.is_done for client in self.clients) and self._engine is not None and self._engine.is_idle

    def _event(self, tasks: TaskGroup) -> None:
        """One thing happens, somewhere."""
        engine = self._engine
        self._now += self._rng.choice([0.0, 0.01, 1.0])
        if engine is None:
            self._start_engine(tasks)
            return
        roll = self._rng.random()
        try:
            if roll < 0.01 and self._deaths_left:
                self._deaths_left -= 1
                self._lose(engine, is_external=True)
            elif roll < 0.02 and self.clients:
                self._rng.choice(self.clients).scope.cancel()
            elif roll < 0.35 and engine.inbox:
                engine.read()
            elif roll < 0.6:
                engine.schedule()
            elif roll < 0.8 and engine.can_answer:
                engine.answer()
            elif engine.outbox:
                self._deliver(engine, tasks)
        except EngineDeadError:
            self._lose(engine, is_external=False)

    def _deliver(self, engine: SimulatedEngine, tasks: TaskGroup) -> None:
        match engine.outbox.popleft():
            case StepOutputs() as outputs:
                self.frontend.on_outputs(outputs)
            case StepFailed() as failed:
                self.num_failed_steps += 1
                self.frontend.on_step_failed(failed)
                tasks.start_soon(self._resume, engine, True)

    def _lose(self, engine: SimulatedEngine, *, is_external: bool) -> None:
        """The engine dies, with all that it has not sent."""
        self.num_deaths += 1
        engine.is_dead = True
        self._engine = None
        self.frontend.on_engine_lost(engine.in_flight if self._rng.random() < 0.7 else None, is_external=is_external)

    def _start_engine(self, tasks: TaskGroup) -> None:
        engine = self._engine = SimulatedEngine(self._rng, self._poison, self._culprits, self._salts)
        self.frontend.on_engine_ready(EngineReady(num_blocks=24, max_model_len=MAX_LEN, ranks=[]))
        tasks.start_soon(self._resume, engine, False)

    async def _resume(self, engine: SimulatedEngine, after_failed_step: bool) -> None:
        await self.frontend.resume(engine, after_failed_step=after_failed_step)

    def _add_client(self, tasks: TaskGroup) -> None:
        number = len(self.clients)
        first = self._rng.choice([1, 2, 3, 7, 8])
        prompt = [first, *[self._rng.randrange(9, 12) for _ in range(self._rng.randint(0, 12))]]
        max_tokens = self._rng.randint(1, 12)
        client = Client(number, Request(str(number), prompt, SamplingParams(max_tokens=max_tokens)), max_tokens)
        self.clients.append(client)
        tasks.start_soon(self._read, client)

    async def _read(self, client: Client) -> None:
        with client.scope:
            try:
                async with self.frontend.stream(client.request) as deltas:
                    async for delta in deltas:
                        client.token_ids += delta.token_ids
            except (RequestFailedError, RequestError) as error:
                client.error = error
        client.is_done = True

    def check(self) -> None:
        """Everybody who stayed has what the model gives; errors only for those that broke something."""
        for client in self.clients:
            prompt = list(client.request.prompt_token_ids)
            add = AddSequence(1, prompt, client.request.sampling, 0, client.max_tokens, [])
            expected, _, _ = run_alone(add, VOCAB, MAX_LEN)
            assert client.token_ids == expected[: len(client.token_ids)], "a wrong token"
            is_bad = prompt[0] in self._poison | self._culprits
            if client.error is not None:
                # two deaths from outside under a request that was alone are held against it, too
                assert is_bad or self.num_deaths >= 2, "an innocent request was given up"
            elif not client.scope.cancel_called:
                assert client.token_ids == expected, "an answer is not whole"
                assert not is_bad or not expected
        assert self.frontend.num_open == 0


def simulate(seed: int) -> History:
    history = History(seed)
    anyio.run(history.run)
    history.check()
    return history
