"""A worker without a model: it keeps what real workers keep, and fails when a plan would make them read wrong."""

from __future__ import annotations

from aphro_core.messages.requests import AddSequence
from aphro_core.messages.steps import (
    NewSequence,
    PromptLogprobs,
    ScheduledSequence,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from aphro_core.request import FinishReason

_ROOT = 1469598103934665603


def chain(previous: int, token_id: int) -> int:
    """A number for a token and all that came before it; integers hash alike in every run."""
    return hash((previous, token_id))


def root(cache_salt: str) -> int:
    """Sequences of different salts have nothing in common, so that sharing between them shows as a wrong read."""
    return chain(_ROOT, int.from_bytes(cache_salt.encode(), "little"))


def draw(history: int, vocab_size: int) -> int:
    """The next token: a function of the history alone, as greedy sampling is."""
    return (history >> 7) % vocab_size


def run_alone(add: AddSequence, vocab_size: int, max_model_len: int) -> tuple[list[int], FinishReason, int | None]:
    """The output tokens of a sequence, why it ended, and its stop token, computed without any scheduler."""
    history, output_token_ids = root(add.cache_salt), list(add.output_token_ids)
    for token_id in add.prompt_token_ids + output_token_ids:
        history = chain(history, token_id)
    while True:
        if output_token_ids and output_token_ids[-1] in add.stop_token_ids:
            return output_token_ids, "stop", output_token_ids[-1]
        length = len(add.prompt_token_ids) + len(output_token_ids)
        if len(output_token_ids) >= add.max_tokens or length >= max_model_len:
            return output_token_ids, "length", None
        output_token_ids.append(draw(history, vocab_size))
        history = chain(history, output_token_ids[-1])


class _Known:
    """What a worker keeps of a sequence."""

    def __init__(self, new: NewSequence, cache_salt: str) -> None:
        self.new = new
        self.token_ids = list(new.token_ids)  # and what it draws itself
        self.num_told = len(new.token_ids)
        self.needs_counts = new.sampling.repetition_penalty != 1.0
        self.block_table: list[int] = []
        self.num_computed = 0  # as far as a row of its own, or its first row's start, says
        self.histories = [root(cache_salt)]  # the history before position 0, 1, ...
        self.extend_histories()

    def extend_histories(self) -> None:
        for token_id in self.token_ids[len(self.histories) - 1 :]:
            self.histories.append(chain(self.histories[-1], token_id))


class FakeWorker:
    """Applies plans in order: released, new, then all writes of a plan, then all its reads.

    ``cache[block_id, offset]`` stands for the keys and values of one position: the history of the token there.
    """

    def __init__(
        self, *, num_blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, vocab_size: int
    ) -> None:
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._vocab_size = vocab_size
        self._cache: dict[tuple[int, int], int] = {}
        self._last_step_id = 0
        self._last_rows: list[ScheduledSequence] = []
        self.known: dict[int, _Known] = {}
        self.num_tokens_computed = 0

    def spell_out(self, plan: StepPlan) -> StepPlan:
        """The plan with its rows, if it only says which of the plan before come again."""
        again = plan.again
        if again is None:
            return plan
        assert not plan.new
        assert not plan.scheduled
        assert again.without == sorted(set(again.without))
        assert all(row.samples for row in self._last_rows), "rows that come again draw"
        left = [row for index, row in enumerate(self._last_rows) if index not in again.without]
        assert len(self._last_rows) - len(again.without) == len(left) == again.num_rows
        blocks = dict(again.new_blocks)
        assert len(blocks) == len(again.new_blocks)
        assert not blocks or max(blocks) < len(left)
        scheduled = [
            ScheduledSequence(
                row.seq_id, row.start + row.num_tokens, 1, [], [blocks[i]] if i in blocks else [], samples=True
            )
            for i, row in enumerate(left)
        ]
        return StepPlan(plan.step_id, scheduled, released=plan.released)

    def note_rows(self, plan: StepPlan) -> None:
        """Those of a plan that is handed out; its answer may never come."""
        self._last_rows = plan.scheduled

    def execute(self, plan: StepPlan, salts: dict[int, str]) -> StepResult:
        """The answer to a plan with all its rows. ``salts`` are the cache salts of its new sequences, which real
        workers do not need."""
        self._last_rows = plan.scheduled
        assert plan.step_id == self._last_step_id + 1
        self._last_step_id = plan.step_id
        assert 1 <= len(plan.scheduled) <= self._max_num_seqs
        assert plan.num_tokens <= self._max_num_batched_tokens
        assert len({row.seq_id for row in plan.scheduled}) == len(plan.scheduled)
        for seq_id in plan.released:
            del self.known[seq_id]
        for new in plan.new:
            assert new.seq_id not in self.known, f"sequence {new.seq_id} is new a second time"
            self.known[new.seq_id] = _Known(new, salts[new.seq_id])
        assert len(self.known) <= self._max_num_seqs, "the workers' memory of sequences is bounded by max_num_seqs"
        is_new = {new.seq_id for new in plan.new}
        assert is_new <= {row.seq_id for row in plan.scheduled}
        for row in plan.scheduled:
            self._write(row, is_new=row.seq_id in is_new)
        sampled = [self._read(row) for row in plan.scheduled]
        for state in self.known.values():
            state.extend_histories()
        prompt_logprobs = [entries for row in plan.scheduled if (entries := self._prompt_logprobs(row)) is not None]
        drawn = [token for token in sampled if token is not None]
        return StepResult(plan.step_id, drawn, prompt_logprobs=prompt_logprobs)

    def _write(self, row: ScheduledSequence, *, is_new: bool) -> None:
        state = self.known[row.seq_id]
        assert is_new or row.start == state.num_computed, "a row goes on where the last one ended"
        assert not (is_new and row.token_ids), "NewSequence carries all tokens"
        # what it drew itself it knows already; it is told all the same, as soon as somebody has read it
        state.num_told += len(row.token_ids)
        assert row.token_ids == state.token_ids[state.num_told - len(row.token_ids) : state.num_told]
        state.block_table += row.new_block_ids
        stop = row.start + row.num_tokens
        assert row.num_tokens >= 1
        assert stop <= len(state.token_ids), "a row of tokens that nobody has sent"
        assert stop <= len(state.block_table) * self._block_size, "a row without room in its block table"
        assert row.samples == (stop == len(state.token_ids))
        assert all(0 <= block_id < self._num_blocks for block_id in row.new_block_ids)
        assert len(set(state.block_table)) == len(state.block_table)
        state.num_computed = stop
        self.num_tokens_computed += row.num_tokens
        for position in range(row.start, stop):
            self._cache[self._slot(state, position)] = state.histories[position + 1]

    def _read(self, row: ScheduledSequence) -> int | None:
        state = self.known[row.seq_id]
        for position in range(state.num_computed):
            found = self._cache.get(self._slot(state, position))
            assert found == state.histories[position + 1], f"sequence {row.seq_id} reads wrong at position {position}"
        if not row.samples:
            return None
        token_id = draw(state.histories[-1], self._vocab_size)
        if state.needs_counts:
            assert state.num_told == len(state.token_ids), "penalties without a token that was drawn"
        state.token_ids.append(token_id)
        return token_id

    def _prompt_logprobs(self, row: ScheduledSequence) -> PromptLogprobs | None:
        state = self.known[row.seq_id]
        if state.new.sampling.prompt_logprobs is None or row.start >= state.new.num_prompt_tokens:
            return None
        stop = min(row.start + row.num_tokens + 1, state.new.num_prompt_tokens)
        predicted = state.token_ids[row.start + 1 : stop]
        return PromptLogprobs(row.seq_id, [TokenLogprobs([token_id], [0.0], 1) for token_id in predicted])

    def _slot(self, state: _Known, position: int) -> tuple[int, int]:
        return state.block_table[position // self._block_size], position % self._block_size
