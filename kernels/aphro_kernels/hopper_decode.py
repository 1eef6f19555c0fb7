"""Decode attention on Hopper: warps that only copy keep a ring of tiles full, across the ends of segments.

One warp copies keys and one values into shared memory by the copy engine (TMA), tile after tile of the program's
stretch (decode_work.py). They wait for nothing but room: where a segment ends they are in the next ones already, and
while the kernel ahead ends they take the keys of earlier steps. Four warps compute. The products are transposed, keys
times queries and values times weights: the few heads of a group are their narrow side, which may be as narrow as 8.
decode_attention.py has the kernel for everything else.
"""
# ruff: noqa: N803, N806  (constants in capitals; a kernel is one piece)

from __future__ import annotations

import math
from typing import Any, Final

from torch import Tensor

from aphro_kernels.decode_work import FIELDS, DecodeWork, programs_of
from aphro_kernels.hopper import TensorDescriptor, gl, hopper, jit
from aphro_kernels.hopper_decode_loads import load
from aphro_kernels.hopper_decode_sums import attend
from aphro_kernels.language import chain_options, next_power_of_2, tl

_REGISTERS: Final = 80  # a thread when a program starts: three find room; then 136 to compute, 24 to copy


def suits(q: Tensor, k_cache: Tensor, work: DecodeWork, softcap: float | None) -> bool:
    """Whether the kernel is made for such a call."""
    block_size = k_cache.shape[2]
    return bool(work.stages) and k_cache.dtype == q.dtype and not softcap and block_size in (16, 32, 64)


def launch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    *,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    value_scale: float,
    work: DecodeWork,
) -> None:
    """Into ``out``, which is contiguous; arguments as of ``decode_attention``, and such as :func:`suits` agrees to."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    hopper_decode_kernel[(programs_of(work, num_rows),)](
        q,
        _descriptor(k_cache, work),
        _descriptor(v_cache, work),
        k_cache,
        v_cache,
        out,
        block_tables,
        seq_lens,
        work.stretches,
        work.totals,
        work.arrivals,
        work.parts,
        work.part_weights,
        q.stride(0),
        k_cache.stride(0) // head_dim,
        block_tables.stride(0),
        scale * math.log2(math.e),
        value_scale,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEADS=max(next_power_of_2(group), 8),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        STAGES=work.stages,
        KEYS=work.keys,
        FIELDS=FIELDS,
        num_warps=4,
        maxnreg=_REGISTERS,
        **chain_options(q),
    )


def _descriptor(keys: Tensor, work: DecodeWork) -> Any:
    """Of rows of one key, [BLOCK_SIZE, 64] at a time: what 128 bytes of swizzled shared memory hold of a row."""
    named = (keys.data_ptr(), keys.shape, keys.stride(0))
    if (kept := work.descriptors.get(named)) is None:  # making one takes the host longer than the rest of a launch
        num_blocks, num_kv_heads, block_size, head_dim = keys.shape
        rows = (num_blocks - 1) * (keys.stride(0) // head_dim) + num_kv_heads * block_size
        layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        kept = TensorDescriptor(keys, [rows, head_dim], [head_dim, 1], [block_size, 64], layout)
        work.descriptors[named] = kept
    return kept


@jit(do_not_specialize=["table_stride", "scale", "value_scale"])
def hopper_decode_kernel(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    out: tl.tensor,
    block_tables: tl.tensor,
    seq_lens: tl.tensor,
    stretches: tl.tensor,
    totals: tl.tensor,
    arrivals: tl.tensor,
    parts: tl.tensor,
    part_weights: tl.tensor,
    q_stride: tl.tensor,
    block_rows: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    value_scale: tl.tensor,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
    KEYS: gl.constexpr,
    FIELDS: gl.constexpr,
    CHAINED: gl.constexpr,
) -> None:
    """One stretch of tiles; ``block_rows``: keys of all heads of a cache's block, and what lies between blocks."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BARRIER: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    dtype: gl.constexpr = q.dtype.element_ty
    at = stretches + gl.program_id(0) * FIELDS
    tile = gl.load(at, cache_modifier=".cg")
    num_segments = gl.load(at + 1, cache_modifier=".cg")
    row = gl.load(at + 2, cache_modifier=".cg")
    row_tile = gl.load(at + 3, cache_modifier=".cg")
    stop = gl.load(at + 4, cache_modifier=".cg")
    first_of_piece = gl.load(at + 5, cache_modifier=".cg")
    last_of_piece = gl.load(at + 6, cache_modifier=".cg")
    seq_len = gl.load(at + 7, cache_modifier=".cg")
    total = gl.load(totals, cache_modifier=".cg")
    used = gl.load(totals + 1, cache_modifier=".cg")
    any_new = gl.load(totals + 2, cache_modifier=".cg")
    q_tile = gl.allocate_shared_memory(dtype, [HEADS, HEAD_DIM], SHARED)
    weights = gl.allocate_shared_memory(dtype, [HEADS, KEYS], SHARED)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HEAD_DIM], SHARED)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HEAD_DIM], SHARED)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        hopper.mbarrier.init(k_full.index(stage), count=1)
        hopper.mbarrier.init(v_full.index(stage), count=1)
        hopper.mbarrier.init(k_empty.index(stage), count=1)
        hopper.mbarrier.init(v_empty.index(stage), count=1)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (
                attend,
                (
                    q, out, q_tile, weights, k_tiles, v_tiles, k_full, v_full, k_empty, v_empty, seq_lens, tile,
                    num_segments, row, seq_len, row_tile, stop, first_of_piece, last_of_piece, total, used, arrivals,
                    parts, part_weights, q_stride, scale, value_scale, NUM_KV_HEADS, GROUP, HEADS, HEAD_DIM, STAGES,
                    KEYS, CHAINED,
                ),
            ),
            (
                load,
                (
                    keys, k_cache, k_tiles, k_full, k_empty, block_tables, seq_lens, any_new, tile, num_segments, row,
                    seq_len, row_tile, stop, block_rows, table_stride, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, STAGES, KEYS,
                    CHAINED,
                ),
            ),
            (
                load,
                (
                    values, v_cache, v_tiles, v_full, v_empty, block_tables, seq_lens, any_new, tile, num_segments, row,
                    seq_len, row_tile, stop, block_rows, table_stride, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, STAGES, KEYS,
                    CHAINED,
                ),
            ),
        ],
        [1, 1],
        [24, 24],
    )  # fmt: skip
