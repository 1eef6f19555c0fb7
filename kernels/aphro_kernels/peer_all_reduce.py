"""Sum over the GPUs of one host by writing into each other's memory (NVLink, no multicast), with what follows it.

One-shot: every rank writes its rows into all the others, says so, waits until the others have, and adds up what it
got, in the order of the ranks: all get the same bits. Behind the sum the residual add and the RMSNorm may follow in the
same launch. Made for the small messages of decoding; from some hundred KiB on more than two ranks move less by NCCL.

A program has a slab of its own in every rank's memory, twice: a rank that is one call ahead writes into the other half,
and none can be two ahead. Calls are counted on the device, program by program, so that CUDA graphs may be replayed; all
ranks must make the same calls with the same number of rows. Waiting is bounded: a rank that is gone, or the host by
``status``, ends it, and ``status`` is then 1: the numbers are void.
"""
# ruff: noqa: N803, PLR0912, PLR0915  (constants in capitals; a kernel is one piece)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from aphro_kernels.language import chain_options, jit, let_next_start, next_power_of_2, tl, wait_for_last
from aphro_kernels.peer_rows import allocate_shared
from aphro_kernels.rms_norm import rms_norm_reference

PROGRAMS: Final = 64  # at most, of a call
_MAX_POLLS: Final = 60_000_000  # of a flag: about a minute and a half
_LINE_BYTES: Final = 128  # of flags, a line for each program: up to 32 ranks


@dataclass(frozen=True, slots=True)
class PeerMemory:
    """One rank's end of a group. Calls that share it must follow each other on one stream."""

    rank: int
    size: int
    max_rows: int
    width: int
    dtype: torch.dtype
    programs: int
    memory: Tensor  # [bytes] uint8, which the others write: flags, then slabs
    peers: Tensor  # [size] int64: addresses of every rank's ``memory`` as this rank sees them
    calls: Tensor  # [programs] int32: how many each program has taken part in
    status: Tensor  # [1] int32: 0, or 1 once a wait has ended without its rank; the host may set it to end one
    handle: Any  # keeps the mapping of the others' memory alive


def peer_bytes(size: int, max_rows: int, width: int, dtype: torch.dtype, programs: int = PROGRAMS) -> int:
    """What :func:`build_peer_memory` takes of each rank's memory."""
    rows = -(-max_rows // programs)
    return programs * (_LINE_BYTES + 2 * size * rows * width * dtype.itemsize)


def build_peer_memory(
    group: Any,
    max_rows: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    programs: int = PROGRAMS,
    memory: Tensor | None = None,
) -> PeerMemory:
    """Map each rank's buffer into all ranks of ``group`` (a process group with NCCL). All ranks call it together, each
    with a ``memory`` of ``peer_rows.allocate_shared``, which is made here if it is not given. None may write to another
    before all have returned: a barrier comes next, or a vote, if one of them may fail."""
    import torch.distributed as dist
    from torch.distributed import _symmetric_memory as symmetric

    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if memory is None:
        memory = allocate_shared(peer_bytes(size, max_rows, width, dtype, programs), device)
    handle = symmetric.rendezvous(memory, group)
    memory.zero_()
    torch.cuda.synchronize(device)
    return join_peer_memory(rank, memory, list(handle.buffer_ptrs), max_rows, width, dtype, handle, programs)


def join_peer_memory(
    rank: int,
    memory: Tensor,
    addresses: Sequence[int],
    max_rows: int,
    width: int,
    dtype: torch.dtype,
    handle: Any,
    programs: int = PROGRAMS,
) -> PeerMemory:
    device = memory.device
    return PeerMemory(
        rank=rank,
        size=len(addresses),
        max_rows=max_rows,
        width=width,
        dtype=dtype,
        programs=programs,
        memory=memory,
        peers=torch.tensor(addresses, dtype=torch.int64, device=device),
        calls=torch.zeros(programs, dtype=torch.int32, device=device),
        status=torch.zeros(1, dtype=torch.int32, device=device),
        handle=handle,
    )


def peer_all_reduce_reference(
    summands: Sequence[Tensor], residual: Tensor | None = None, gain: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """``summands``: what each rank gives, in their order."""
    total = torch.stack([x.float() for x in summands]).sum(dim=0).to(summands[0].dtype)
    if residual is None:
        return total
    residual.add_(total)
    return residual if gain is None else rms_norm_reference(residual, gain, eps)


def peer_all_reduce(
    x: Tensor,
    memory: PeerMemory,
    *,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float = 0.0,
    max_polls: int = _MAX_POLLS,
    is_fatal: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The sum of every rank's ``x`` [rows, width], up to ``memory.max_rows`` rows, rounded to its dtype.

    ``residual`` [rows, width]: the sum is added to it in place; then ``gain`` [width] gives the RMSNorm of that, as
    rms_norm.py has it. Returns the last of these. ``out`` may be ``x``.
    """
    num_rows, width = x.shape
    assert num_rows <= memory.max_rows
    assert (width, x.dtype) == (memory.width, memory.dtype)
    assert x.stride(1) == 1
    assert out is None or out.is_contiguous()
    assert residual is None or residual.is_contiguous()
    assert residual is not None or gain is None
    if out is None:
        out = residual if residual is not None and gain is None else torch.empty_like(x)
    if num_rows:
        block = next_power_of_2(width)
        _one_shot_kernel[(min(num_rows, memory.programs),)](
            x,
            x if residual is None else residual,
            x if gain is None else gain,
            out,
            memory.memory,
            memory.peers,
            memory.calls,
            memory.status,
            num_rows,
            width,
            x.stride(0),
            -(-memory.max_rows // memory.programs),
            max_polls,
            eps,
            RANK=memory.rank,
            SIZE=memory.size,
            FLAG_BYTES=_LINE_BYTES * memory.programs,
            HAS_RESIDUAL=residual is not None,
            HAS_NORM=gain is not None,
            IS_FATAL=is_fatal,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
            **chain_options(x),
        )
    return out


@jit(do_not_specialize=["num_rows", "max_polls", "eps", "slab_rows"])
def _one_shot_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    gain: tl.tensor,
    out: tl.tensor,
    memory: tl.tensor,
    peers: tl.tensor,
    calls: tl.tensor,
    status: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    slab_rows: tl.tensor,
    max_polls: tl.tensor,
    eps: tl.tensor,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    FLAG_BYTES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_FATAL: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """Program p takes rows p, p + P, ... of P programs."""
    let_next_start(CHAINED)
    program = tl.program_id(0)
    dims = tl.arange(0, BLOCK)
    is_inside = dims < width
    if HAS_NORM:
        weight = tl.load(gain + dims, mask=is_inside, other=0.0).to(tl.float32)
    wait_for_last(CHAINED)
    call = tl.load(calls + program) + 1
    slab = ((program * 2 + (call & 1)) * SIZE).to(tl.int64) * slab_rows  # in rows; a part for each rank that writes

    for row in range(program, num_rows, tl.num_programs(0)):
        own = tl.load(x + tl.cast(row, tl.int64) * x_stride + dims, mask=is_inside, other=0.0)
        at = (slab + RANK * slab_rows + row // tl.num_programs(0)) * width + dims
        for rank in tl.static_range(SIZE):
            if rank != RANK:
                peer = (tl.load(peers + rank) + FLAG_BYTES).to(tl.pointer_type(x.dtype.element_ty))
                peer = tl.multiple_of(peer, 128)  # else two bytes are stored at a time
                tl.store(peer + at, own, mask=is_inside)
    tl.debug_barrier()  # all threads have written before one of them says so
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            flag = tl.load(peers + rank).to(tl.pointer_type(tl.int32)) + program * 32 + RANK
            tl.atomic_xchg(flag, call, sem="release", scope="sys")
    flags = memory.to(tl.pointer_type(tl.int32)) + program * 32
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            polls = 0
            behind = tl.atomic_add(flags + rank, 0, sem="acquire", scope="sys") - call
            while (behind < 0) & (polls < max_polls):
                behind = tl.atomic_add(flags + rank, 0, sem="acquire", scope="sys") - call
                polls = tl.where(tl.load(status, volatile=True) == 0, polls + 1, max_polls)
            if behind < 0:
                tl.store(status, 1)
                if IS_FATAL:  # better no answer than a wrong one
                    tl.inline_asm_elementwise("trap; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()

    slabs = (memory + FLAG_BYTES).to(tl.pointer_type(x.dtype.element_ty))
    for row in range(program, num_rows, tl.num_programs(0)):
        total = tl.zeros([BLOCK], tl.float32)
        for rank in tl.static_range(SIZE):
            if rank == RANK:
                part = tl.load(x + tl.cast(row, tl.int64) * x_stride + dims, mask=is_inside, other=0.0)
            else:
                at = (slab + rank * slab_rows + row // tl.num_programs(0)) * width + dims
                part = tl.load(slabs + at, mask=is_inside, other=0.0, cache_modifier=".cg")
            total += part.to(tl.float32)
        y = total.to(x.dtype.element_ty)
        out_at = tl.cast(row, tl.int64) * width + dims
        if HAS_RESIDUAL:
            y = tl.load(residual + out_at, mask=is_inside, other=0.0).to(tl.float32) + y.to(tl.float32)
            y = y.to(x.dtype.element_ty)
            tl.store(residual + out_at, y, mask=is_inside)
        if HAS_NORM:
            wide = y.to(tl.float32)
            scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
            y = wide * scale * weight
        if HAS_NORM or not HAS_RESIDUAL:
            tl.store(out + out_at, y.to(out.dtype.element_ty), mask=is_inside)
    tl.store(calls + program, call)
