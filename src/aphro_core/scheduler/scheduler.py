"""What runs next: continuous batching over paged blocks, with chunked prefill, prefix cache and preemption.

Two rules of the workers make it safe to hand out a block before its content exists. They apply plans in order, and in
each layer they write the keys and values of all tokens of a plan before any of its rows reads. So a block may be found
in the prefix cache as soon as the step that fills it is scheduled, by later plans and by the same one; this also holds
if the sequence that fills it is aborted on the way, since its step is computed all the same.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Iterable
from itertools import islice
from operator import attrgetter

from aphro_core.config import SchedulerConfig
from aphro_core.errors import RequestError
from aphro_core.messages.requests import AddSequence, EngineStats, SequenceOutput
from aphro_core.messages.steps import NewSequence, SampledToken, ScheduledSequence, StepPlan, StepResult
from aphro_core.scheduler.block_manager import BlockManager
from aphro_core.scheduler.sequence import Sequence

_arrival = attrgetter("arrival")


class _Draft:
    """A plan in the making. ``tokens_left`` is what remains of its budget."""

    __slots__ = ("is_short_of_blocks", "new", "num_prefill_tokens", "scheduled", "sequences", "tokens_left")

    def __init__(self, max_num_tokens: int) -> None:
        self.scheduled: list[ScheduledSequence] = []
        self.sequences: list[Sequence] = []  # of ``scheduled``, in its order
        self.new: list[NewSequence] = []
        self.tokens_left = max_num_tokens
        self.num_prefill_tokens = 0
        self.is_short_of_blocks = False  # a running sequence had to wait for a block, or to give its blocks away


class Scheduler:
    """Decides each step's rows. Pure: the same calls give the same plans.

    Sequences run first come, first served: only the oldest waiting one may start, and when blocks run out the
    youngest gives up its own. Up to ``max_in_flight`` plans may be unanswered (one a pipeline stage), a sequence is in
    at most one of them, and they are answered in order. ``released`` ids ride with the next plan that has rows: until
    then the workers keep the state of at most ``max_num_seqs`` sequences, which is what bounds their memory.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        max_in_flight: int = 1,
        enable_prefix_caching: bool = True,
    ) -> None:
        for name, value in (
            ("max_num_seqs", config.max_num_seqs),
            ("max_num_batched_tokens", config.max_num_batched_tokens),
            ("max_model_len", max_model_len),
            ("max_in_flight", max_in_flight),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}, allowed: 1 and up")
        self._config = config
        self._max_model_len = max_model_len
        self._max_in_flight = max_in_flight
        self._enable_prefix_caching = enable_prefix_caching
        self._blocks = BlockManager(num_blocks, block_size)
        self._sequences: dict[int, Sequence] = {}  # all that are neither finished nor aborted
        # every preempted sequence is older than every waiting one, and both are in order of arrival
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()
        self._preempted: list[Sequence] = []
        self._running: list[Sequence] = []  # in order of arrival
        self._in_flight: deque[tuple[StepPlan, list[Sequence]]] = deque()
        self._released: list[int] = []
        self._num_arrived = 0
        self._num_leaving = 0  # aborted in flight: they hold their blocks and a place until their plan is answered
        self._num_waiting_tokens = 0  # known tokens of all waiting and preempted sequences
        self._is_head_stuck = False  # the next one to start did not fit, and no block came back since
        self._last_planned = self._last_answered = 0
        self._num_preemptions = self._num_prefix_queries = self._num_prefix_hits = 0

    @property
    def has_work(self) -> bool:
        """Whether a sequence is unfinished or a plan unanswered."""
        return bool(self._sequences or self._in_flight)

    @property
    def num_in_flight(self) -> int:
        """Plans handed out and not answered."""
        return len(self._in_flight)

    def stats(self) -> EngineStats:
        """Gauges of this moment and counters since the start. ``step`` is the last answered one."""
        return EngineStats(
            step=self._last_answered,
            num_running=len(self._running),
            num_waiting=len(self._waiting) + len(self._preempted),
            num_blocks_used=self._blocks.num_used,
            num_preemptions=self._num_preemptions,
            num_prefix_queries=self._num_prefix_queries,
            num_prefix_hits=self._num_prefix_hits,
        )

    # --- requests come and go ---

    def add(self, add: AddSequence) -> SequenceOutput | None:
        """Queue a sequence. One that has all its tokens already is answered here, and is not queued.

        Raises :class:`RequestError` if it could never be computed to its end, even alone.
        """
        if add.seq_id in self._sequences:
            raise ValueError(f"sequence {add.seq_id} is already here")
        self._check_prompt(add)
        sequence = Sequence(add, arrival=self._num_arrived, max_model_len=self._max_model_len)
        if (reason := sequence.finish_reason()) is not None:
            stop_token_id = sequence.token_ids[-1] if reason == "stop" else None
            return SequenceOutput(add.seq_id, [], finish_reason=reason, stop_token_id=stop_token_id)
        self._check_blocks(sequence)
        self._num_arrived += 1
        self._sequences[add.seq_id] = self._waiting[add.seq_id] = sequence
        self._num_waiting_tokens += len(sequence.token_ids)
        return None

    def _check_prompt(self, add: AddSequence) -> None:
        num_tokens = len(add.prompt_token_ids)
        if not 1 <= num_tokens < self._max_model_len:
            raise RequestError(
                f"the prompt has {num_tokens} tokens, allowed: 1 to {self._max_model_len - 1} (the context holds "
                f"{self._max_model_len} tokens, and at least one is for the answer)",
                field="prompt",
            )

    def _check_blocks(self, sequence: Sequence) -> None:
        # the last token is drawn and never fed back, so it needs no place in the cache
        needed = self._blocks.blocks_for(sequence.max_len - 1)
        if needed > self._blocks.num_blocks:
            room = self._blocks.num_blocks * self._blocks.block_size + 1
            raise RequestError(
                f"prompt and max_tokens make {sequence.max_len} tokens, allowed: {room} (the cache has "
                f"{self._blocks.num_blocks} blocks of {self._blocks.block_size}); ask for fewer tokens",
                field="max_tokens",
            )

    def abort(self, seq_ids: Iterable[int]) -> None:
        """Forget these sequences: no output follows for them. Unknown ids are ignored."""
        for seq_id in seq_ids:
            sequence = self._sequences.pop(seq_id, None)
            if sequence is None:
                continue
            if not sequence.block_table:
                self._remove_waiting(sequence)
                continue
            self._remove_running(sequence)
            if sequence.is_in_flight:
                sequence.is_aborted = True
                self._num_leaving += 1
            else:
                self._release(sequence)

    def _remove_waiting(self, sequence: Sequence) -> None:
        if self._waiting.pop(sequence.seq_id, None) is None:
            del self._preempted[bisect_left(self._preempted, sequence.arrival, key=_arrival)]
        self._num_waiting_tokens -= len(sequence.token_ids)
        self._is_head_stuck = False

    def _remove_running(self, sequence: Sequence) -> None:
        del self._running[bisect_left(self._running, sequence.arrival, key=_arrival)]

    def _release(self, sequence: Sequence) -> None:
        """Give its blocks back and let the workers forget it. It is in no plan that is still unanswered."""
        self._blocks.release(sequence.block_table)
        self._released.append(sequence.seq_id)
        self._is_head_stuck = False

    # --- a step is planned ---

    def schedule(self) -> StepPlan | None:
        """The next step, never without rows; None if nothing can run before an answer or a request comes.

        Sequences that decode come first, then prompts that were begun, then new ones, as far as the token budget,
        ``max_num_seqs`` and the blocks reach.
        """
        if len(self._in_flight) >= self._max_in_flight:
            return None
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        for sequence in self._running:
            if not sequence.is_in_flight:
                (decodes if sequence.num_pending == 1 else prefills).append(sequence)
        draft = _Draft(self._config.max_num_batched_tokens)
        self._schedule_decodes(draft, decodes, prefills)
        prefill_share = self._prefill_share(prefills)
        for sequence in prefills:
            if draft.tokens_left and draft.num_prefill_tokens < prefill_share:
                self._place_prefill(draft, sequence, [])
        self._admit(draft, prefill_share)
        return self._hand_out(draft) if draft.scheduled else None

    def _schedule_decodes(self, draft: _Draft, decodes: list[Sequence], prefills: list[Sequence]) -> None:
        """One row each, oldest first, an even part of them to each plan in flight.

        A block that is missing is taken from the youngest sequence behind it that is in no plan. If there is none,
        the row waits: those in flight come back, the oldest of all runs first then and may take from all others.
        """
        share = -(-len(self._running) // self._max_in_flight)
        # a prompt that was begun gets at least one token, so that no number of younger rows can hold it up
        limit = min(share, draft.tokens_left - bool(prefills))
        index = 0
        while index < min(len(decodes), limit):
            sequence, new_block_ids = decodes[index], []
            if len(sequence.block_table) * self._blocks.block_size == sequence.num_computed:
                while not self._blocks.num_free and (victim := _take_youngest(decodes, prefills, sequence)):
                    self._preempt(victim)
                    draft.is_short_of_blocks = True
                if not self._blocks.num_free:
                    draft.is_short_of_blocks = True
                    return
                new_block_ids = self._blocks.allocate(1)
                sequence.block_table += new_block_ids
            self._place(draft, sequence, 1, new_block_ids)
            index += 1

    def _preempt(self, sequence: Sequence) -> None:
        """Take its blocks; it starts again from its tokens so far, before everything that has never run."""
        self._remove_running(sequence)
        self._release(sequence)
        sequence.restart()
        insort(self._preempted, sequence, key=_arrival)
        self._num_waiting_tokens += len(sequence.token_ids)
        self._num_preemptions += 1

    def _prefill_share(self, prefills: list[Sequence]) -> int:
        """Prompt tokens after which a plan begins no further prompt, so that each free pipeline slot gets some.

        A prompt is never cut for this: its next chunk would have to wait for this one's answer.
        """
        num_tokens = self._num_waiting_tokens + sum(sequence.num_pending for sequence in prefills)
        return -(-num_tokens // (self._max_in_flight - len(self._in_flight)))

    def _admit(self, draft: _Draft, prefill_share: int) -> None:
        """Start the oldest waiting sequences, in order, with blocks for all tokens they have."""
        while (
            draft.tokens_left
            and draft.num_prefill_tokens < prefill_share
            and len(self._running) + self._num_leaving < self._config.max_num_seqs
            and not (self._is_head_stuck or draft.is_short_of_blocks)
        ):
            sequence = self._preempted[0] if self._preempted else next(iter(self._waiting.values()), None)
            if sequence is None:
                return
            if not self._give_blocks(sequence):
                self._is_head_stuck = True
                return
            self._remove_waiting(sequence)
            insort(self._running, sequence, key=_arrival)
            draft.new.append(sequence.introduce())
            self._place_prefill(draft, sequence, sequence.block_table.copy())

    def _give_blocks(self, sequence: Sequence) -> bool:
        """Fill its block table for all its tokens: what the prefix cache has, then new blocks. False: no room now.

        One block for each running sequence is left over, so that what starts now is not preempted at once.
        """
        blocks, num_tokens = self._blocks, len(sequence.token_ids)
        found: list[int] = []
        # a prompt's logprobs need every row computed
        can_reuse = self._enable_prefix_caching and sequence.prompt_logprobs is None
        if can_reuse:
            num_blocks = (num_tokens - 1) // blocks.block_size  # at least one token is left to compute
            found = blocks.find(islice(sequence.hash_blocks(num_blocks, blocks.block_size), num_blocks))
        num_new = blocks.blocks_for(num_tokens) - len(found)
        if num_new + blocks.num_unheld(found) + len(self._running) > blocks.num_free:
            return False
        blocks.hold(found)
        sequence.block_table = found + blocks.allocate(num_new)
        sequence.num_registered = len(found)
        sequence.num_computed = len(found) * blocks.block_size
        if sequence.num_cached is None:
            self._count_first_lookup(sequence, can_reuse)
        return True

    def _count_first_lookup(self, sequence: Sequence, can_reuse: bool) -> None:
        num_prompt_tokens = len(sequence.add.prompt_token_ids)
        sequence.num_cached = min(sequence.num_computed, num_prompt_tokens)
        if can_reuse:
            self._num_prefix_queries += num_prompt_tokens
            self._num_prefix_hits += sequence.num_cached

    def _place_prefill(self, draft: _Draft, sequence: Sequence, new_block_ids: list[int]) -> None:
        num_tokens = min(sequence.num_pending, draft.tokens_left)
        draft.num_prefill_tokens += num_tokens
        self._place(draft, sequence, num_tokens, new_block_ids)

    def _place(self, draft: _Draft, sequence: Sequence, num_tokens: int, new_block_ids: list[int]) -> None:
        start = sequence.num_computed
        stop = start + num_tokens
        samples = stop == len(sequence.token_ids)
        row = ScheduledSequence(
            sequence.add.seq_id, start, num_tokens, sequence.unsent_token_ids(), new_block_ids, samples
        )
        draft.scheduled.append(row)
        draft.sequences.append(sequence)
        draft.tokens_left -= num_tokens
        sequence.num_computed = stop
        sequence.is_in_flight = True
        if self._enable_prefix_caching and stop // self._blocks.block_size > sequence.num_registered:
            self._register(sequence)

    def _register(self, sequence: Sequence) -> None:
        num_full = sequence.num_computed // self._blocks.block_size
        hashes = sequence.hash_blocks(num_full, self._blocks.block_size)
        for index in range(sequence.num_registered, num_full):
            self._blocks.register(sequence.block_table[index], hashes[index])
        sequence.num_registered = num_full

    def _hand_out(self, draft: _Draft) -> StepPlan:
        self._last_planned += 1
        plan = StepPlan(self._last_planned, draft.scheduled, draft.new, self._released)
        self._released = []
        self._in_flight.append((plan, draft.sequences))
        return plan

    # --- a step is answered ---

    def update(self, result: StepResult) -> list[SequenceOutput]:
        """Take the tokens of the oldest unanswered plan: what each sequence gained, in the plan's order.

        Raises ValueError for a result that does not fit that plan.
        """
        plan, sequences = self._in_flight[0] if self._in_flight else (None, [])
        if plan is None or plan.step_id != result.step_id:
            raise ValueError(f"a result of step {result.step_id}, expected {plan.step_id if plan else 'none'}")
        wanted = [row.seq_id for row in plan.scheduled if row.samples]
        if [sampled.seq_id for sampled in result.sampled] != wanted:
            raise ValueError(f"step {plan.step_id} sampled {[s.seq_id for s in result.sampled]}, expected {wanted}")
        self._in_flight.popleft()
        self._last_answered = plan.step_id
        _take_prompt_logprobs(result, sequences)
        sampled_tokens = iter(result.sampled)
        outputs = []
        for row, sequence in zip(plan.scheduled, sequences, strict=True):
            sampled = next(sampled_tokens) if row.samples else None
            sequence.is_in_flight = False
            if sequence.is_aborted:
                self._num_leaving -= 1
                self._release(sequence)
            elif sampled is not None:
                outputs.append(self._take_token(sequence, sampled))
        return outputs

    def _take_token(self, sequence: Sequence, sampled: SampledToken) -> SequenceOutput:
        is_first, token_id = not sequence.has_new_output, sampled.token_id
        sequence.token_ids.append(token_id)
        reason = sequence.finish_reason()
        if reason is not None:
            del self._sequences[sequence.seq_id]
            self._remove_running(sequence)
            self._release(sequence)
        output = SequenceOutput(
            sequence.add.seq_id,
            [token_id],
            None if sampled.logprobs is None else [sampled.logprobs],
            reason,
            token_id if reason == "stop" else None,
            sequence.prompt_logprobs if is_first else None,
            (sequence.num_cached or 0) if is_first else 0,
        )
        if is_first:
            sequence.prompt_logprobs = None
        return output


def _take_youngest(decodes: list[Sequence], prefills: list[Sequence], than: Sequence) -> Sequence | None:
    """Remove the youngest sequence of two lists (in order of arrival) if it is younger than ``than``, one of them."""
    group = prefills if prefills and prefills[-1].arrival > decodes[-1].arrival else decodes
    return group.pop() if group[-1].arrival > than.arrival else None


def _take_prompt_logprobs(result: StepResult, sequences: list[Sequence]) -> None:
    if not result.prompt_logprobs:
        return
    by_id = {sequence.seq_id: sequence for sequence in sequences}
    for gained in result.prompt_logprobs:
        if (entries := by_id[gained.seq_id].prompt_logprobs) is not None:
            entries += gained.entries
