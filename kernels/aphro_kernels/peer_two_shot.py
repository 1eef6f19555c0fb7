"""Sum of many rows over the GPUs of one host, residual add and RMSNorm with it: each rank adds up some of the rows.

Two-shot, over NVLink without multicast: of ``rows`` rows rank r owns ``shares(rows)[r]``. Whoever makes a summand
copies the others' rows into their memory (peer_rows.send: the copy engine takes no multiprocessor from a product beside
it). The kernel waits until all have, adds up the rows that it owns in the order of the ranks, rounds, adds the
residual, norms, and writes what others need of that into their memory. All get the same bits, those of
peer_all_reduce.py.

Either everybody has the whole residual behind it, or (``is_shared_out``) each rank its own rows of it alone, and the
norm of all: then no row is normed twice. As there, calls are counted on the device, all ranks make the same ones, and
a rank that stays away ends them by ``status``.
"""
# ruff: noqa: N803, PLR0912, PLR0915  (constants in capitals; a kernel is one piece)

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from aphro_kernels.language import jit, next_power_of_2, tl
from aphro_kernels.peer_rows import LINE, PeerRows

_MAX_POLLS: Final = 60_000_000  # of a flag: about a minute and a half


def peer_two_shot(
    x: Tensor,
    peers: PeerRows,
    *,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float = 0.0,
    is_shared_out: bool = False,
    max_polls: int = _MAX_POLLS,
    is_fatal: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The sum of every rank's ``x`` [rows, width], of which the others have got their rows (peer_rows.send), rounded to
    its dtype.

    ``residual`` [rows, width]: the sum is added to it in place, with ``is_shared_out`` only to the rows that this rank
    owns; then ``gain`` [width] gives the RMSNorm of that, as rms_norm.py has it. Returns the last of these, with
    ``is_shared_out`` in ``peers.rows``, which the next call writes. ``out`` may be ``x``.
    """
    num_rows = len(x)
    assert 0 < num_rows <= peers.max_rows
    assert x.is_contiguous()
    assert (x.shape[1], x.dtype) == (peers.width, peers.dtype)
    assert residual is None or (residual.is_contiguous() and residual.shape == (num_rows, peers.width))
    assert residual is not None or gain is None
    assert not is_shared_out or gain is not None
    if is_shared_out:
        out = peers.rows[:num_rows]
    elif out is None:
        is_last = residual is not None and gain is None
        out = residual if is_last else torch.empty_like(x)
    assert out is not None
    assert out.is_contiguous()
    block = next_power_of_2(peers.width)
    _two_shot_kernel[(peers.programs,)](
        x,
        out if residual is None else residual,
        out if gain is None else gain,
        out,
        peers.memory,
        peers.peers,
        peers.calls,
        peers.status,
        num_rows,
        peers.width,
        -(-num_rows // peers.size),
        -(-peers.max_rows // peers.size),
        max_polls,
        eps,
        RANK=peers.rank,
        SIZE=peers.size,
        PROGRAMS=peers.programs,
        LINE=LINE,
        HAS_RESIDUAL=residual is not None,
        HAS_NORM=gain is not None,
        IS_SHARED_OUT=is_shared_out,
        IS_FATAL=is_fatal,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return out


@jit()
def _wait(flag: tl.tensor, call: tl.tensor, status: tl.tensor, max_polls: tl.tensor, IS_FATAL: tl.constexpr) -> None:
    """Until another rank has set ``flag`` to ``call``."""
    polls = 0
    behind = tl.atomic_add(flag, 0, sem="acquire", scope="sys") - call
    while (behind < 0) & (polls < max_polls):
        behind = tl.atomic_add(flag, 0, sem="acquire", scope="sys") - call
        polls = tl.where(tl.load(status, volatile=True) == 0, polls + 1, max_polls)
    if behind < 0:
        tl.store(status, 1)
        if IS_FATAL:  # better no answer than a wrong one
            tl.inline_asm_elementwise("trap; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@jit(do_not_specialize=["num_rows", "max_polls", "eps", "share", "slab_rows"])
def _two_shot_kernel(
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
    share: tl.tensor,
    slab_rows: tl.tensor,
    max_polls: tl.tensor,
    eps: tl.tensor,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    LINE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_SHARED_OUT: tl.constexpr,
    IS_FATAL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Of a rank's rows program p takes p, p + P, ... of P programs: of its own, then of what each other rank owns."""
    program = tl.program_id(0)
    dims = tl.arange(0, BLOCK)
    is_inside = dims < width
    if HAS_NORM:
        weight = tl.load(gain + dims, mask=is_inside, other=0.0).to(tl.float32)
    call = tl.load(calls + program) + 1
    flags = memory.to(tl.pointer_type(tl.int32))
    if program == 0:  # what ran before this kernel has written this rank's summand everywhere
        for rank in tl.static_range(SIZE):
            if rank != RANK:
                flag = tl.load(peers + rank).to(tl.pointer_type(tl.int32)) + PROGRAMS * LINE + RANK
                tl.atomic_xchg(flag, call, sem="release", scope="sys")
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            _wait(flags + PROGRAMS * LINE + rank, call, status, max_polls, IS_FATAL)
    tl.debug_barrier()

    summands = (memory + 4 * LINE * (PROGRAMS + 1)).to(tl.pointer_type(out.dtype.element_ty))
    behind = tl.cast(slab_rows, tl.int64) * (SIZE - 1) * width  # the rows, behind the summands
    first = RANK * share
    for row in range(first + program, min(first + share, num_rows), PROGRAMS):
        at = tl.cast(row, tl.int64) * width + dims
        total = tl.zeros([BLOCK], tl.float32)
        for rank in tl.static_range(SIZE):
            if rank == RANK:
                part = tl.load(x + at, mask=is_inside, other=0.0)
            else:
                slab = tl.cast(slab_rows, tl.int64) * (rank - 1 if rank > RANK else rank)
                part_at = (slab + row - first) * width + dims
                part = tl.load(summands + part_at, mask=is_inside, other=0.0, cache_modifier=".cg")
            total += part.to(tl.float32)
        y = total.to(out.dtype.element_ty)
        if HAS_RESIDUAL:
            y = (tl.load(residual + at, mask=is_inside, other=0.0).to(tl.float32) + y.to(tl.float32)).to(y.dtype)
            tl.store(residual + at, y, mask=is_inside)
        told = y
        if HAS_NORM:
            wide = y.to(tl.float32)
            y = (wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps) * weight).to(y.dtype)
        if IS_SHARED_OUT:
            told = y
        for rank in tl.static_range(SIZE):
            if rank != RANK:
                peer = (tl.load(peers + rank) + 4 * LINE * (PROGRAMS + 1)).to(tl.pointer_type(out.dtype.element_ty))
                peer = tl.multiple_of(peer, 128)  # else two bytes are stored at a time
                tl.store(peer + behind + at, told, mask=is_inside)
        if HAS_NORM or not HAS_RESIDUAL:
            tl.store(out + at, y, mask=is_inside)
    tl.debug_barrier()  # all threads have written before one of them says so
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            flag = tl.load(peers + rank).to(tl.pointer_type(tl.int32)) + program * LINE + RANK
            tl.atomic_xchg(flag, call, sem="release", scope="sys")

    for rank in tl.static_range(SIZE):
        if rank != RANK:
            _wait(flags + program * LINE + rank, call, status, max_polls, IS_FATAL)
            if not IS_SHARED_OUT:
                tl.debug_barrier()
                for row in range(rank * share + program, min((rank + 1) * share, num_rows), PROGRAMS):
                    at = tl.cast(row, tl.int64) * width + dims
                    y = tl.load(summands + behind + at, mask=is_inside, other=0.0, cache_modifier=".cg")
                    if HAS_RESIDUAL:
                        tl.store(residual + at, y, mask=is_inside)
                    if HAS_NORM:
                        wide = y.to(tl.float32)
                        y = (wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps) * weight).to(y.dtype)
                    if HAS_NORM or not HAS_RESIDUAL:
                        tl.store(out + at, y, mask=is_inside)
    tl.store(calls + program, call)
