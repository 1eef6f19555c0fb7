"""The copying half of hopper_attention.py: one warp for the keys, one for the values, by the copy engine (TMA)."""
# ruff: noqa: N803, N806  (constants in capitals; of kernels)

from __future__ import annotations

from aphro_kernels.hopper import barrier, gl, hopper, jit
from aphro_kernels.hopper_tiles import num_items_of, tile_of
from aphro_kernels.language import tl


@jit()
def load(
    IS_VALUE: gl.constexpr,
    cache: tl.tensor,
    cache_at: tl.tensor,
    tiles: tl.tensor,
    full: tl.tensor,
    empty: tl.tensor,
    block_tables: tl.tensor,
    list_: tl.tensor,
    block_rows: tl.tensor,
    table_stride: tl.tensor,
    NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
    KEYS: gl.constexpr,
    FIELDS: gl.constexpr,
) -> None:
    """One warp: the tiles of keys, or of values, of all its program's rows, each from the last to the first.

    A block that no key stands in becomes zeros, and so do the values behind the last key of a block: their weight is 0,
    but in the cache anything may stand there, and 0 times NaN is NaN.
    """
    BLOCKS: gl.constexpr = KEYS // BLOCK_SIZE
    HALVES: gl.constexpr = HEAD_DIM // 64
    TILE_BYTES: gl.constexpr = KEYS * HEAD_DIM * 2
    BLOCK_BYTES: gl.constexpr = BLOCK_SIZE * HEAD_DIM * 2
    SHARED: gl.constexpr = tiles.layout
    NOWHERE: gl.constexpr = 2**30  # a row beyond all caches: the copy engine writes zeros
    loaded = 0
    programs = gl.num_programs(0)
    num_items = num_items_of(list_, NUM_KV_HEADS)
    n_kv_head, n_seq, _start, n_seq_len, _rows, _first, n_steps = tile_of(
        gl.program_id(0), list_, num_items, NUM_KV_HEADS, FIELDS
    )
    for item in range(gl.program_id(0), num_items + programs - 1, programs):
        kv_head, seq, seq_len, steps = n_kv_head, n_seq, n_seq_len, n_steps
        n_kv_head, n_seq, _start, n_seq_len, _rows, _first, n_steps = tile_of(
            item + programs, list_, num_items, NUM_KV_HEADS, FIELDS
        )
        if steps > 0:
            table = block_tables + seq.to(gl.int64) * table_stride
            head_row = kv_head * BLOCK_SIZE
            first_block = (steps - 1) * BLOCKS
            stage = loaded % STAGES
            tile = tiles.index(stage)._reinterpret(cache.dtype, [HALVES * BLOCKS, BLOCK_SIZE, 64], SHARED)
            hopper.mbarrier.wait(empty.index(stage), ((loaded // STAGES) & 1) ^ 1)
            last = seq_len // BLOCK_SIZE  # the block that is not full, if one is not
            cut = (seq_len % BLOCK_SIZE != 0) & (last >= first_block) & (last < first_block + BLOCKS)
            if IS_VALUE:
                if cut:
                    _copy_last_block(cache_at, tile, table, seq_len, kv_head, block_rows, HALVES, BLOCKS, BLOCK_SIZE)
                    hopper.fence_async_shared()
                    barrier()
                hopper.mbarrier.expect(full.index(stage), TILE_BYTES, pred=cut == 0)
                hopper.mbarrier.expect(full.index(stage), TILE_BYTES - BLOCK_BYTES, pred=cut)
            else:
                hopper.mbarrier.expect(full.index(stage), TILE_BYTES)
            for i in gl.static_range(BLOCKS):
                is_block = (first_block + i) * BLOCK_SIZE < seq_len
                row = gl.load(table + gl.where(is_block, first_block + i, 0)) * block_rows + head_row
                row = gl.where(is_block, row, NOWHERE)
                is_whole = (cut == 0) | (first_block + i != last) | (not IS_VALUE)
                for half in gl.static_range(HALVES):
                    hopper.tma.async_copy_global_to_shared(
                        cache, [row, half * 64], full.index(stage), tile.index(half * BLOCKS + i), pred=is_whole
                    )
            loaded += 1
        for step in range(1, steps):
            at = block_tables + seq.to(gl.int64) * table_stride + (steps - 1 - step) * BLOCKS
            stage = loaded % STAGES
            tile = tiles.index(stage)._reinterpret(cache.dtype, [HALVES * BLOCKS, BLOCK_SIZE, 64], SHARED)
            hopper.mbarrier.wait(empty.index(stage), ((loaded // STAGES) & 1) ^ 1)
            hopper.mbarrier.expect(full.index(stage), TILE_BYTES)
            for i in gl.static_range(BLOCKS):
                row = gl.load(at + i) * block_rows + kv_head * BLOCK_SIZE
                for half in gl.static_range(HALVES):
                    hopper.tma.async_copy_global_to_shared(
                        cache, [row, half * 64], full.index(stage), tile.index(half * BLOCKS + i)
                    )
            loaded += 1


@jit()
def _copy_last_block(
    v_cache: tl.tensor,
    v_tile: tl.tensor,
    table: tl.tensor,
    seq_len: tl.tensor,
    kv_head: tl.tensor,
    block_rows: tl.tensor,
    HALVES: gl.constexpr,
    BLOCKS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
) -> None:
    """By loads and stores, with zeros behind the last key."""
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    last = seq_len // BLOCK_SIZE
    block = gl.load(table + last).to(gl.int64)
    here = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(1, PLAIN))[:, None]
    dims = gl.arange(0, 64, gl.SliceLayout(0, PLAIN))[None, :]
    at = (block * block_rows + kv_head * BLOCK_SIZE + here) * (HALVES * 64) + dims
    is_key = (last * BLOCK_SIZE + here < seq_len) & (dims >= 0)
    for half in gl.static_range(HALVES):
        value = gl.load(v_cache + at + half * 64, mask=is_key, other=0.0)
        v_tile.index(half * BLOCKS + last % BLOCKS).store(value)
