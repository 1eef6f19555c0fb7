"""Columns of every rank side by side in the memory of rank 0, over NVLink: logits, which it alone draws from.

One launch: every rank writes its columns of all rows to where they belong, says so, and rank 0 waits until all have.
Nothing goes to the others, and nothing is copied twice. Calls are counted on the device, so that CUDA graphs may be
replayed; all ranks make the same calls. A rank may be ahead of rank 0 only as far as something else that all ranks take
part in lets it: between two calls there must be such a thing (a sum), behind whatever reads the rows. Waiting is
bounded as in peer_all_reduce.py.
"""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from aphro_kernels.language import chain_options, jit, let_next_start, tl, wait_for_last

PROGRAMS: Final = 64  # fill NVLink, and few rows take the less the fewer they are
_MAX_POLLS: Final = 60_000_000  # of a flag: about a minute and a half
_FLAG_BYTES: Final = 128
_BLOCK: Final = 4096  # columns that a program copies at once


@dataclass(frozen=True, slots=True)
class PeerColumns:
    """One rank's end of a group. Calls that share it must follow each other on one stream."""

    rank: int
    size: int
    programs: int
    memory: Tensor  # [bytes] uint8; on rank 0 the others write it: how many programs have written, then rows
    first: Tensor  # [1] int64: the address of rank 0's ``memory`` as this rank sees it
    rows: Tensor  # [max_rows, columns] in ``memory``, of any use on rank 0 alone
    calls: Tensor  # [programs] int32
    status: Tensor  # [1] int32: 0, or 1 once a wait has ended without a rank; the host may set it to end one
    handle: Any  # keeps the mapping of the others' memory alive


def peer_columns_bytes(max_rows: int, columns: int, dtype: torch.dtype) -> int:
    """Of a rank's memory."""
    return _FLAG_BYTES + max_rows * columns * dtype.itemsize


def build_peer_columns(
    group: Any, memory: Tensor, columns: int, dtype: torch.dtype, programs: int = PROGRAMS
) -> PeerColumns:
    """Map rank 0's ``memory`` into all ranks of ``group`` (a process group with NCCL), who call it together, each with
    as much of ``peer_rows.allocate_shared``. As in peer_all_reduce.py a barrier comes next."""
    import torch.distributed as dist
    from torch.distributed import _symmetric_memory as symmetric

    handle = symmetric.rendezvous(memory, group)
    memory.zero_()
    torch.cuda.synchronize(memory.device)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return join_peer_columns(rank, size, memory, handle.buffer_ptrs[0], columns, dtype, handle, programs)


def join_peer_columns(
    rank: int,
    size: int,
    memory: Tensor,
    first: int,
    columns: int,
    dtype: torch.dtype,
    handle: Any,
    programs: int = PROGRAMS,
) -> PeerColumns:
    device = memory.device
    return PeerColumns(
        rank=rank,
        size=size,
        programs=programs,
        memory=memory,
        first=torch.tensor([first], dtype=torch.int64, device=device),
        rows=memory[_FLAG_BYTES:].view(dtype).view(-1, columns),
        calls=torch.zeros(programs, dtype=torch.int32, device=device),
        status=torch.zeros(1, dtype=torch.int32, device=device),
        handle=handle,
    )


def peer_columns(x: Tensor, peers: PeerColumns, *, max_polls: int = _MAX_POLLS, is_fatal: bool = False) -> Tensor:
    """``x`` [rows, width] of every rank side by side in the first of rank 0's ``peers.rows``, which are returned; of
    the last ranks those columns that are there. ``x`` has their dtype, and ``width`` is everybody's."""
    num_rows, width = x.shape
    columns = peers.rows.shape[1]
    assert 0 < num_rows <= len(peers.rows)
    assert x.dtype == peers.rows.dtype
    assert x.is_contiguous()
    assert width * peers.size >= columns
    start = peers.rank * width
    _columns_kernel[(peers.programs,)](
        x,
        peers.memory,
        peers.first,
        peers.calls,
        peers.status,
        num_rows,
        width,
        max(min(width, columns - start), 0),
        start,
        columns,
        max_polls,
        RANK=peers.rank,
        SIZE=peers.size,
        FLAG_BYTES=_FLAG_BYTES,
        IS_FATAL=is_fatal,
        BLOCK=_BLOCK,
        num_warps=8,
        **chain_options(x),
    )
    return peers.rows[:num_rows]


@jit(do_not_specialize=["num_rows", "max_polls"])
def _columns_kernel(
    x: tl.tensor,
    memory: tl.tensor,
    first: tl.tensor,
    calls: tl.tensor,
    status: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    kept: tl.tensor,
    start: tl.tensor,
    columns: tl.tensor,
    max_polls: tl.tensor,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    FLAG_BYTES: tl.constexpr,
    IS_FATAL: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """Of the tiles of rows program p takes p, p + P, ... of P programs."""
    let_next_start(CHAINED)
    wait_for_last(CHAINED)
    program = tl.program_id(0)
    call = tl.load(calls + program) + 1
    address = tl.load(first)
    rows = (address + FLAG_BYTES).to(tl.pointer_type(x.dtype.element_ty))
    rows = tl.multiple_of(rows, 128)  # else two bytes are stored at a time
    tiles = tl.cdiv(kept, BLOCK)
    for tile in range(program, num_rows * tiles, tl.num_programs(0)):
        row = tl.cast(tile // tiles, tl.int64)
        at = (tile % tiles) * BLOCK + tl.arange(0, BLOCK)
        part = tl.load(x + row * width + at, mask=at < kept, other=0.0)
        tl.store(rows + row * columns + start + at, part, mask=at < kept)
    if RANK != 0:
        tl.debug_barrier()  # all threads have written before one of them says so
        tl.atomic_add(address.to(tl.pointer_type(tl.int32)), 1, sem="release", scope="sys")
    else:
        written = memory.to(tl.pointer_type(tl.int32))
        expected = call * (tl.num_programs(0) * (SIZE - 1))  # both wrap alike
        polls = 0
        behind = tl.atomic_add(written, 0, sem="acquire", scope="sys") - expected
        while (behind < 0) & (polls < max_polls):
            behind = tl.atomic_add(written, 0, sem="acquire", scope="sys") - expected
            polls = tl.where(tl.load(status, volatile=True) == 0, polls + 1, max_polls)
        if behind < 0:
            tl.store(status, 1)
            if IS_FATAL:  # better no answer than a wrong one
                tl.inline_asm_elementwise("trap; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(calls + program, call)
