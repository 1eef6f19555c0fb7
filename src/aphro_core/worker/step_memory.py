"""What the kernels of a step read and write on a GPU, in fixed memory, and the batch that it makes.

Nothing here waits for the device. Each step's numbers leave through pinned memory of their own, which the allocator
keeps until the copy is done; a padded step's always arrive at the same place, so that a CUDA graph can read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from aphro_kernels.begin_step import BegunRows, RowStart, begin_step
from aphro_kernels.decode_work import DecodeWork, plan_decode_
from aphro_kernels.step_rows import (
    ANSWER,
    DRAW_SLOT,
    IS_NEW,
    ROW_FIELDS,
    RowsEnd,
    StepRows,
    build_step_rows,
)
from torch import Tensor

from aphro_core.layers.batch import Batch, PagedPart, PagedRows
from aphro_core.messages.steps import ScheduledSequence
from aphro_core.parallel.memory import table_width
from aphro_core.worker.chunk_numbers import ChunkNumbers, chunk_block_size, chunk_numbers
from aphro_core.worker.step_shapes import StepShape, StepShapes


@dataclass(frozen=True, slots=True)
class PagedStep:
    """One plan, sent. ``draws`` are the sequences of the rows that get logits.

    It is the same step as before if the device makes its numbers of those that it has.
    """

    num_rows: int  # of one token
    shape: StepShape
    chunks: list[ScheduledSequence]  # the rows that are not one token each
    numbers: ChunkNumbers | None  # theirs, sent; only with chunks
    first_rows: dict[int, int]  # seq_id -> its first row of hidden states; only with chunks
    draws: list[int]
    wanted: list[int] | None  # those of them whose tokens count, by index; None: all


class StepMemory:
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
        row_start: RowStart | None = None,
        answers: Tensor | None = None,
    ) -> None:
        """``works``: how decode attention is shared out on a GPU, for each window among the layers. ``row_start``:
        what a decoder lets be made of its rows. ``answers``
        [steps, max_rows] int64: where tokens are told to the host; None: nobody asks."""
        self.max_rows, self.block_size = max_rows, block_size
        self.max_blocks = table_width(max_model_len, block_size)
        self.last_token_ids = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)  # by slot, and of padding
        self._block_tables = torch.zeros(max_rows + 1, self.max_blocks, dtype=torch.int32, device=device)
        self._sent = torch.zeros(max_rows, ROW_FIELDS, dtype=torch.int64, device=device)
        self._rows = build_step_rows(max_rows, self.max_blocks, device)
        sizes = [chunk_block_size(shape) for shape in shapes.padded if shape.num_seqs]
        self._chunk_block = torch.zeros(max(sizes, default=0), dtype=torch.int64, device=device)  # of padded steps
        self._numbers: dict[StepShape, ChunkNumbers] = {}  # in that block, by shape
        self._row_starts = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._answers = torch.zeros(1, max_rows, dtype=torch.int64, device=device) if answers is None else answers
        self._shapes, self._max_model_len, self._device = shapes, max_model_len, device
        self._num_kv_heads, self._works, self._row_start = num_kv_heads, works, row_start

    # --- what the host sends ---

    def clear(self) -> None:
        """What was sent last is zeros, which any shape can read, any number of times: token 0 at position 0, no chunk,
        and no row that goes on."""
        self._sent.zero_()
        self._sent[:, ANSWER] = -1
        self._chunk_block.zero_()

    def send_rows(self, values: np.ndarray) -> None:
        """``[rows, ROW_FIELDS]`` int64, with padding."""
        if len(values):
            self._sent.view(-1)[: values.size].copy_(self._pin(values.reshape(-1)), non_blocking=True)

    def send_chunks(self, block: np.ndarray, shape: StepShape) -> ChunkNumbers:
        """A padded step's to the place that graphs read, any other's to one of its own."""
        pinned = self._pin(block)
        if self._shapes.has(shape):
            self._chunk_block[: len(block)].copy_(pinned, non_blocking=True)
            return self._padded_numbers(shape)
        return chunk_numbers(shape, pinned.to(self._device, non_blocking=True))

    def _padded_numbers(self, shape: StepShape) -> ChunkNumbers:
        """Always the same views: making them takes longer than sending what they show."""
        if shape not in self._numbers:
            self._numbers[shape] = chunk_numbers(shape, self._chunk_block)
        return self._numbers[shape]

    def write_tables(self, at: list[int], blocks: list[int]) -> None:
        """``blocks`` into block tables, at slot * ``max_blocks`` + index."""
        count = len(at)
        both = np.zeros(count + -(-count // 2), dtype=np.int64)
        both[:count] = at
        both.view(np.int32)[2 * count : 3 * count] = blocks
        sent = self._pin(both).to(self._device, non_blocking=True)
        self._block_tables.view(-1).index_copy_(0, sent[:count], sent.view(torch.int32)[2 * count : 3 * count])

    def _pin(self, values: np.ndarray) -> Tensor:
        made = torch.from_numpy(values)
        if self._device.type == "cpu":
            return made
        pinned = torch.empty(len(values), dtype=torch.int64, pin_memory=True)
        pinned.copy_(made)
        return pinned

    # --- what a step begins with ---

    def decode_batch(self, num_rows: int) -> Batch:
        """The rows of one token, as sent last, ``num_rows`` with padding. Fit for a CUDA graph."""
        rows, part, begun = self._decode_part(num_rows, self._rows, self._row_start)
        paged = PagedRows(rows.slot_mapping, [part])
        return Batch(rows.token_ids, rows.positions, paged, {}, self._row_starts[:0], begun)

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
        return self._batch_of(shape, self._padded_numbers(shape), shape.num_rows)

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

    def _decode_part(
        self, num_rows: int, out: StepRows, start: RowStart | None = None
    ) -> tuple[StepRows, PagedPart, BegunRows | None]:
        sent, works = self._sent[:num_rows], list(self._works.values())
        rows, begun = begin_step(
            sent,
            self.last_token_ids,
            self._block_tables,
            block_size=self.block_size,
            out=out,
            work=works[0] if works else None,
            num_kv_heads=self._num_kv_heads,
            start=start,
        )
        for work in works[1:]:
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
        return rows, part, begun

    # --- what it ends with ---

    def positions(self, num_rows: int) -> Tensor:
        """``[num_rows]`` int64 of the tokens that a decode step has read."""
        return self._rows.positions[:num_rows]

    def draw_slots(self, step: PagedStep) -> Tensor:
        """``[draws]`` int64: where in ``last_token_ids`` the tokens go; of the rows that are sent next, later on."""
        return self.draws(step).rows[:, DRAW_SLOT]

    def draws(self, step: PagedStep) -> RowsEnd:
        """Where the tokens of a step go. Those of a decode step are rows, and move on."""
        if step.numbers is None:
            return self.end(step.num_rows)
        fields = step.numbers.draws[: len(step.draws) * ROW_FIELDS].view(-1, ROW_FIELDS)
        return RowsEnd(fields, self.last_token_ids, self._answers)

    def end(self, num_rows: int) -> RowsEnd:
        """Of the first rows of a decode step. Fit for a CUDA graph."""
        return RowsEnd(self._sent[:num_rows], self.last_token_ids, self._answers)
