"""A scheduler, a fake worker and clients together: every plan, answer and state is checked as it comes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from msgspec.structs import replace

from aphro_core.config import SchedulerConfig
from aphro_core.messages.requests import AddSequence, Gains, SequenceOutput
from aphro_core.messages.steps import StepPlan, StepResult
from aphro_core.request import SamplingParams
from aphro_core.scheduler.scheduler import Scheduler
from tests.core.scheduler.fake_worker import FakeWorker, run_alone
from tests.core.scheduler.invariants import check_state


@dataclass(frozen=True, kw_only=True)
class Setup:
    num_blocks: int = 64
    block_size: int = 4
    max_model_len: int = 64
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 64
    max_in_flight: int = 1
    run_ahead: int = 0
    max_num_prefill_tokens: int | None = None
    context_per_token: int | None = None
    free_context: int = 0
    tokens_unit: int = 1
    enable_prefix_caching: bool = True
    vocab_size: int = 1000

    def scheduler(self) -> Scheduler:
        return Scheduler(
            SchedulerConfig(
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens,
                max_num_prefill_tokens=self.max_num_prefill_tokens,
                context_per_token=self.context_per_token,
                free_context=self.free_context,
                tokens_unit=self.tokens_unit,
            ),
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            max_in_flight=self.max_in_flight,
            run_ahead=self.run_ahead,
            enable_prefix_caching=self.enable_prefix_caching,
        )

    def worker(self) -> FakeWorker:
        return FakeWorker(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=max(self.max_num_batched_tokens, self.max_num_prefill_tokens or 0),
            vocab_size=self.vocab_size,
        )


def sequence(
    seq_id: int,
    prompt: list[int],
    *,
    max_tokens: int = 8,
    stop: tuple[int, ...] = (),
    outputs: tuple[int, ...] = (),
    salt: str = "",
    prompt_logprobs: bool = False,
    repetition_penalty: float = 1.0,
) -> AddSequence:
    """An AddSequence as the frontend would send it."""
    return AddSequence(
        seq_id=seq_id,
        prompt_token_ids=prompt,
        sampling=SamplingParams(
            max_tokens=None,
            prompt_logprobs=1 if prompt_logprobs else None,
            repetition_penalty=repetition_penalty,
        ),
        seed=seq_id,
        max_tokens=max_tokens,
        stop_token_ids=list(stop),
        output_token_ids=list(outputs),
        cache_salt=salt,
    )


@dataclass
class Client:
    """What one client asked for and has got so far."""

    add: AddSequence
    token_ids: list[int]  # those of an earlier engine included
    outputs: list[SequenceOutput] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return bool(self.outputs) and self.outputs[-1].finish_reason is not None


class Simulation:
    """``add``, ``abort``, ``schedule``, ``answer`` and ``restart`` are the operations; each one checks everything."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.clients: dict[int, Client] = {}  # without those that aborted
        self.num_preemptions = self.num_again = 0
        self._start_engine()

    def _start_engine(self) -> None:
        self.scheduler = self.setup.scheduler()
        self.worker = self.setup.worker()
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        self._aborted_rows: set[tuple[int, int]] = set()  # (step_id, seq_id)
        self._not_started: deque[int] = deque()  # seq_ids, in order of arrival

    def add(self, add: AddSequence) -> None:
        assert add.seq_id not in self.clients
        client = Client(add, list(add.output_token_ids))
        output = self.scheduler.add(add)  # a RequestError leaves no client
        self.clients[add.seq_id] = client
        if output is not None:
            self._take(output)
        else:
            self._not_started.append(add.seq_id)
        check_state(self.scheduler, self.setup.max_num_seqs)

    def abort(self, seq_ids: list[int]) -> None:
        self.scheduler.abort(seq_ids)
        for seq_id in seq_ids:
            client = self.clients.get(seq_id)
            if client is None or client.is_finished:
                continue
            del self.clients[seq_id]
            if seq_id in self._not_started:
                self._not_started.remove(seq_id)
            self._aborted_rows |= {(plan.step_id, seq_id) for plan, _ in self.in_flight if seq_id in _rows(plan)}
        check_state(self.scheduler, self.setup.max_num_seqs)

    def schedule(self) -> StepPlan | None:
        oldest = self.scheduler._running[0] if self.scheduler._running else None
        # with plans that run ahead it may have to wait for a block until one of them is answered
        is_ready = oldest is not None and not oldest.is_in_flight and not (self.setup.run_ahead and self.in_flight)
        plan = self.scheduler.schedule()
        if plan is not None:
            self.num_again += plan.again is not None
            plan = self.worker.spell_out(plan)
            assert len(self.in_flight) < self.setup.max_in_flight
            self._check_places(plan)
            assert not is_ready or oldest.seq_id in _rows(plan), "the oldest running sequence always advances"
            self._check_order(plan)
            salts = {new.seq_id: self.clients[new.seq_id].add.cache_salt for new in plan.new}
            self.in_flight.append((plan, self.worker.execute(plan, salts)))
        assert self.scheduler.num_in_flight == len(self.in_flight)
        check_state(self.scheduler, self.setup.max_num_seqs)
        return plan

    def _check_places(self, plan: StepPlan) -> None:
        """No sequence is in more plans than it may be, and none is planned beyond its last token."""
        for row in plan.scheduled:
            add = self.clients[row.seq_id].add
            places = sum(row.seq_id in _rows(earlier) for earlier, _ in self.in_flight)
            assert places <= (self.setup.run_ahead if add.sampling.repetition_penalty == 1.0 else 0)
            longest = min(len(add.prompt_token_ids) + add.max_tokens, self.setup.max_model_len)
            assert row.start + row.num_tokens < longest, "a row whose token could never be sent"
        new = {one.seq_id for one in plan.new}
        if any(row.samples and row.num_tokens == 1 and row.seq_id not in new for row in plan.scheduled):
            assert plan.num_tokens <= self.setup.max_num_batched_tokens

    def _check_order(self, plan: StepPlan) -> None:
        """What starts for the first time is what has waited longest; a later start is after a preemption."""
        for new in plan.new:
            if new.seq_id in self._not_started:
                assert new.seq_id == self._not_started.popleft()
            else:
                assert (
                    new.token_ids == self.clients[new.seq_id].add.prompt_token_ids + self.clients[new.seq_id].token_ids
                )

    def answer(self) -> list[SequenceOutput]:
        plan, result = self.in_flight.popleft()
        finished = {seq_id for seq_id, client in self.clients.items() if client.is_finished}
        drawn = [row.seq_id for row in plan.scheduled if row.samples]
        outputs = outputs_of(self.scheduler.update(result), drawn)
        assert [output.seq_id for output in outputs] == [
            i for i in drawn if (plan.step_id, i) not in self._aborted_rows and i not in finished
        ]
        for output in outputs:
            self._take(output)
        check_state(self.scheduler, self.setup.max_num_seqs)
        assert self.scheduler.stats().step == plan.step_id
        return outputs

    def _take(self, output: SequenceOutput) -> None:
        client = self.clients[output.seq_id]
        assert not client.is_finished, "an output after the last one"
        client.outputs.append(output)
        client.token_ids += output.token_ids

    def restart(self) -> None:
        """The engine dies; a new one is given what is open, with the tokens that the clients have."""
        self.num_preemptions += self.scheduler.stats().num_preemptions
        is_open = [client for client in self.clients.values() if not client.is_finished]
        self._start_engine()
        for client in is_open:
            del self.clients[client.add.seq_id]
            self.add(replace(client.add, output_token_ids=list(client.token_ids)))

    def step(self) -> list[SequenceOutput]:
        """Fill the pipeline, then answer the oldest plan."""
        while self.schedule() is not None:
            pass
        assert self.in_flight, "there is work, and nothing runs"
        return self.answer()

    def drain(self) -> None:
        """Run to the end. Then nothing is held, and every client has what it would have got alone."""
        is_open = [client for client in self.clients.values() if not client.is_finished]
        # every step computes a token of the oldest running sequence; none is computed more often than others end
        limit = len(self.in_flight) + 1 + len(is_open) * (len(is_open) + 1) * self.setup.max_model_len
        while self.scheduler.has_work:
            self.step()
            limit -= 1
            assert limit > 0, "no end in sight"
        assert self.scheduler.schedule() is None
        stats = self.scheduler.stats()
        assert (stats.num_blocks_used, stats.num_waiting, stats.num_running) == (0, 0, 0)
        self.num_preemptions += stats.num_preemptions
        for client in self.clients.values():
            self._check_end(client)

    def _check_end(self, client: Client) -> None:
        add, last = client.add, client.outputs[-1]
        expected = run_alone(add, self.setup.vocab_size, self.setup.max_model_len)
        assert (client.token_ids, last.finish_reason, last.stop_token_id) == expected
        assert all(output.prompt_logprobs is None and not output.num_cached_tokens for output in client.outputs[1:])
        first = client.outputs[0]
        assert first.num_cached_tokens < len(add.prompt_token_ids) + len(add.output_token_ids)
        if add.sampling.prompt_logprobs is None or add.output_token_ids:
            assert first.prompt_logprobs is None
        else:
            assert first.prompt_logprobs is not None
            assert [entry.token_ids[0] for entry in first.prompt_logprobs] == add.prompt_token_ids[1:]


def outputs_of(gains: Gains, order: list[int]) -> list[SequenceOutput]:
    """All of a step, also what is told in columns, by the ``order`` of its sequences."""
    columns = [SequenceOutput(*pair) for pair in zip(gains.seq_ids, [[i] for i in gains.token_ids], strict=True)]
    return sorted([*gains.outputs, *columns], key=lambda output: order.index(output.seq_id))


def _rows(plan: StepPlan) -> set[int]:
    return {row.seq_id for row in plan.scheduled}
