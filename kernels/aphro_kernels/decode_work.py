"""How decode attention is shared out: equal stretches of key tiles, one a program, whatever the rows' lengths.

The tiles of all rows and KV heads stand in one line: row by row, in a row head by head, in a head ``KEYS`` keys a
tile. Program p of P takes tiles ``p * T // P`` to ``(p + 1) * T // P`` of the T there are. A head of a row (a segment)
thus lies in one program or is cut over neighbours; the last of them to finish adds the parts, in the order of the line.
Where there are no more segments than programs, and they are of like lengths, each is cut into equal pieces of its own
instead: no program has two segments, and one piece needs no sum.
The line depends on lengths alone, so one plan a step serves all layers of one window.
"""
# ruff: noqa: N803, PLR0915  (constants in capitals; a kernel is one piece)

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from aphro_kernels.hopper import is_hopper
from aphro_kernels.language import jit, next_power_of_2, tl

FIELDS: Final = 8  # of a program's stretch
_HOPPER_TILES: Final = {64: (128, 3, 2), 128: (64, 3, 2)}  # head_dim: keys, stages, programs a multiprocessor
_FEWEST_PLACES: Final = 32
AT_ONCE: Final = 8  # programs whose stretch one program of the plan kernel finds


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """Buffers of decode attention for one window. Fixed in size, so that a CUDA graph serves any lengths.

    Calls that share one must follow each other on one stream.
    """

    num_programs: int
    keys: int  # of a tile
    stages: int  # tiles of keys, and of values, in shared memory at once in hopper_decode.py; 0: not for that kernel
    window: int  # 0: none
    # [num_programs, FIELDS] int32: first tile, number of segments, first row, first tile of that row, end of the tiles;
    # of a piece the first and the last program of its segment, else -1 twice; length of the first row
    stretches: Tensor
    # [3] int32: tiles, programs that have any, 1 if a row may read keys that another row of the step writes
    totals: Tensor
    arrivals: Tensor  # [max_rows * num_kv_heads] int32, 0 between calls: parts of a segment that are done
    parts: Tensor  # [2 * num_programs, group, head_dim] float32
    part_weights: Tensor  # [2 * num_programs, group] float32: log2 of a part's sum of exponentials
    descriptors: dict[object, Any] = field(default_factory=dict)  # of caches, for the copy engine; hopper_decode.py


def build_decode_work(
    max_rows: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    cache_dtype: torch.dtype | None = None,
    window: int | None = None,
    num_programs: int | None = None,
) -> DecodeWork:
    """For up to ``max_rows`` rows of one rank's heads. ``num_programs`` None: as many as the GPU runs at once.

    ``cache_dtype`` None: that of the queries.
    """
    keys, programs = _tile(head_dim, dtype)
    stages = 0
    is_plain = window is None and cache_dtype in (None, dtype)
    if is_plain and head_dim in _HOPPER_TILES and num_heads <= 16 * num_kv_heads and is_hopper(device, dtype):
        keys, stages, programs = _HOPPER_TILES[head_dim]
    if num_programs is None:
        num_programs = torch.cuda.get_device_properties(device).multi_processor_count * programs
    group = num_heads // num_kv_heads

    def buffer(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return DecodeWork(
        num_programs=num_programs,
        keys=keys,
        stages=stages,
        window=window or 0,
        stretches=buffer(num_programs, FIELDS),
        totals=buffer(3),
        arrivals=buffer(max_rows * num_kv_heads),
        parts=buffer(2 * num_programs, group, head_dim, dtype=torch.float32),
        part_weights=buffer(2 * num_programs, group, dtype=torch.float32),
    )


def programs_of(work: DecodeWork, num_rows: int) -> int:
    """Programs of a call, and of its plan. One row takes one a multiprocessor on Hopper: others that have nothing to do
    would still be in the way of the next kernel (docs/kernels.md)."""
    is_half = work.stages and num_rows == 1 and work.num_programs > 1
    return work.num_programs // 2 if is_half else work.num_programs


def places_of(num_rows: int) -> int:
    """Rows that what makes a plan is compiled for. The smallest padded step with chunks has 32: for fewer, beside a
    prompt too long for a padded step, no step before serving would have compiled what begins it (begin_step.py)."""
    return max(next_power_of_2(num_rows), _FEWEST_PLACES)


def _tile(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Keys of a tile, and programs that a multiprocessor has room for (measured on an H100)."""
    head_bytes = max(next_power_of_2(head_dim), 16) * dtype.itemsize
    return (32, 2) if head_bytes > 256 else (128, 2) if head_bytes > 128 else (128, 3)


def plan_decode_(work: DecodeWork, seq_lens: Tensor, num_kv_heads: int, *, is_new: Tensor | None = None) -> None:
    """Share out a step's keys: ``seq_lens`` [num_rows] int32 on the device. Once a step, before any layer.

    A row of length 0 gets zeros, one of negative length nothing: it is not there. ``is_new`` [num_rows], not 0 for rows
    that may read keys which another row of this very step writes. Where there are none, all but a row's last key is
    there when the step begins, and read so. None: any row may.
    """
    num_rows = seq_lens.shape[0]
    num_programs = programs_of(work, num_rows)
    assert num_rows * num_kv_heads <= work.arrivals.shape[0], "more rows than the buffers were built for"
    _plan_kernel[(-(-num_programs // AT_ONCE),)](
        seq_lens,
        is_new,
        work.stretches,
        work.totals,
        num_rows,
        num_programs,
        0 if is_new is None else is_new.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        KEYS=work.keys,
        WINDOW=work.window,
        ROWS=places_of(num_rows),
        AT_ONCE=AT_ONCE,
        FIELDS=FIELDS,
        num_warps=4,  # not chained: attention reads the plan before it waits for the kernel before it
    )


@jit(do_not_specialize=["num_rows", "num_programs", "new_stride"])
def _plan_kernel(
    seq_lens: tl.tensor,
    is_new: tl.tensor | None,
    stretches: tl.tensor,
    totals: tl.tensor,
    num_rows: tl.tensor,
    num_programs: tl.tensor,
    new_stride: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    FIELDS: tl.constexpr,
) -> None:
    rows = tl.arange(0, ROWS)
    seq_len = tl.load(seq_lens + rows, mask=rows < num_rows, other=0)
    program = tl.program_id(0)
    share_out(
        program, seq_len, stretches, totals, num_rows, num_programs, NUM_KV_HEADS, KEYS, WINDOW, ROWS, AT_ONCE, FIELDS
    )
    if program == 0:
        any_new = 1
        if is_new is not None:
            news = tl.load(is_new + rows * new_stride, mask=rows < num_rows, other=0)
            any_new = tl.max((news != 0).to(tl.int32), axis=0)
        tl.store(totals + 2, any_new)


@jit()
def share_out(
    program: tl.tensor,
    seq_len: tl.tensor,
    stretches: tl.tensor,
    totals: tl.tensor,
    num_rows: tl.tensor,
    num_programs: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    FIELDS: tl.constexpr,
) -> None:
    """The stretches of ``AT_ONCE`` programs, and from the first of these the totals but for the last."""
    rows = tl.arange(0, ROWS)
    tiles = tl.where((rows < num_rows) & (seq_len >= 0), num_tiles_of(seq_len, KEYS, WINDOW), 0)
    ends = tl.cumsum(tiles, axis=0) * NUM_KV_HEADS
    total = tl.sum(tiles, axis=0) * NUM_KV_HEADS
    used = tl.minimum(total, num_programs)

    programs = program * AT_ONCE + tl.arange(0, AT_ONCE)
    start = (programs.to(tl.int64) * total // tl.maximum(used, 1)).to(tl.int32)
    stop = ((programs.to(tl.int64) + 1) * total // tl.maximum(used, 1)).to(tl.int32)
    row, row_tile, first_segment = _place(start, ends, tiles, NUM_KV_HEADS)
    _, _, last_segment = _place(stop - 1, ends, tiles, NUM_KV_HEADS)
    num_segments = tl.where(programs < used, last_segment - first_segment + 1, 0)
    first = tl.full([AT_ONCE], -1, tl.int32)
    last = first

    # the least tiles a piece with which the pieces of all segments find a program each
    length = 1
    longest = tl.max(tiles, axis=0)
    while length < longest:
        middle = (length + longest) // 2
        if tl.sum((tiles + middle - 1) // middle, axis=0) * NUM_KV_HEADS <= num_programs:
            longest = middle
        else:
            length = middle + 1
    pieces = (tiles + length - 1) // length
    used_by_pieces = tl.sum(pieces, axis=0) * NUM_KV_HEADS
    # no more than a quarter and two tiles beyond an equal share: that is what a second segment costs, and the sums
    if (used_by_pieces <= num_programs) & (4 * (length - 2) * num_programs <= 5 * total):
        is_before = (tl.cumsum(pieces, axis=0) * NUM_KV_HEADS)[None, :] <= programs[:, None]
        row = tl.sum(is_before.to(tl.int32), axis=1)
        row_tile = tl.sum(tl.where(is_before, tiles[None, :], 0), axis=1) * NUM_KV_HEADS
        inside = programs - tl.sum(tl.where(is_before, pieces[None, :], 0), axis=1) * NUM_KV_HEADS
        is_row = rows[None, :] == row[:, None]
        row_pieces = tl.maximum(tl.sum(tl.where(is_row, pieces[None, :], 0), axis=1), 1)
        row_tiles = tl.sum(tl.where(is_row, tiles[None, :], 0), axis=1)
        piece = inside % row_pieces
        begin = row_tile + inside // row_pieces * row_tiles
        start = begin + piece * row_tiles // row_pieces
        stop = begin + (piece + 1) * row_tiles // row_pieces
        first = programs - piece
        last = first + row_pieces - 1
        num_segments = (programs < used_by_pieces).to(tl.int32)
    first_len = tl.sum(tl.where(rows[None, :] == row[:, None], seq_len[None, :], 0), axis=1)
    at = stretches + programs * FIELDS
    is_program = programs < num_programs
    tl.store(at, start, mask=is_program)
    tl.store(at + 1, num_segments, mask=is_program)
    tl.store(at + 2, row, mask=is_program)
    tl.store(at + 3, row_tile, mask=is_program)
    tl.store(at + 4, stop, mask=is_program)
    tl.store(at + 5, first, mask=is_program)
    tl.store(at + 6, last, mask=is_program)
    tl.store(at + 7, first_len, mask=is_program)
    if program == 0:
        tl.store(totals, total)
        tl.store(totals + 1, used)


@jit()
def num_tiles_of(seq_len: tl.tensor, KEYS: tl.constexpr, WINDOW: tl.constexpr) -> tl.tensor:
    """Of one head of a row; a row without keys has one, which gives zeros."""
    low = 0
    if WINDOW > 0:
        low = tl.maximum(seq_len - WINDOW, 0) // KEYS
    return tl.maximum((seq_len + KEYS - 1) // KEYS - low, 1)


@jit()
def _place(at: tl.tensor, ends: tl.tensor, tiles: tl.tensor, NUM_KV_HEADS: tl.constexpr) -> tl.tensor:
    """Row, first tile of that row, and segment of tiles ``at``. ``ends``: where the tiles of each row end."""
    is_before = ends[None, :] <= at[:, None]
    row = tl.sum(is_before.to(tl.int32), axis=1)
    first_tile = tl.sum(tl.where(is_before, tiles[None, :], 0), axis=1) * NUM_KV_HEADS
    is_row = tl.arange(0, ends.shape[0])[None, :] == row[:, None]
    row_tiles = tl.maximum(tl.sum(tl.where(is_row, tiles[None, :], 0), axis=1), 1)
    return row, first_tile, row * NUM_KV_HEADS + (at - first_tile) // row_tiles
