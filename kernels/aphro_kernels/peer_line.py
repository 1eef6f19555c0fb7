"""A line of messages into another GPU's memory, over NVLink: what a stage of a pipeline hands on to the next one.

One launch at each end. The writer puts a message into the next of a ring of slots in the reader's memory and says so;
the reader waits for that, copies the message out, and says that the slot is free, which the writer waits for before it
comes round to it again. Both count calls on the device: graphs may be replayed, and hosts may be any number of steps
apart. Streams alone order the calls of an end. Waiting is bounded as in peer_all_reduce.py, and what waited in vain has
done nothing.
"""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from aphro_kernels.language import jit, next_power_of_2, tl

MAX_POLLS: Final = 300_000_000  # of a flag: about a minute and a half
_LINE: Final = 32  # int32 of a line: how many programs have written, then how many have read
_FLAG_BYTES: Final = 2 * 4 * _LINE
_TILE: Final = 2048  # words that a program copies at once


@dataclass(frozen=True, slots=True)
class PeerLine:
    """One end: of the writer or of the reader, each of whom has as much memory, of the same layout."""

    num_slots: int
    max_rows: int
    words: int  # int32 of a row
    programs: int
    memory: Tensor  # [bytes] uint8, which the other end writes: flags, then slots, of any use to the reader alone
    peer: Tensor  # [1] int64: the address of the other end's ``memory``, as this rank sees it
    calls: Tensor  # [programs] int32
    status: Tensor  # [1] int32: 0, or 1 once a wait has ended without the other end; the host may set it to end one

    @property
    def written(self) -> Tensor:
        """``[1]`` int32, of the reader: how many programs have written, ``programs`` a message."""
        return self.memory[:4].view(torch.int32)


def peer_line_bytes(num_slots: int, max_rows: int, row_bytes: int) -> int:
    """Of the memory of each end, rounded so that another line may follow."""
    return _FLAG_BYTES + num_slots * _slot_words(max_rows, row_bytes // 4) * 4


def _slot_words(max_rows: int, words: int) -> int:
    return -(-max_rows * words // _LINE) * _LINE


def join_peer_line(
    memory: Tensor, other: int, *, num_slots: int, max_rows: int, row_bytes: int, programs: int
) -> PeerLine:
    """``memory`` is zeros, ``other`` the address of the other end's. A row has a multiple of 4 bytes; ``num_slots`` is
    a power of 2, which divides the count of calls when it wraps."""
    assert row_bytes % 4 == 0
    assert num_slots & (num_slots - 1) == 0
    assert len(memory) == peer_line_bytes(num_slots, max_rows, row_bytes)
    return PeerLine(
        num_slots=num_slots,
        max_rows=max_rows,
        words=row_bytes // 4,
        programs=programs,
        memory=memory,
        peer=torch.tensor([other], dtype=torch.int64, device=memory.device),
        calls=torch.zeros(programs, dtype=torch.int32, device=memory.device),
        status=torch.zeros(1, dtype=torch.int32, device=memory.device),
    )


def put(x: Tensor, line: PeerLine, *, max_polls: int = MAX_POLLS, is_fatal: bool = False) -> None:
    """Send the rows ``x`` [rows] or [rows, width], which may be written again by what is launched behind this."""
    _launch(x, line, max_polls, is_fatal=is_fatal, is_writer=True)


def take_(x: Tensor, line: PeerLine, *, max_polls: int = MAX_POLLS, is_fatal: bool = False) -> Tensor:
    """The next message, of as many rows, into ``x``; the stream waits for it."""
    _launch(x, line, max_polls, is_fatal=is_fatal, is_writer=False)
    return x


def _launch(x: Tensor, line: PeerLine, max_polls: int, *, is_fatal: bool, is_writer: bool) -> None:
    num_rows = len(x)
    assert x.is_contiguous()
    assert 0 < num_rows <= line.max_rows
    assert x[0].nbytes == 4 * line.words
    columns = min(next_power_of_2(line.words), _TILE)
    _line_kernel[(line.programs,)](
        x.view(torch.int32),
        line.memory,
        line.peer,
        line.calls,
        line.status,
        num_rows,
        max_polls,
        SLOTS=line.num_slots,
        SLOT_WORDS=_slot_words(line.max_rows, line.words),
        WORDS=line.words,
        FLAG_LINE=_LINE,
        IS_WRITER=is_writer,
        IS_FATAL=is_fatal,
        ROWS=_TILE // columns,
        COLUMNS=columns,
        num_warps=8,
    )


@jit(do_not_specialize=["num_rows", "max_polls"])
def _line_kernel(
    x: tl.tensor,
    memory: tl.tensor,
    peer: tl.tensor,
    calls: tl.tensor,
    status: tl.tensor,
    num_rows: tl.tensor,
    max_polls: tl.tensor,
    SLOTS: tl.constexpr,
    SLOT_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
    FLAG_LINE: tl.constexpr,
    IS_WRITER: tl.constexpr,
    IS_FATAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Of the tiles program p takes p, p + P, ... of P programs, at both ends as many."""
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    call = tl.load(calls + program)  # before this one
    own = memory.to(tl.pointer_type(tl.int32))
    other = tl.multiple_of(tl.load(peer).to(tl.pointer_type(tl.int32)), 32)
    written, read = 0, FLAG_LINE
    flag = own + (read if IS_WRITER else written)
    expected = (call + 1 - (SLOTS if IS_WRITER else 0)) * num_programs  # counters and this wrap alike
    polls = 0
    behind = tl.atomic_add(flag, 0, sem="acquire", scope="sys") - expected
    while (behind < 0) & (polls < max_polls):
        behind = tl.atomic_add(flag, 0, sem="acquire", scope="sys") - expected
        polls = tl.where(tl.load(status, volatile=True) == 0, polls + 1, max_polls)
    if behind < 0:
        tl.store(status, 1)
        if IS_FATAL:  # better no message than a wrong one
            tl.inline_asm_elementwise("trap; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    else:
        tl.debug_barrier()
        slot = (other if IS_WRITER else own) + 2 * FLAG_LINE + tl.cast(call & (SLOTS - 1), tl.int64) * SLOT_WORDS
        slot = tl.multiple_of(slot, 32)
        across: tl.constexpr = (WORDS + COLUMNS - 1) // COLUMNS
        for tile in range(program, tl.cdiv(num_rows, ROWS) * across, num_programs):
            row = (tile // across) * ROWS + tl.arange(0, ROWS)[:, None]
            column = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            at = row.to(tl.int64) * WORDS + column
            is_inside = (row < num_rows) & (column < WORDS)
            if IS_WRITER:
                tl.store(slot + at, tl.load(x + at, mask=is_inside, other=0), mask=is_inside)
            else:
                tl.store(x + at, tl.load(slot + at, mask=is_inside, other=0, cache_modifier=".cg"), mask=is_inside)
        tl.debug_barrier()  # all threads have done it before one of them says so
        tl.atomic_add(other + (written if IS_WRITER else read), 1, sem="release", scope="sys")
        tl.store(calls + program, call + 1)
