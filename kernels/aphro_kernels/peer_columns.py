"""What rank 0 draws from of the logits that ranks have columns of, in its memory, over NVLink.

One launch: every rank writes the largest logit of each block of 128 tokens, which is all that a draw knows of most of
them (sample_kernels.py), and of each row either its logits, or, where the largest is drawn, the blocks that may have
it. It says so, and rank 0 waits until all have. Nothing goes to the others, and nothing is copied twice. Calls are
counted on the device, so that CUDA graphs may be replayed; all ranks make the same calls. A rank may be ahead of rank 0
only as far as something else that all ranks take part in lets it: between two calls there must be such a thing (a sum),
behind whatever reads the rows. Waiting is bounded as in peer_all_reduce.py.
"""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from aphro_kernels.language import chain_options, jit, let_next_start, tl, wait_for_last
from aphro_kernels.sample_kernels import BLOCK

_PROGRAMS: Final = 528  # as many as run at once
_MAX_POLLS: Final = 60_000_000  # of a flag: about a minute and a half
_FLAG_BYTES: Final = 128
_BLOCKS: Final = 32  # that a program reads at once


@dataclass(frozen=True, slots=True)
class PeerColumns:
    """One rank's end of a group. Calls that share it must follow each other on one stream."""

    rank: int
    size: int
    programs: int  # at most
    memory: Tensor  # [bytes] uint8; on rank 0 the others write it: how many programs have written, then what follows
    first: Tensor  # [1] int64: the address of rank 0's ``memory`` as this rank sees it
    rows: Tensor  # [max_rows, columns] in ``memory``, of any use on rank 0 alone
    peaks: Tensor  # [max_rows, blocks] float32 likewise: of each block the largest, +inf where there is NaN
    is_whole: Tensor  # [max_rows] int32, by each rank for itself, the same on all: not 0 where all of a row is wanted
    expected: Tensor  # [1] int32: programs of the other ranks that have written, after the last call
    status: Tensor  # [1] int32: 0, or 1 once a wait has ended without a rank; the host may set it to end one
    handle: Any  # keeps the mapping of the others' memory alive


def peer_columns_bytes(max_rows: int, columns: int, dtype: torch.dtype) -> int:
    """Of a rank's memory."""
    return _FLAG_BYTES + _rows_bytes(max_rows, columns, dtype) + max_rows * _num_blocks(columns) * 4


def _rows_bytes(max_rows: int, columns: int, dtype: torch.dtype) -> int:
    return -(-max_rows * columns * dtype.itemsize // _FLAG_BYTES) * _FLAG_BYTES


def _num_blocks(columns: int) -> int:
    return -(-columns // BLOCK)


def build_peer_columns(group: Any, memory: Tensor, max_rows: int, columns: int, dtype: torch.dtype) -> PeerColumns:
    """Map rank 0's ``memory`` into all ranks of ``group`` (a process group with NCCL), who call it together, each with
    as much of ``peer_rows.allocate_shared``. As in peer_all_reduce.py a barrier comes next."""
    import torch.distributed as dist
    from torch.distributed import _symmetric_memory as symmetric

    handle = symmetric.rendezvous(memory, group)
    memory.zero_()
    torch.cuda.synchronize(memory.device)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return join_peer_columns(rank, size, memory, handle.buffer_ptrs[0], max_rows, columns, dtype, handle)


def join_peer_columns(
    rank: int,
    size: int,
    memory: Tensor,
    first: int,
    max_rows: int,
    columns: int,
    dtype: torch.dtype,
    handle: Any,
    programs: int = _PROGRAMS,
) -> PeerColumns:
    device = memory.device
    assert len(memory) == peer_columns_bytes(max_rows, columns, dtype)
    stop = _FLAG_BYTES + max_rows * columns * dtype.itemsize
    peaks = memory[_FLAG_BYTES + _rows_bytes(max_rows, columns, dtype) :]
    return PeerColumns(
        rank=rank,
        size=size,
        programs=programs,
        memory=memory,
        first=torch.tensor([first], dtype=torch.int64, device=device),
        rows=memory[_FLAG_BYTES:stop].view(dtype).view(max_rows, columns),
        peaks=peaks.view(torch.float32).view(max_rows, -1),
        is_whole=torch.ones(max_rows, dtype=torch.int32, device=device),
        expected=torch.zeros(1, dtype=torch.int32, device=device),
        status=torch.zeros(1, dtype=torch.int32, device=device),
        handle=handle,
    )


def peer_columns(x: Tensor, peers: PeerColumns, *, max_polls: int = _MAX_POLLS, is_fatal: bool = False) -> Tensor:
    """``x`` [rows, width] of every rank side by side in the first of rank 0's ``peers.rows``, which are returned, and
    their ``peers.peaks``; of the last ranks those columns that are there. Of a row that is not wanted whole there is of
    each 32 blocks, counted in each rank's ``x``, the first that has their largest; elsewhere is what was there before.

    ``x`` has the rows' dtype, and ``width``, a multiple of 128, is everybody's.
    """
    num_rows, width = x.shape
    columns = peers.rows.shape[1]
    assert 0 < num_rows <= len(peers.rows)
    assert x.dtype == peers.rows.dtype
    assert x.is_contiguous()
    assert width % BLOCK == 0
    assert width * peers.size >= columns
    start = peers.rank * width
    _columns_kernel[(min(num_rows * -(-width // (_BLOCKS * BLOCK)), peers.programs),)](
        x,
        peers.is_whole,
        peers.memory,
        peers.first,
        peers.expected,
        peers.status,
        num_rows,
        width,
        max(min(width, columns - start), 0),
        start,
        columns,
        peers.peaks.data_ptr() - peers.memory.data_ptr(),
        max_polls,
        RANK=peers.rank,
        SIZE=peers.size,
        FLAG_BYTES=_FLAG_BYTES,
        IS_FATAL=is_fatal,
        BLOCKS=_BLOCKS,
        num_warps=8,
        **chain_options(x),
    )
    return peers.rows[:num_rows]


@jit(do_not_specialize=["num_rows", "max_polls"])
def _columns_kernel(
    x: tl.tensor,
    is_whole: tl.tensor,
    memory: tl.tensor,
    first: tl.tensor,
    expected: tl.tensor,
    status: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    kept: tl.tensor,
    start: tl.tensor,
    columns: tl.tensor,
    peaks_at: tl.tensor,
    max_polls: tl.tensor,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    FLAG_BYTES: tl.constexpr,
    IS_FATAL: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """Of the tiles of rows, each of BLOCKS blocks of 128 columns, program p takes p, p + P, ... of P programs."""
    let_next_start(CHAINED)
    wait_for_last(CHAINED)
    program = tl.program_id(0)
    address = tl.load(first)
    rows = (address + FLAG_BYTES).to(tl.pointer_type(x.dtype.element_ty))
    rows = tl.multiple_of(rows, 128)  # else two bytes are stored at a time
    peaks = tl.multiple_of((address + peaks_at).to(tl.pointer_type(tl.float32)), 128)
    tiles = tl.cdiv(kept, BLOCKS * 128)
    num_blocks = tl.cdiv(columns, 128)
    for tile in range(program, num_rows * tiles, tl.num_programs(0)):
        row = tl.cast(tile // tiles, tl.int64)
        block = (tile % tiles) * BLOCKS + tl.arange(0, BLOCKS)
        at = block[:, None] * 128 + tl.arange(0, 128)[None, :]
        part = tl.load(x + row * width + at, mask=at < kept, other=float("-inf"))
        seen = part.to(tl.float32)
        seen = tl.where(seen == seen, seen, float("inf"))  # noqa: PLR0124  (NaN is not itself)
        of_blocks = tl.max(seen, axis=1)
        tl.store(peaks + row * num_blocks + start // 128 + block, of_blocks, mask=block * 128 < kept)
        if tl.load(is_whole + row) != 0:
            tl.store(rows + row * columns + start + at, part, mask=at < kept)
        else:
            best = (tile % tiles) * BLOCKS + tl.argmax(of_blocks, axis=0)
            ids = best * 128 + tl.arange(0, 128)
            there = tl.load(x + row * width + ids, mask=ids < kept)
            tl.store(rows + row * columns + start + ids, there, mask=ids < kept)
    if RANK != 0:
        tl.debug_barrier()  # all threads have written before one of them says so
        tl.atomic_add(address.to(tl.pointer_type(tl.int32)), 1, sem="release", scope="sys")
    elif program == 0:
        all_written = tl.load(expected) + tl.num_programs(0) * (SIZE - 1)  # wraps as the count does
        written = memory.to(tl.pointer_type(tl.int32))
        polls = 0
        behind = tl.atomic_add(written, 0, sem="acquire", scope="sys") - all_written
        while (behind < 0) & (polls < max_polls):
            behind = tl.atomic_add(written, 0, sem="acquire", scope="sys") - all_written
            polls = tl.where(tl.load(status, volatile=True) == 0, polls + 1, max_polls)
        if behind < 0:
            tl.store(status, 1)
            if IS_FATAL:  # better no answer than a wrong one
                tl.inline_asm_elementwise("trap; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        tl.store(expected, all_written)
