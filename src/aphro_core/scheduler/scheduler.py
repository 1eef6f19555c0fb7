"""What runs next: continuous batching over paged blocks, with chunked prefill and preemption by recompute."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from aphro_core.config import SchedulerConfig
from aphro_core.errors import RequestError
from aphro_core.messages.requests import AddSequence, EngineStats, Gains, SequenceOutput
from aphro_core.messages.steps import RowsAgain, StepPlan, StepResult, TokenLogprobs
from aphro_core.scheduler.block_manager import BlockManager
from aphro_core.scheduler.block_tables import BlockTables
from aphro_core.scheduler.cohort import Cohort
from aphro_core.scheduler.draft import Draft
from aphro_core.scheduler.in_flight import InFlight, Sent
from aphro_core.scheduler.sequence import Sequence
from aphro_core.scheduler.waiting import WaitingQueue, by_arrival


class Scheduler:
    """Decides each step's rows. Pure: the same calls give the same plans.

    Sequences run first come, first served: only the oldest waiting one may start, and when blocks run out the
    youngest gives up its own. Up to ``max_in_flight`` plans may be unanswered, and they are answered in order.

    A sequence is in at most ``1 + run_ahead`` of them: its next row is planned before its last token is read, since
    the workers have it, and so a device never waits for its host. If that token ends it, the rows that ran ahead were
    computed for nothing and their tokens are dropped. What is left of ``max_in_flight`` are the stages of a pipeline,
    which share the rows. Blocks are free when the last plan that holds their sequence is answered. ``released`` ids
    ride with the next plan that has rows: until then the workers keep the state of at most ``max_num_seqs`` sequences,
    which is what bounds their memory.

    While the same sequences decode, plan after plan, nothing is decided anew for a row (``Cohort``), which makes steps
    of many rows cheap. Only with ``run_ahead``, since such plans tell no tokens, and without a pipeline.

    A plan has ``max_num_batched_tokens`` tokens at most, and ``max_num_prefill_tokens`` if nothing decodes: then no
    stream waits for it. What rows that decode have to read takes time too: for ``context_per_token`` tokens of context
    beyond ``free_context`` there is room for one token of a prompt less, down to a quarter of the plan; such plans have
    multiples of ``tokens_unit``.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        max_in_flight: int = 1,
        run_ahead: int = 0,
        enable_prefix_caching: bool = True,
    ) -> None:
        num_stages = max_in_flight - run_ahead
        sizes = (config.max_num_seqs, config.max_num_batched_tokens, max_model_len, num_stages, 1 + run_ahead)
        if min(sizes) < 1:
            names = "max_num_seqs, max_num_batched_tokens, max_model_len, max_in_flight - run_ahead, 1 + run_ahead"
            raise ValueError(f"({names}) is {sizes}, allowed: each 1 and up")
        self._max_num_seqs = config.max_num_seqs
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._max_model_len = max_model_len
        self._max_num_prefill_tokens = config.max_num_prefill_tokens or config.max_num_batched_tokens
        self._context_per_token, self._free_context = config.context_per_token, config.free_context
        self._tokens_unit = config.tokens_unit
        self._num_stages = num_stages
        self._run_ahead = run_ahead
        self._max_in_flight = max_in_flight
        self._blocks = BlockManager(num_blocks, block_size)
        self._tables = BlockTables(self._blocks, enable_prefix_caching=enable_prefix_caching)
        self._sequences: dict[int, Sequence] = {}  # all that wait or run
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # oldest first
        self._cohort: Cohort | None = None  # the rows of the last plan, if they are all there is and all decode
        self._in_flight = InFlight()
        self._leaving: set[int] = set()  # ended in flight: they keep blocks and place until their plans are answered
        self._released: list[int] = []
        self._is_head_stuck = False  # the head of the queue found too few blocks, and none came back since
        self._num_arrived = self._num_preemptions = 0
        self._last_planned = self._last_answered = 0  # step ids

    @property
    def has_work(self) -> bool:
        """Whether a sequence is unfinished or a plan unanswered."""
        return bool(self._sequences) or bool(self._in_flight)

    @property
    def num_in_flight(self) -> int:
        """Plans handed out and not answered."""
        return len(self._in_flight)

    def seq_ids_in_flight(self, *, oldest_only: bool = False) -> list[int]:
        """The sequences of the plans in flight, or of the oldest of them; those that were aborted too."""
        return self._in_flight.seq_ids(oldest_only=oldest_only)

    def stats(self) -> EngineStats:
        """Gauges of this moment and counters since the start. ``step`` is the last answered one."""
        return EngineStats(
            step=self._last_answered,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_blocks_used=self._blocks.num_used,
            num_preemptions=self._num_preemptions,
            num_prefix_queries=self._tables.num_prefix_queries,
            num_prefix_hits=self._tables.num_prefix_hits,
        )

    def add(self, add: AddSequence) -> SequenceOutput | None:
        """Queue a sequence. One that has all its tokens already is answered here instead.

        Raises :class:`RequestError` if it could not be computed to its end even alone.
        """
        if add.seq_id in self._sequences:
            raise ValueError(f"sequence {add.seq_id} is already here")
        self._check_prompt(len(add.prompt_token_ids))
        sequence = Sequence(add, arrival=self._num_arrived, max_model_len=self._max_model_len)
        reason, stop_token_id = sequence.end()
        if reason is not None:
            return SequenceOutput(add.seq_id, [], finish_reason=reason, stop_token_id=stop_token_id)
        self._check_blocks(sequence.max_len)
        self._num_arrived += 1
        self._sequences[add.seq_id] = sequence
        self._waiting.append(sequence)
        return None

    def _check_prompt(self, num_tokens: int) -> None:
        if not 1 <= num_tokens < self._max_model_len:
            raise RequestError(
                f"the prompt has {num_tokens} tokens, allowed: 1 to {self._max_model_len - 1} (the context holds "
                f"{self._max_model_len} tokens, at least one of them for the answer)",
                field="prompt",
            )

    def _check_blocks(self, num_tokens: int) -> None:
        num_blocks, block_size = self._blocks.num_blocks, self._blocks.block_size
        # the last token is drawn and not fed back, so it needs no room
        if self._blocks.blocks_for(num_tokens - 1) > num_blocks:
            raise RequestError(
                f"prompt and max_tokens make {num_tokens} tokens, allowed: up to {num_blocks * block_size + 1} (the "
                f"cache has {num_blocks} blocks of {block_size} tokens); ask for fewer tokens",
                field="max_tokens",
            )

    def abort(self, seq_ids: Iterable[int]) -> None:
        """Forget these sequences: no output follows for them. Unknown ids are ignored."""
        for seq_id in seq_ids:
            sequence = self._sequences.pop(seq_id, None)
            if sequence is None:
                continue
            if not sequence.is_running:
                self._waiting.remove(sequence)
                self._is_head_stuck = False
                continue
            self._leave(sequence)

    def schedule(self) -> StepPlan | None:
        """The next step, never without rows; None if nothing can run before an answer or a request comes.

        Sequences that decode come first, then prompts that were begun, then new ones, as far as the token budget,
        ``max_num_seqs`` and the blocks reach.
        """
        if len(self._in_flight) >= self._max_in_flight:
            return None
        if self._cohort is not None and not self._may_admit():
            plan = self._schedule_again(self._cohort)
            if plan is not None:
                return plan
        self._cohort = None
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        for sequence in self._running:
            num_in_flight = sequence.num_in_flight
            if not num_in_flight or (num_in_flight <= self._run_ahead and self._may_run_ahead(sequence)):
                (decodes if sequence.num_pending == 1 else prefills).append(sequence)
        draft = Draft(self._max_num_batched_tokens if decodes else self._max_num_prefill_tokens)
        self._schedule_decodes(draft, decodes, prefills)
        if self._context_per_token is not None and draft.scheduled:
            self._leave_room_to_read(draft, self._context_per_token)
        prefill_share = self._prefill_share(prefills)
        for sequence in prefills:
            if draft.tokens_left and draft.num_prefill_tokens < prefill_share:
                draft.place_prefill(sequence, [])
                self._tables.register(sequence)
        self._admit(draft, prefill_share)
        return self._hand_out(draft) if draft.scheduled else None

    def _schedule_again(self, cohort: Cohort) -> StepPlan | None:
        """A row of each of the cohort; None, and nothing done, if there are too few blocks."""
        without, block_size = cohort.take_leavers(), self._blocks.block_size
        begins = [i for i, sequence in enumerate(cohort.rows) if not sequence.num_computed % block_size]
        if not cohort.rows or len(begins) > self._blocks.num_free:
            return None
        new_blocks = []
        for index in begins:
            self._tables.register(cohort.rows[index])
            new_blocks += [(index, block_id) for block_id in self._tables.grow(cohort.rows[index]) or ()]
        is_plain = cohort.advance()
        again = RowsAgain(len(cohort.rows), without, new_blocks)
        plan = StepPlan(self._next_step_id(), released=self._take_released(), again=again)
        samples = [True] * len(cohort.rows)
        self._in_flight.append(
            Sent(plan.step_id, cohort.rows, samples, is_plain, cohort.seq_ids, cohort.stop_token_ids)
        )
        return plan

    def _leave_room_to_read(self, draft: Draft, context_per_token: int) -> None:
        """Of a plan that has decoding rows only so far: prompts get less room beside long contexts."""
        taken = (sum(row.start for row in draft.scheduled) - self._free_context) // context_per_token
        if taken > 0:
            room = self._max_num_batched_tokens - taken
            whole = room if room < self._tokens_unit else room // self._tokens_unit * self._tokens_unit
            least = max(self._max_num_batched_tokens // 4, 1)
            draft.tokens_left = min(draft.tokens_left, max(whole - len(draft.scheduled), least))

    def _may_run_ahead(self, sequence: Sequence) -> bool:
        """Also not so soon that the first stage would wait for its token from the last: the others take their turn."""
        is_its_turn = not sequence.num_unread or self._last_planned + 1 - sequence.last_planned >= self._num_stages
        return is_its_turn and not sequence.needs_its_tokens and not sequence.is_full

    def _schedule_decodes(self, draft: Draft, decodes: list[Sequence], prefills: list[Sequence]) -> None:
        """One row each, oldest first, an even part of them to each stage of a pipeline.

        A missing block is taken from the youngest sequence behind that is in no plan. If there is none, the row waits
        and all behind it: those in flight come back, and then the oldest of all is first and may take from every other.
        """
        share = -(-len(self._running) // self._num_stages)
        # an older prompt gets a token at least, so that no number of younger rows can hold it up
        is_behind = bool(prefills and decodes and prefills[0].arrival < decodes[0].arrival)
        limit = min(share, draft.tokens_left - is_behind)
        block_size = self._blocks.block_size
        index = 0
        while index < limit and index < len(decodes):
            sequence = decodes[index]
            if sequence.num_computed < len(sequence.block_table) * block_size:  # most rows: this is a hot loop
                draft.place_decode(sequence, [])
            else:
                while (new_block_ids := self._tables.grow(sequence)) is None:
                    victim = _take_youngest(decodes, prefills, than=sequence)
                    if victim is None:
                        return
                    self._preempt(victim)
                draft.place_decode(sequence, new_block_ids)
            if not sequence.num_computed % block_size:
                self._tables.register(sequence)
            index += 1

    def _prefill_share(self, prefills: list[Sequence]) -> int:
        """Prompt tokens after which a plan takes up no further prompt, so that each free pipeline stage gets some.

        No prompt is cut for this: its next chunk could not start before this one's answer.
        """
        num_tokens = self._waiting.num_tokens + sum(sequence.num_pending for sequence in prefills)
        return -(-num_tokens // max(self._num_stages - len(self._in_flight), 1))

    def _admit(self, draft: Draft, prefill_share: int) -> None:
        """Start the oldest who wait, in order, each with blocks for all the tokens it has."""
        while draft.tokens_left and draft.num_prefill_tokens < prefill_share and self._may_admit():
            sequence = self._waiting.head
            assert sequence is not None
            # one spare block for each that runs, so that what starts now is not preempted at once
            if not self._tables.fill(sequence, num_spare=len(self._running)):
                self._is_head_stuck = True
                return
            self._waiting.remove(sequence)
            insort(self._running, sequence, key=by_arrival)
            draft.new.append(sequence.introduce())
            draft.place_prefill(sequence, sequence.block_table.copy())
            self._tables.register(sequence)

    def _may_admit(self) -> bool:
        """Whether the oldest who waits may start as far as places go, and blocks as far as is known."""
        if self._is_head_stuck or len(self._running) + len(self._leaving) >= self._max_num_seqs:
            return False
        head = self._waiting.head
        return head is not None and head.seq_id not in self._leaving  # the workers still know another by its id

    def _hand_out(self, draft: Draft) -> StepPlan:
        plan = draft.finish(self._next_step_id(), self._take_released())
        for sequence in draft.sequences:
            sequence.last_planned = plan.step_id
        self._in_flight.append(Sent(plan.step_id, draft.sequences, [row.samples for row in plan.scheduled]))
        if self._run_ahead and self._num_stages == 1 and not draft.num_prefill_tokens:
            self._form_cohort(draft.sequences)
        return plan

    def _form_cohort(self, rows: list[Sequence]) -> None:
        """Of rows that decode, unless there are others that will run, too."""
        if any(one.needs_its_tokens for one in rows):
            return
        if all(one.last_planned == self._last_planned or one.is_full for one in self._running):
            self._cohort = Cohort(rows)

    def _next_step_id(self) -> int:
        self._last_planned += 1
        return self._last_planned

    def _take_released(self) -> list[int]:
        released, self._released = self._released, []
        return released

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        self._release(sequence)
        sequence.restart()
        self._waiting.put_back(sequence)
        self._num_preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        """It has ended; what it holds is free once no plan in flight has a row of it."""
        self._stop_running(sequence)
        if sequence.is_in_flight:
            self._leaving.add(sequence.seq_id)
        else:
            self._release(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        del self._running[bisect_left(self._running, sequence.arrival, key=by_arrival)]
        if self._cohort is not None:
            self._cohort.leave(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._tables.release(sequence)
        self._released.append(sequence.seq_id)
        self._is_head_stuck = False

    def update(self, result: StepResult) -> Gains:
        """Take the answer to the oldest plan in flight: what each sequence gained.

        Raises ValueError for a result that does not fit that plan.
        """
        sent = self._in_flight.answer(result)
        self._last_answered = result.step_id
        is_plain = sent.is_plain and not self._leaving and not result.logprobs
        if is_plain and sent.stop_token_ids.isdisjoint(result.token_ids):
            return self._take_plain(sent, result.token_ids)
        gains = Gains()
        drawn = enumerate(result.token_ids)
        for sequence, samples in zip(sent.sequences, sent.samples, strict=True):
            index, token_id = next(drawn) if samples else (-1, -1)
            sequence.num_in_flight -= 1
            sequence.num_unread -= samples
            if self._leaving and sequence.seq_id in self._leaving:
                if not sequence.is_in_flight:
                    self._leaving.remove(sequence.seq_id)
                    self._release(sequence)
            elif samples:
                output = self._take_token(sequence, token_id, result.logprobs.get(index))
                if output is not None:
                    gains.outputs.append(output)
                else:
                    gains.seq_ids.append(sequence.seq_id)
                    gains.token_ids.append(token_id)
        return gains

    def _take_plain(self, sent: Sent, token_ids: list[int]) -> Gains:
        """Tokens that end nothing: all that most steps bring, so this is a hot loop."""
        block_size = self._blocks.block_size
        for sequence, token_id in zip(sent.sequences, token_ids, strict=True):
            sequence.num_in_flight -= 1
            sequence.num_unread -= 1
            known = sequence.token_ids
            known.append(token_id)
            if not len(known) % block_size and sequence.num_in_flight:
                self._tables.register(sequence)
        assert sent.seq_ids is not None
        return Gains(seq_ids=sent.seq_ids, token_ids=token_ids)

    def _take_token(self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> SequenceOutput | None:
        """None: it has gained this token and nothing else."""
        prompt_logprobs, num_cached = sequence.take_first_output() if sequence.has_first_output else (None, 0)
        reason, stop_token_id = sequence.take_token(token_id)
        if reason is not None:
            del self._sequences[sequence.seq_id]
            self._leave(sequence)
        elif sequence.is_in_flight and not len(sequence.token_ids) % self._blocks.block_size:
            self._tables.register(sequence)  # the row that ran ahead fills this block, and now its tokens are known
        if reason is None and logprobs is None and prompt_logprobs is None and not num_cached:
            return None
        kept = None if logprobs is None else [logprobs]
        return SequenceOutput(sequence.seq_id, [token_id], kept, reason, stop_token_id, prompt_logprobs, num_cached)


def _take_youngest(decodes: list[Sequence], prefills: list[Sequence], *, than: Sequence) -> Sequence | None:
    """Remove the youngest of two lists, both oldest first, that is in no plan and younger than ``than``."""
    candidates = [
        (one.arrival, rows, index)
        for rows in (decodes, prefills)
        for index, one in enumerate(rows)
        if not one.is_in_flight and one.arrival > than.arrival
    ]
    if not candidates:
        return None
    _, rows, index = max(candidates, key=lambda candidate: candidate[0])
    return rows.pop(index)
