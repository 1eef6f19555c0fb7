"""StepPlan to tensors on a GPU: what the device keeps by slot, the few numbers that a step sends, the batch they make.

Nothing here waits for the device. Each step's numbers leave through pinned memory of their own, which the allocator
keeps until the copy is done; a decode step's always arrive at the same place, so that a CUDA graph can read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from aphro_kernels.decode_work import DecodeWork, plan_decode_
from aphro_kernels.step_rows import (
    BLOCK,
    DRAW_SLOT,
    IS_NEW,
    POSITION,
    ROW_FIELDS,
    TOKEN,
    StepRows,
    build_step_rows,
    step_rows,
)
from torch import Tensor

from aphro_core.layers.batch import Batch, PagedPart, PagedRows
from aphro_core.messages.steps import RowsAgain, ScheduledSequence, StepPlan
from aphro_core.worker.chunk_numbers import ChunkNumbers, chunk_block_size, chunk_numbers, fill_chunk_numbers
from aphro_core.worker.sequences import SequenceState
from aphro_core.worker.step_shapes import StepShape, StepShapes

# Triton compiles a kernel again for a pointer that is not a multiple of 16 bytes: sections begin at multiples of this
_ALIGNED: Final = 16


@dataclass(frozen=True, slots=True)
class PagedStep:
    """One plan, sent. ``draws`` are the sequences of the rows that get logits, ``draw_slots`` where their tokens go.

    It is the same list as in the step before if nothing about them has changed.
    """

    num_rows: int  # of one token
    shape: StepShape
    chunks: list[ScheduledSequence]  # the rows that are not one token each
    numbers: ChunkNumbers | None  # theirs, sent
    first_rows: dict[int, int]  # seq_id -> its first row of hidden states; only with chunks
    draws: list[int]
    wanted: list[int] | None  # those of them whose tokens count, by index; None: all
    draw_rows: Tensor | None  # [draws] int64 rows of the hidden states; None: the first num_rows, all of them
    draw_slots: Tensor
    draw_positions: Tensor  # [draws] int64 of the tokens that are read; decode steps: where the step puts them


class PagedInputs:
    def __init__(
        self,
        *,
        max_rows: int,
        max_model_len: int,
        block_size: int,
        shapes: StepShapes,
        device: torch.device,
        num_kv_heads: int = 1,
        works: Mapping[int | None, DecodeWork] = MappingProxyType({}),
        keeps_tokens: bool = True,
    ) -> None:
        """``works``: how decode attention is shared out on a GPU, for each window among the layers. ``keeps_tokens``:
        whether a token is in ``last_token_ids`` before the next step, also if the host knows it."""
        max_blocks = -(-max_model_len // (block_size * _ALIGNED)) * _ALIGNED
        self.last_token_ids = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)
        self._block_tables = torch.zeros(max_rows + 1, max_blocks, dtype=torch.int32, device=device)
        self._sent = torch.zeros(max_rows, ROW_FIELDS, dtype=torch.int64, device=device)
        self._rows = build_step_rows(max_rows, max_blocks, device)
        self._shapes = shapes
        sizes = [chunk_block_size(shape) for shape in shapes.padded if shape.num_seqs]
        self._chunk_block = torch.zeros(max(sizes, default=0), dtype=torch.int64, device=device)  # of padded steps
        self._row_starts = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._block_size, self._max_blocks, self._max_model_len = block_size, max_blocks, max_model_len
        self._device = device
        self._num_kv_heads, self._works, self._keeps_tokens = num_kv_heads, works, keeps_tokens
        self._no_slot = max_rows  # the place of padding
        self._padding = (self._no_slot, -1, 0, -1, self._no_slot, 0)
        self._no_row = (self._no_slot, -2, 0, -1, self._no_slot, 0)
        self._slots: dict[int, int] = {}  # seq_id -> slot
        self._steady: tuple[list[int], np.ndarray] | None = None  # a decode step's sequences, and what was sent of them
        self._max_rows = max_rows
        self.forget_all()

    def forget_all(self) -> None:
        """No sequence has a slot."""
        self._slots.clear()
        self._steady = None
        self._free = list(range(self._max_rows - 1, -1, -1))

    def clear(self) -> None:
        """What was sent last is zeros, which any shape can read: token 0 at position 0, no chunk."""
        self._sent.zero_()
        self._chunk_block.zero_()

    def stage(self, plan: StepPlan, sequences: dict[int, SequenceState]) -> PagedStep:
        """Send what a plan changes. It was applied to ``sequences``."""
        if plan.forgets_all:
            self.forget_all()
        for seq_id in plan.released:
            if (slot := self._slots.pop(seq_id, None)) is not None:
                self._free.append(slot)
        for new in plan.new:
            self._slots[new.seq_id] = self._free.pop()
        if plan.again is not None:
            return self._stage_again(plan.again, sequences)
        self._steady = None
        decode = [entry for entry in plan.scheduled if entry.num_tokens == 1]
        chunks = [entry for entry in plan.scheduled if entry.num_tokens > 1]
        if chunks:
            shape = self._shapes.with_chunks(plan.num_tokens, len(decode), len(chunks))
        else:
            shape = self._shapes.of_rows(len(decode))
        table_at: list[int] = []
        table_blocks: list[int] = []
        for entry in chunks:
            self._note_blocks(entry, sequences[entry.seq_id], table_at, table_blocks)
        values = self._row_values(decode, shape, sequences, table_at, table_blocks)
        if plan.new:
            begun = {sequence.seq_id for sequence in plan.new}
            values[: len(decode), IS_NEW] = [entry.seq_id in begun for entry in decode]
        self._send_rows(values)
        if table_at:
            self._write_tables(table_at, table_blocks)
        if not chunks:
            seq_ids = [entry.seq_id for entry in decode]
            wanted = [index for index, entry in enumerate(decode) if entry.samples]
            if len(wanted) == len(decode):
                self._steady = seq_ids, values
                return self._decode_step(seq_ids, shape)
            return self._decode_step(seq_ids, shape, wanted)
        return self._send_chunks(plan, chunks, sequences, shape)

    def _stage_again(self, again: RowsAgain, sequences: dict[int, SequenceState]) -> PagedStep:
        """The rows of the step before, each one token on: their numbers are those sent last, but for three."""
        assert self._steady is not None, "only rows that all decoded may come again"
        assert self._keeps_tokens
        if again.without:
            self._steady = self._leave_out(again.without, *self._steady)
        seq_ids, values = self._steady
        assert len(seq_ids) == again.num_rows
        ours = values[: again.num_rows]
        ours[:, POSITION] += 1
        ours[:, TOKEN] = -1  # drawn by the step before, and kept here
        ours[:, BLOCK] = -1
        ours[:, IS_NEW] = 0
        for index, block in again.new_blocks:
            ours[index, BLOCK] = block
            sequences[seq_ids[index]].block_table.append(block)
        self._send_rows(values)
        return self._decode_step(seq_ids, self._shapes.of_rows(len(values)))

    def _leave_out(self, without: list[int], seq_ids: list[int], values: np.ndarray) -> tuple[list[int], np.ndarray]:
        kept = seq_ids.copy()
        for index in reversed(without):
            del kept[index]
        padded = np.empty((self._shapes.of_rows(len(kept)).num_rows, ROW_FIELDS), dtype=np.int64)
        padded[: len(kept)] = np.delete(values[: len(seq_ids)], without, axis=0)
        padded[len(kept) :] = self._padding
        return kept, padded

    def _decode_step(self, draws: list[int], shape: StepShape, wanted: list[int] | None = None) -> PagedStep:
        num_rows = len(draws)
        sent, positions = self._sent[:num_rows], self._rows.positions[:num_rows]
        return PagedStep(num_rows, shape, [], None, {}, draws, wanted, None, sent[:, DRAW_SLOT], positions)

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
                begins = len(state.block_table) - 1 == entry.start // self._block_size
                if begins and len(entry.new_block_ids) == 1:
                    block = entry.new_block_ids[0]
                else:
                    self._note_blocks(entry, state, table_at, table_blocks)
            token = known[entry.start] if entry.start < len(known) else -1
            values += (slot, entry.start, token, block, slot if entry.samples else self._no_slot, 0)
        padded = np.empty((shape.num_rows, ROW_FIELDS), dtype=np.int64)
        padded[: len(decode)] = np.array(values, dtype=np.int64).reshape(-1, ROW_FIELDS)
        padded[len(decode) :] = self._no_row if shape.num_seqs else self._padding
        return padded

    def _send_rows(self, values: np.ndarray) -> None:
        if len(values):
            self._sent.view(-1)[: values.size].copy_(self._pin(values.reshape(-1)), non_blocking=True)

    def _note_blocks(
        self, entry: ScheduledSequence, state: SequenceState, table_at: list[int], table_blocks: list[int]
    ) -> None:
        stop = len(state.block_table)
        start = self._slots[entry.seq_id] * self._max_blocks
        table_at += range(start + stop - len(entry.new_block_ids), start + stop)
        table_blocks += entry.new_block_ids

    def _send_chunks(
        self,
        plan: StepPlan,
        chunks: list[ScheduledSequence],
        sequences: dict[int, SequenceState],
        shape: StepShape,
    ) -> PagedStep:
        block = np.zeros(chunk_block_size(shape), dtype=np.int64)
        first_rows = fill_chunk_numbers(chunk_numbers(shape, block), plan, sequences, self._slots, self._block_size)
        sent = self._send_block(block, shape)
        draws = [entry.seq_id for entry in plan.scheduled if entry.samples]
        return PagedStep(
            num_rows=len(plan.scheduled) - len(chunks),
            shape=shape,
            chunks=chunks,
            numbers=sent,
            first_rows=first_rows,
            draws=draws,
            wanted=None,
            draw_rows=sent.draw_rows[: len(draws)],
            draw_slots=sent.draw_slots[: len(draws)],
            draw_positions=sent.draw_positions[: len(draws)],
        )

    def _send_block(self, block: np.ndarray, shape: StepShape) -> ChunkNumbers:
        """A padded step's to the place that graphs read, any other's to one of its own."""
        pinned = self._pin(block)
        if self._shapes.has(shape):
            return chunk_numbers(shape, self._chunk_block[: len(block)].copy_(pinned, non_blocking=True))
        return chunk_numbers(shape, pinned.to(self._device, non_blocking=True))

    def _write_tables(self, at: list[int], blocks: list[int]) -> None:
        sent = self._pin(np.array([at, blocks], dtype=np.int64).reshape(-1)).to(self._device, non_blocking=True)
        where, what = sent[: len(at)], sent[len(at) :]
        self._block_tables.view(-1).index_copy_(0, where, what.to(torch.int32))

    def _pin(self, values: np.ndarray) -> Tensor:
        made = torch.from_numpy(values)
        if self._device.type == "cpu":
            return made
        pinned = torch.empty(len(values), dtype=torch.int64, pin_memory=True)
        pinned.copy_(made)
        return pinned

    def decode_batch(self, num_rows: int) -> Batch:
        """The rows of one token, as sent last, ``num_rows`` with padding. Fit for a CUDA graph."""
        rows, part = self._decode_part(num_rows, self._rows)
        return Batch(rows.token_ids, rows.positions, PagedRows(rows.slot_mapping, [part]), {}, self._row_starts[:0])

    def mixed_batch(self, step: PagedStep) -> Batch:
        """Rows of one token, then chunks, then padding; at least one row to draw from, wanted or not."""
        assert step.numbers is not None
        batch = self._batch_of(step.shape, step.numbers, max(len(step.draws), 1))
        batch.first_rows = step.first_rows
        return batch

    def padded_batch(self, shape: StepShape) -> Batch:
        """Of a padded step, as sent last, its rows to draw from padded too. Fit for a CUDA graph."""
        if not shape.num_seqs:
            return self.decode_batch(shape.num_rows)
        return self._batch_of(shape, chunk_numbers(shape, self._chunk_block), shape.num_rows)

    def _batch_of(self, shape: StepShape, numbers: ChunkNumbers, num_draws: int) -> Batch:
        parts = [
            PagedPart(  # first: it may give zeros to the rows of one token
                start=0,
                stop=shape.num_tokens,
                block_tables=self._block_tables.index_select(0, numbers.slots),
                seq_lens=numbers.seq_lens,
                query_start_loc=numbers.query_start_loc,
                max_query_len=shape.num_tokens,
                max_seq_len=self._max_model_len,
                num_seqs=numbers.num_seqs,
                is_long=shape.is_long,
            )
        ]
        if shape.num_rows:
            views = (numbers.token_ids, numbers.positions, numbers.slot_mapping)
            out = StepRows(*views, self._rows.seq_lens, self._rows.block_tables)
            parts.append(self._decode_part(shape.num_rows, out)[1])
        rows = PagedRows(numbers.slot_mapping, parts)
        return Batch(numbers.token_ids, numbers.positions, rows, {}, numbers.draw_rows[:num_draws])

    def _decode_part(self, num_rows: int, out: StepRows) -> tuple[StepRows, PagedPart]:
        sent = self._sent[:num_rows]
        rows = step_rows(sent, self.last_token_ids, self._block_tables, block_size=self._block_size, out=out)
        for work in self._works.values():
            plan_decode_(work, rows.seq_lens, self._num_kv_heads, is_new=sent[:, IS_NEW])
        part = PagedPart(
            start=0,
            stop=num_rows,
            block_tables=rows.block_tables,
            seq_lens=rows.seq_lens,
            query_start_loc=self._row_starts[: num_rows + 1],
            max_query_len=1,
            max_seq_len=self._max_model_len,
            works=self._works,
        )
        return rows, part
