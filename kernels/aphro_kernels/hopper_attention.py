"""Causal attention of chunks of queries on Hopper: loads, products and softmax overlap, each by warps of its own.

Two warps copy blocks of keys and of values into shared memory by the copy engine (TMA). Two groups of four warps have
64 rows each: while the tensor cores multiply for one group, the other takes its softmax. Programs stay on their
multiprocessor and go from tile to tile. attention_kernels.py has the kernel for everything else.
"""
# ruff: noqa: N803, N806  (constants in capitals; a kernel is one piece)

from __future__ import annotations

import math
from typing import Any, Final

from torch import Tensor

from aphro_kernels.chunk_tiles import FIELDS, KEYS
from aphro_kernels.hopper import TensorDescriptor, gl, hopper, jit, num_multiprocessors, suits_hopper
from aphro_kernels.hopper_loads import load
from aphro_kernels.hopper_softmax import attend
from aphro_kernels.language import chain_options, tl

_FEWEST_ROWS: Final = 2**14  # queries times heads of a call
FEWEST_QUERIES: Final = 192  # of a sequence, on average
_STAGES: Final = {64: 3, 128: 2}  # tiles of keys, and of values, in shared memory at once; by head_dim


def are_long(num_queries: int, num_seqs: int) -> bool:
    """Whether the kernel is the faster one (on an H200) for so many queries of so many sequences: a tile of queries
    costs it some microseconds beside its keys, which very short sequences do not earn back."""
    return num_queries >= FEWEST_QUERIES * num_seqs


def suits(q: Tensor, k_cache: Tensor, window: int | None, softcap: float | None) -> bool:
    """Whether the kernel is made for such a call, and the call large enough for it."""
    is_taken = suits_hopper(q) and k_cache.dtype == q.dtype and not window and not softcap
    has_shape = q.shape[2] in _STAGES and k_cache.shape[2] in (16, 32, 64, 128)
    return is_taken and has_shape and has_rows(q.shape[0], q.shape[1])


def has_rows(num_queries: int, num_heads: int) -> bool:
    """Whether a call has enough of them to keep all multiprocessors busy."""
    return num_queries * num_heads >= _FEWEST_ROWS


def hopper_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    *,
    block_tables: Tensor,
    tiles: Tensor,
    scale: float,
) -> None:
    """Into ``out``, which is contiguous; arguments as of ``paged_attention``, and such as :func:`suits` agrees to.
    ``tiles`` of this step, by ``list_tiles``."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, block_size = k_cache.shape[1:3]
    programs = min((len(tiles) - 1) * num_kv_heads, num_multiprocessors(q.device.index))
    hopper_attention_kernel[(programs,)](
        q,
        _descriptor(k_cache),
        _descriptor(v_cache),
        v_cache,
        out,
        block_tables,
        tiles,
        q.stride(0),
        k_cache.stride(0) // head_dim,
        block_tables.stride(0),
        scale * math.log2(math.e),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        STAGES=_STAGES[head_dim],
        KEYS=KEYS,
        FIELDS=FIELDS,
        num_warps=4,
        **chain_options(q),
    )


def _descriptor(keys: Tensor) -> Any:
    """Of rows of one key, [BLOCK_SIZE, 64] at a time: what 128 bytes of swizzled shared memory hold of a row."""
    num_blocks, num_kv_heads, block_size, head_dim = keys.shape
    rows = (num_blocks - 1) * (keys.stride(0) // head_dim) + num_kv_heads * block_size
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(keys, [rows, head_dim], [head_dim, 1], [block_size, 64], layout)


@jit(do_not_specialize=["table_stride", "scale"])
def hopper_attention_kernel(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    v_cache: tl.tensor,
    out: tl.tensor,
    block_tables: tl.tensor,
    tiles: tl.tensor,
    q_stride: tl.tensor,
    block_rows: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
    KEYS: gl.constexpr,
    FIELDS: gl.constexpr,
    CHAINED: gl.constexpr,
) -> None:
    """Tiles of 128 rows, the long ones first, dealt out to and fro; ``block_rows``: of a cache's block."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BARRIER: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    dtype: gl.constexpr = q.dtype.element_ty
    q_tiles = gl.allocate_shared_memory(dtype, [4, 64, HEAD_DIM], SHARED)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HEAD_DIM], SHARED)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HEAD_DIM], SHARED)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for part in gl.static_range(2):
        hopper.mbarrier.init(turns.index(part), count=1)
    for stage in gl.static_range(STAGES):
        hopper.mbarrier.init(k_full.index(stage), count=1)
        hopper.mbarrier.init(v_full.index(stage), count=1)
        hopper.mbarrier.init(k_empty.index(stage), count=2)
        hopper.mbarrier.init(v_empty.index(stage), count=2)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (
                attend,
                (
                    0, q, out, q_tiles, k_tiles, v_tiles, k_full, v_full, k_empty, v_empty, turns, tiles,
                    q_stride, scale, NUM_KV_HEADS, GROUP, HEAD_DIM, STAGES, KEYS, FIELDS,
                ),
            ),
            (
                attend,
                (
                    1, q, out, q_tiles, k_tiles, v_tiles, k_full, v_full, k_empty, v_empty, turns, tiles,
                    q_stride, scale, NUM_KV_HEADS, GROUP, HEAD_DIM, STAGES, KEYS, FIELDS,
                ),
            ),
            (
                load,
                (
                    False, keys, v_cache, k_tiles, k_full, k_empty, block_tables, tiles, block_rows,
                    table_stride, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, STAGES, KEYS, FIELDS,
                ),
            ),
            (
                load,
                (
                    True, values, v_cache, v_tiles, v_full, v_empty, block_tables, tiles, block_rows,
                    table_stride, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, STAGES, KEYS, FIELDS,
                ),
            ),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
