"""StepPlan to the few numbers that a GPU is sent of it: who has which slot, what it knows of a row already.

A step of the same rows as the one before is sent nothing, unless one of them begins a block or has left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from aphro_kernels.step_rows import ANSWER, IS_NEW, ROW_FIELDS

from aphro_core.messages.steps import RowsAgain, ScheduledSequence, StepPlan
from aphro_core.worker.chunk_numbers import chunk_block_size, chunk_numbers, fill_chunk_numbers
from aphro_core.worker.sequences import SequenceState
from aphro_core.worker.steady_rows import SteadyRows
from aphro_core.worker.step_memory import PagedStep, StepMemory
from aphro_core.worker.step_shapes import StepShape, StepShapes


class PagedInputs:
    def __init__(self, memory: StepMemory, shapes: StepShapes, *, keeps_tokens: bool = True) -> None:
        """``keeps_tokens``: whether a token is in ``memory.last_token_ids`` before the next step, also if the host
        knows it."""
        self._memory, self._shapes, self._keeps_tokens = memory, shapes, keeps_tokens
        self._no_slot = memory.max_rows  # the place of padding
        self._padding = (self._no_slot, -1, 0, -1, self._no_slot, 0, -1)
        self._no_row = (self._no_slot, -2, 0, -1, self._no_slot, 0, -1)
        self._slots: dict[int, int] = {}  # seq_id -> slot
        self._steady: SteadyRows | None = None
        self.forget_all()

    def forget_all(self) -> None:
        """No sequence has a slot."""
        self._slots.clear()
        self._steady = None
        self._free = list(range(self._memory.max_rows - 1, -1, -1))

    def stage(self, plan: StepPlan, sequences: dict[int, SequenceState], place: int = 0) -> PagedStep:
        """Send what a plan changes. It was applied to ``sequences``. ``place``: of the first row's answer."""
        if plan.forgets_all:
            self.forget_all()
        for seq_id in plan.released:
            if (slot := self._slots.pop(seq_id, None)) is not None:
                self._free.append(slot)
        if plan.again is not None:
            return self._stage_again(plan.again, sequences, place)
        for new in plan.new:
            self._slots[new.seq_id] = self._free.pop()
        self._steady = None
        chunks = [entry for entry in plan.scheduled if entry.num_tokens > 1]
        decode = [entry for entry in plan.scheduled if entry.num_tokens == 1] if chunks else plan.scheduled
        if chunks:
            shape = self._shapes.with_chunks(plan.num_tokens, len(decode), len(chunks))
        else:
            shape = self._shapes.of_rows(len(decode))
        values = self._send_rows(plan, decode, chunks, sequences, shape, place)
        if chunks:
            return self._send_chunks(plan, chunks, sequences, shape, place)
        wanted = [index for index, entry in enumerate(decode) if entry.samples]
        are_all = len(wanted) == len(decode)
        seq_ids = [entry.seq_id for entry in decode]
        step = PagedStep(len(decode), shape, [], None, {}, seq_ids, None if are_all else wanted)
        if are_all:
            self._steady = SteadyRows(step, values)
        return step

    def _stage_again(self, again: RowsAgain, sequences: dict[int, SequenceState], place: int) -> PagedStep:
        """The rows of the step before, each one token on."""
        steady = self._steady
        assert steady is not None, "only rows that all decoded may come again"
        assert self._keeps_tokens
        if again.without:
            steady = self._steady = self._leave_out(again.without, steady)
        step = steady.step
        assert step.num_rows == again.num_rows
        steady.go_on()
        for index, block in again.new_blocks:
            sequences[step.draws[index]].block_table.append(block)
        if again.without or again.new_blocks:
            self._memory.send_rows(steady.values(again.new_blocks, place))
        return step

    def _leave_out(self, without: list[int], steady: SteadyRows) -> SteadyRows:
        kept = steady.step.draws.copy()
        for index in reversed(without):
            del kept[index]
        step = PagedStep(len(kept), self._shapes.of_rows(len(kept)), [], None, {}, kept, None)
        return steady.leave_out(without, step, self._padding)

    def _send_rows(
        self,
        plan: StepPlan,
        decode: Sequence[ScheduledSequence],
        chunks: Sequence[ScheduledSequence],
        sequences: dict[int, SequenceState],
        shape: StepShape,
        place: int,
    ) -> np.ndarray:
        """Rows of one token, and the blocks that have no room in them. Returns what was sent of the rows."""
        at: list[int] = []
        blocks: list[int] = []
        for entry in chunks:
            self._note_blocks(entry, sequences[entry.seq_id], at, blocks)
        values = self._row_values(decode, shape, sequences, at, blocks)
        values[: len(decode), ANSWER] = np.arange(place, place + len(decode))
        if plan.new:
            begun = {sequence.seq_id for sequence in plan.new}
            values[: len(decode), IS_NEW] = [entry.seq_id in begun for entry in decode]
        self._memory.send_rows(values)
        if at:
            self._memory.write_tables(at, blocks)
        return values

    def _row_values(
        self,
        decode: Sequence[ScheduledSequence],
        shape: StepShape,
        sequences: dict[int, SequenceState],
        table_at: list[int],
        table_blocks: list[int],
    ) -> np.ndarray:
        """``[shape.num_rows, ROW_FIELDS]``; blocks that do not fit in go to ``table_at`` and ``table_blocks``."""
        values: list[int] = []
        for entry in decode:
            state, slot, block = sequences[entry.seq_id], self._slots[entry.seq_id], -1
            known = state.row.token_ids
            if entry.new_block_ids:
                begins = len(state.block_table) - 1 == entry.start // self._memory.block_size
                if begins and len(entry.new_block_ids) == 1:
                    block = entry.new_block_ids[0]
                else:
                    self._note_blocks(entry, state, table_at, table_blocks)
            token = known[entry.start] if entry.start < len(known) else -1
            values += (slot, entry.start, token, block, slot if entry.samples else self._no_slot, 0, 0)
        padded = np.empty((shape.num_rows, ROW_FIELDS), dtype=np.int64)
        padded[: len(decode)] = np.array(values, dtype=np.int64).reshape(-1, ROW_FIELDS)
        padded[len(decode) :] = self._no_row if shape.num_seqs else self._padding
        return padded

    def _note_blocks(
        self, entry: ScheduledSequence, state: SequenceState, table_at: list[int], table_blocks: list[int]
    ) -> None:
        stop = len(state.block_table)
        start = self._slots[entry.seq_id] * self._memory.max_blocks
        table_at += range(start + stop - len(entry.new_block_ids), start + stop)
        table_blocks += entry.new_block_ids

    def _send_chunks(
        self,
        plan: StepPlan,
        chunks: list[ScheduledSequence],
        sequences: dict[int, SequenceState],
        shape: StepShape,
        place: int,
    ) -> PagedStep:
        block = np.zeros(chunk_block_size(shape), dtype=np.int64)
        numbers = chunk_numbers(shape, block)
        first_rows = fill_chunk_numbers(numbers, plan, sequences, self._slots, self._memory.block_size, place)
        draws = [entry.seq_id for entry in plan.scheduled if entry.samples]
        return PagedStep(
            num_rows=len(plan.scheduled) - len(chunks),
            shape=shape,
            chunks=chunks,
            numbers=self._memory.send_chunks(block, shape),
            first_rows=first_rows,
            draws=draws,
            wanted=None,
        )
