"""A step's rows of one token each, from what the device keeps of their sequences and the few numbers a host sends.

A device keeps, by slot (the place that a sequence has as long as it lives, and one for padding): ``last_token_ids``
[slots] int64, the token that was drawn last, and ``block_tables`` [slots, max_blocks] int32. The host sends
``ROW_FIELDS`` int64 a row:

- SLOT: its slot; the last one for padding
- POSITION: of the token to read; -1 for padding, which reads token 0, writes nothing and sees no key; below that for a
  row that is not there: only its length of -1 is written, and whoever shares the buffers has the rest
- TOKEN: that token, or -1 if only the device has it
- BLOCK: the block that holds the position if the step begins it, which is noted in the slot's table; else -1
- DRAW_SLOT: where the token that is drawn goes; the last slot if none is
- IS_NEW: 1 if it is the sequence's first step, in which others may write the prefix that it reads; for decode_work.py
- ANSWER: where the host finds the token that is drawn, as an index of ``answers``; -1 for padding

:func:`end_rows_` makes of a step's rows those of the next step, if the same come again: it need not be sent then.
"""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from aphro_kernels.language import chain_options, jit, runs_kernels, start_in_chain, tl

SLOT, POSITION, TOKEN, BLOCK, DRAW_SLOT, IS_NEW, ANSWER, ROW_FIELDS = range(8)
_ROWS_AT_ONCE: Final = 128


@dataclass(frozen=True, slots=True)
class StepRows:
    """What the layers read of ``n`` rows. Never reallocated: CUDA graphs keep its pointers."""

    token_ids: Tensor  # [n] int64
    positions: Tensor  # [n] int64
    slot_mapping: Tensor  # [n] int64 = block * block_size + offset, -1 for padding
    seq_lens: Tensor  # [n] int32, this token included, 0 for padding, -1 for a row that is not there
    block_tables: Tensor  # [n, max_blocks] int32, valid as far as seq_lens reaches

    def first(self, n: int) -> StepRows:
        return StepRows(
            self.token_ids[:n], self.positions[:n], self.slot_mapping[:n], self.seq_lens[:n], self.block_tables[:n]
        )


def build_step_rows(max_rows: int, max_blocks: int, device: torch.device) -> StepRows:
    def buffer(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    int32 = torch.int32
    tables = buffer(max_rows, max_blocks, dtype=int32)
    return StepRows(buffer(max_rows), buffer(max_rows), buffer(max_rows), buffer(max_rows, dtype=int32), tables)


def step_rows_reference(
    rows: Tensor, last_token_ids: Tensor, block_tables: Tensor, *, block_size: int, out: StepRows
) -> StepRows:
    is_there = rows[:, POSITION] >= -1
    out.seq_lens[: len(rows)] = rows[:, POSITION].clamp(min=-2) + 1
    if not is_there.all():  # those that are stand before those that are not
        step_rows_reference(rows[is_there], last_token_ids, block_tables, block_size=block_size, out=out)
        return out.first(len(rows))
    out = out.first(len(rows))
    slots, positions, tokens, blocks = (rows[:, field] for field in (SLOT, POSITION, TOKEN, BLOCK))
    is_row, index = positions >= 0, positions.clamp(min=0) // block_size
    begins = blocks >= 0
    block_tables[slots[begins], index[begins]] = blocks[begins].to(torch.int32)
    tokens = torch.where(tokens >= 0, tokens, last_token_ids[slots]).clamp(min=0)
    out.token_ids.copy_(torch.where(is_row, tokens, 0))
    out.positions.copy_(positions.clamp(min=0))
    out.block_tables.copy_(block_tables[slots])
    current = out.block_tables.gather(1, index[:, None]).squeeze(1).long()
    out.slot_mapping.copy_(torch.where(is_row, current * block_size + positions % block_size, -1))
    return out


@jit()
def begin_row(
    rows: tl.tensor,
    row: tl.tensor,
    last_token_ids: tl.tensor,
    block_tables: tl.tensor,
    token_ids: tl.tensor,
    positions: tl.tensor,
    slot_mapping: tl.tensor,
    seq_lens: tl.tensor,
    row_tables: tl.tensor,
    table_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> tl.tensor:
    """The token and the position that the row reads, if it is there."""
    fields = rows + row * 7  # SLOT, POSITION, TOKEN, BLOCK, DRAW_SLOT, IS_NEW, ANSWER
    slot = tl.load(fields)
    position = tl.load(fields + 1)
    token = tl.load(fields + 2)
    block = tl.load(fields + 3)
    tl.store(seq_lens + row, (tl.maximum(position, -2) + 1).to(tl.int32))
    if position >= -1:
        table = block_tables + slot * table_stride
        index = tl.maximum(position, 0) // BLOCK_SIZE
        if block >= 0:
            tl.store(table + index, block.to(tl.int32))
        else:
            block = tl.load(table + index).to(tl.int64)
        if token < 0:
            token = tl.maximum(tl.load(last_token_ids + slot), 0)
        is_row = position >= 0
        token = tl.where(is_row, token, 0)
        tl.store(token_ids + row, token)
        tl.store(positions + row, tl.maximum(position, 0))
        tl.store(slot_mapping + row, tl.where(is_row, block * BLOCK_SIZE + position % BLOCK_SIZE, -1))
        for start in range(0, index + 1, AT_ONCE):
            at = start + tl.arange(0, AT_ONCE)
            blocks = tl.load(table + at, mask=at < index, other=0)
            blocks = tl.where(at == index, block.to(tl.int32), blocks)
            tl.store(row_tables + row * table_stride + at, blocks, mask=at <= index)
    return token, position


@dataclass(frozen=True, slots=True)
class RowsEnd:
    """Where the tokens of a decode step go, and its rows, which become those of the next one."""

    rows: Tensor  # [n, ROW_FIELDS] int64
    last_token_ids: Tensor  # by slot
    # [steps, rows] int64, perhaps pinned memory of the host: the place in the next step is one line below, the first
    # behind the last
    answers: Tensor


def end_rows_reference(end: RowsEnd, tokens: Tensor, is_bad: Tensor | None = None) -> None:
    rows, answers = end.rows, end.answers
    tokens = tokens if is_bad is None else tokens.masked_fill(is_bad, -1)
    end.last_token_ids[rows[:, DRAW_SLOT]] = tokens
    there = rows[:, ANSWER] >= 0
    places = rows[there, ANSWER]
    answers.view(-1)[places] = tokens[there]
    rows[there, POSITION] += 1
    rows[there, TOKEN] = rows[there, BLOCK] = -1
    rows[there, IS_NEW] = 0
    rows[there, ANSWER] = (places + answers.stride(0)) % answers.numel()


def end_rows_(end: RowsEnd, tokens: Tensor, is_bad: Tensor | None = None) -> None:
    """Puts ``tokens`` [n] int64 where the next step and the host look for them, and moves the rows on.

    A token is -1 instead where ``is_bad`` [n] bool. Rows that have a place go on by one position, with the token that
    was drawn, in a block that was begun; others stay as they are. sample.py ends rows behind its draw by itself.
    """
    if not runs_kernels(end.rows):
        end_rows_reference(end, tokens, is_bad)
        return
    launch_end_rows(end, tokens, is_bad)


def launch_end_rows(end: RowsEnd, tokens: Tensor, is_bad: Tensor | None = None) -> None:
    num_rows = len(end.rows)
    assert end.rows.is_contiguous()
    assert end.rows.shape[1] == ROW_FIELDS
    if num_rows:
        _end_rows_kernel[(-(-num_rows // _ROWS_AT_ONCE),)](
            tokens,
            is_bad,
            end.rows,
            end.last_token_ids,
            end.answers,
            num_rows,
            end.answers.stride(0),
            end.answers.numel(),
            AT_ONCE=_ROWS_AT_ONCE,
            num_warps=4,
            **chain_options(end.rows),
        )


@jit(do_not_specialize=["num_rows", "line", "num_places"])
def _end_rows_kernel(
    tokens: tl.tensor,
    is_bad: tl.tensor | None,
    rows: tl.tensor,
    last_token_ids: tl.tensor,
    answers: tl.tensor,
    num_rows: tl.tensor,
    line: tl.tensor,
    num_places: tl.tensor,
    AT_ONCE: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    start_in_chain(CHAINED)
    row = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    is_row = row < num_rows
    token = tl.load(tokens + row, mask=is_row, other=0)
    if is_bad is not None:
        token = tl.where(tl.load(is_bad + row, mask=is_row, other=0) != 0, -1, token)
    end_row(rows, row, is_row, token, last_token_ids, answers, line, num_places)


@jit()
def end_row(
    rows: tl.tensor,
    row: tl.tensor,
    is_row: tl.tensor,
    token: tl.tensor,
    last_token_ids: tl.tensor,
    answers: tl.tensor,
    line: tl.tensor,
    num_places: tl.tensor,
) -> None:
    """One row or several."""
    fields = rows + row * 7  # SLOT, POSITION, TOKEN, BLOCK, DRAW_SLOT, IS_NEW, ANSWER
    tl.store(last_token_ids + tl.load(fields + 4, mask=is_row, other=0), token, mask=is_row)
    place = tl.load(fields + 6, mask=is_row, other=-1)
    goes_on = place >= 0
    tl.store(answers + place, token, mask=goes_on)
    tl.store(fields + 1, tl.load(fields + 1, mask=goes_on, other=0) + 1, mask=goes_on)
    tl.store(fields + 2, -1, mask=goes_on)
    tl.store(fields + 3, -1, mask=goes_on)
    tl.store(fields + 5, 0, mask=goes_on)
    place += line
    tl.store(fields + 6, tl.where(place < num_places, place, place - num_places), mask=goes_on)
