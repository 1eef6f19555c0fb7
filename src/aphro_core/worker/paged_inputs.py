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
from aphro_core.worker.sequences import SequenceState

# Triton compiles a kernel again for a pointer that is not a multiple of 16 bytes: sections begin at multiples of this
_ALIGNED: Final = 16


@dataclass(frozen=True, slots=True)
class Chunks:
    """The rows of a step that are not one token each: their numbers, sent."""

    entries: list[ScheduledSequence]
    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    slots: Tensor
    max_query_len: int
    max_seq_len: int


@dataclass(frozen=True, slots=True)
class PagedStep:
    """One plan, sent. ``draws`` are the sequences of the rows that get logits, ``draw_slots`` where their tokens go.

    It is the same list as in the step before if nothing about them has changed.
    """

    num_rows: int  # of one token
    padded_rows: int
    chunks: Chunks | None
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
        self._row_starts = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._block_size, self._max_blocks, self._max_model_len = block_size, max_blocks, max_model_len
        self._device = device
        self._num_kv_heads, self._works, self._keeps_tokens = num_kv_heads, works, keeps_tokens
        self._no_slot = max_rows  # the place of padding
        self._padding = (self._no_slot, -1, 0, -1, self._no_slot, 0)
        self._slots: dict[int, int] = {}  # seq_id -> slot
        self._steady: tuple[list[int], np.ndarray] | None = None  # a decode step's sequences, and what was sent of them
        self._max_rows = max_rows
        self.forget_all()

    def forget_all(self) -> None:
        """No sequence has a slot."""
        self._slots.clear()
        self._steady = None
        self._free = list(range(self._max_rows - 1, -1, -1))

    def stage(self, plan: StepPlan, sequences: dict[int, SequenceState], pad: Sequence[int]) -> PagedStep:
        """Send what a plan changes. It was applied to ``sequences``; a step without chunks is padded to one of
        ``pad``, rising numbers of rows."""
        if plan.forgets_all:
            self.forget_all()
        for seq_id in plan.released:
            if (slot := self._slots.pop(seq_id, None)) is not None:
                self._free.append(slot)
        for new in plan.new:
            self._slots[new.seq_id] = self._free.pop()
        if plan.again is not None:
            return self._stage_again(plan.again, sequences, pad)
        self._steady = None
        decode = [entry for entry in plan.scheduled if entry.num_tokens == 1]
        chunks = [entry for entry in plan.scheduled if entry.num_tokens > 1]
        num_rows = len(decode)
        padded = num_rows if chunks else next(size for size in pad if size >= num_rows)
        table_at: list[int] = []
        table_blocks: list[int] = []
        for entry in chunks:
            self._note_blocks(entry, sequences[entry.seq_id], table_at, table_blocks)
        values = self._row_values(decode, padded, sequences, table_at, table_blocks)
        if plan.new:
            begun = {sequence.seq_id for sequence in plan.new}
            values[: len(decode), IS_NEW] = [entry.seq_id in begun for entry in decode]
        self._send_rows(values)
        if not chunks:
            if table_at:
                self._write_tables(*self._send([table_at, table_blocks]))
            seq_ids = [entry.seq_id for entry in decode]
            wanted = [index for index, entry in enumerate(decode) if entry.samples]
            if len(wanted) == num_rows:
                self._steady = seq_ids, values
                return self._decode_step(seq_ids, padded)
            return self._decode_step(seq_ids, padded, wanted)
        return self._send_chunks(plan, decode, chunks, sequences, table_at, table_blocks)

    def _stage_again(self, again: RowsAgain, sequences: dict[int, SequenceState], pad: Sequence[int]) -> PagedStep:
        """The rows of the step before, each one token on: their numbers are those sent last, but for three."""
        assert self._steady is not None, "only rows that all decoded may come again"
        assert self._keeps_tokens
        if again.without:
            self._steady = self._leave_out(again.without, *self._steady, pad)
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
        return self._decode_step(seq_ids, len(values))

    def _leave_out(
        self, without: list[int], seq_ids: list[int], values: np.ndarray, pad: Sequence[int]
    ) -> tuple[list[int], np.ndarray]:
        kept = seq_ids.copy()
        for index in reversed(without):
            del kept[index]
        padded = np.empty((next(size for size in pad if size >= len(kept)), ROW_FIELDS), dtype=np.int64)
        padded[: len(kept)] = np.delete(values[: len(seq_ids)], without, axis=0)
        padded[len(kept) :] = self._padding
        return kept, padded

    def _decode_step(self, draws: list[int], padded: int, wanted: list[int] | None = None) -> PagedStep:
        num_rows = len(draws)
        sent, positions = self._sent[:num_rows], self._rows.positions[:num_rows]
        return PagedStep(num_rows, padded, None, {}, draws, wanted, None, sent[:, DRAW_SLOT], positions)

    def _row_values(
        self,
        decode: Sequence[ScheduledSequence],
        padded: int,
        sequences: dict[int, SequenceState],
        table_at: list[int],
        table_blocks: list[int],
    ) -> np.ndarray:
        """``[padded, ROW_FIELDS]``; blocks that do not fit in go to ``table_at`` and ``table_blocks``."""
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
        values += self._padding * (padded - len(decode))
        return np.array(values, dtype=np.int64).reshape(padded, ROW_FIELDS)

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
        decode: Sequence[ScheduledSequence],
        chunks: list[ScheduledSequence],
        sequences: dict[int, SequenceState],
        table_at: list[int],
        table_blocks: list[int],
    ) -> PagedStep:
        first_rows = {entry.seq_id: row for row, entry in enumerate(decode)}
        tokens, positions, slot_mapping, starts = [], [], [], [0]
        for entry in chunks:
            state, stop = sequences[entry.seq_id], entry.start + entry.num_tokens
            first_rows[entry.seq_id] = len(decode) + starts[-1]
            starts.append(starts[-1] + entry.num_tokens)
            at = np.arange(entry.start, stop)
            blocks = np.frombuffer(state.block_table, dtype=np.int64)
            tokens.append(np.array(state.row.token_ids[entry.start : stop], dtype=np.int64))
            positions.append(at)
            slot_mapping.append(blocks[at // self._block_size] * self._block_size + at % self._block_size)
            del blocks  # an array that is looked at cannot grow
        draws = [entry for entry in plan.scheduled if entry.samples]
        seq_lens = [entry.start + entry.num_tokens for entry in chunks]
        sent = self._send(
            [
                np.concatenate(tokens),
                np.concatenate(positions),
                np.concatenate(slot_mapping),
                [first_rows[entry.seq_id] + entry.num_tokens - 1 for entry in draws],
                [self._slots[entry.seq_id] for entry in draws],
                table_at,
                table_blocks,
                [self._slots[entry.seq_id] for entry in chunks],
                seq_lens,
                starts,
                [entry.start + entry.num_tokens - 1 for entry in draws],
            ]
        )
        if table_at:
            self._write_tables(sent[5], sent[6])
        return PagedStep(
            num_rows=len(decode),
            padded_rows=len(decode),
            chunks=Chunks(
                entries=chunks,
                token_ids=sent[0],
                positions=sent[1],
                slot_mapping=sent[2],
                seq_lens=sent[8].to(torch.int32),
                query_start_loc=sent[9].to(torch.int32),
                slots=sent[7],
                max_query_len=max(entry.num_tokens for entry in chunks),
                max_seq_len=max(seq_lens),
            ),
            first_rows=first_rows,
            draws=[entry.seq_id for entry in draws],
            wanted=None,
            draw_rows=sent[3],
            draw_slots=sent[4],
            draw_positions=sent[10],
        )

    def _write_tables(self, at: Tensor, blocks: Tensor) -> None:
        self._block_tables.view(-1).index_copy_(0, at, blocks.to(torch.int32))

    def _send(self, sections: Sequence[Sequence[int] | np.ndarray]) -> list[Tensor]:
        """Each section on the device, int64, in one copy."""
        arrays = [np.asarray(section, dtype=np.int64) for section in sections]
        starts = np.cumsum([0, *(-(-len(array) // _ALIGNED) * _ALIGNED for array in arrays)])
        whole = np.zeros(starts[-1], dtype=np.int64)
        for start, array in zip(starts, arrays, strict=False):
            whole[start : start + len(array)] = array
        sent = self._pin(whole).to(self._device, non_blocking=True)
        return [sent[start : start + len(array)] for start, array in zip(starts.tolist(), arrays, strict=False)]

    def _pin(self, values: np.ndarray) -> Tensor:
        made = torch.from_numpy(values)
        if self._device.type == "cpu":
            return made
        pinned = torch.empty(len(values), dtype=torch.int64, pin_memory=True)
        pinned.copy_(made)
        return pinned

    def decode_batch(self, num_rows: int) -> Batch:
        """The rows of one token, as sent last, ``num_rows`` with padding. Fit for a CUDA graph."""
        rows, part = self._decode_part(num_rows)
        return Batch(rows.token_ids, rows.positions, PagedRows(rows.slot_mapping, [part]), {}, self._row_starts[:0])

    def mixed_batch(self, step: PagedStep) -> Batch:
        """Rows of one token, then chunks."""
        chunks = step.chunks
        assert chunks is not None
        assert step.draw_rows is not None
        token_ids, positions, slots = chunks.token_ids, chunks.positions, chunks.slot_mapping
        parts = []
        if step.num_rows:
            rows, part = self._decode_part(step.num_rows)
            token_ids = torch.cat((rows.token_ids, token_ids))
            positions = torch.cat((rows.positions, positions))
            slots = torch.cat((rows.slot_mapping, slots))
            parts.append(part)
        parts.append(
            PagedPart(
                start=step.num_rows,
                stop=len(token_ids),
                block_tables=self._block_tables.index_select(0, chunks.slots),
                seq_lens=chunks.seq_lens,
                query_start_loc=chunks.query_start_loc,
                max_query_len=chunks.max_query_len,
                max_seq_len=chunks.max_seq_len,
            )
        )
        return Batch(token_ids, positions, PagedRows(slots, parts), step.first_rows, step.draw_rows)

    def _decode_part(self, num_rows: int) -> tuple[StepRows, PagedPart]:
        sent = self._sent[:num_rows]
        rows = step_rows(sent, self.last_token_ids, self._block_tables, block_size=self._block_size, out=self._rows)
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
