"""The copying half of hopper_decode.py: one warp for the keys, one for the values, by the copy engine (TMA)."""
# ruff: noqa: N803, N806  (constants in capitals; a kernel is one piece)

from __future__ import annotations

from aphro_kernels.hopper import gl, hopper, jit
from aphro_kernels.language import tl


@jit()
def load(
    cache: tl.tensor,
    cache_at: tl.tensor,
    tiles: tl.tensor,
    full: tl.tensor,
    empty: tl.tensor,
    block_tables: tl.tensor,
    seq_lens: tl.tensor,
    any_new: tl.tensor,
    tile: tl.tensor,
    num_segments: tl.tensor,
    row: tl.tensor,
    seq_len: tl.tensor,
    row_tile: tl.tensor,
    stop: tl.tensor,
    block_rows: tl.tensor,
    table_stride: tl.tensor,
    NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
    KEYS: gl.constexpr,
    CHAINED: gl.constexpr,
) -> None:
    """One warp: the tiles of keys, or of values, of a stretch. A block behind the last key becomes zeros.

    Only a row's last tile holds what this step writes: for that one the kernels before must have ended, and with
    ``any_new`` for all. Meanwhile it is asked for in the second-level cache.
    """
    BLOCKS: gl.constexpr = KEYS // BLOCK_SIZE
    HALVES: gl.constexpr = HEAD_DIM // 64
    SHARED: gl.constexpr = tiles.layout
    NOWHERE: gl.constexpr = 2**30  # a row beyond all caches: the copy engine writes zeros
    stage = 0
    phase = 1
    must_wait = any_new == 0
    if CHAINED:  # noqa: SIM102  (one of the two is a constant)
        if any_new != 0:
            tl.extra.cuda.gdc_wait()
    for _segment in range(0, num_segments):
        row_tiles = gl.maximum((seq_len + KEYS - 1) // KEYS, 1)
        row_end = row_tile + NUM_KV_HEADS * row_tiles
        next_len = gl.load(seq_lens + row + 1, mask=row_end < stop, other=0)
        kv_head = (tile - row_tile) // row_tiles
        begin = row_tile + kv_head * row_tiles
        until = gl.minimum(stop, begin + row_tiles)
        table = block_tables + row.to(gl.int64) * table_stride
        for step in range(tile - begin, until - begin):
            first = step * BLOCKS
            held = tiles.index(stage)._reinterpret(cache.dtype, [HALVES * BLOCKS, BLOCK_SIZE, 64], SHARED)
            places = ()
            for i in gl.static_range(BLOCKS):
                is_block = (first + i) * BLOCK_SIZE < seq_len
                place = gl.load(table + gl.where(is_block, first + i, 0)) * block_rows + kv_head * BLOCK_SIZE
                places = places + (gl.where(is_block, place, NOWHERE),)  # type: ignore[assignment]  # noqa: RUF005
            if CHAINED:  # noqa: SIM102
                if must_wait & (step == row_tiles - 1):
                    for i in gl.static_range(BLOCKS):
                        _fetch_block(cache_at, places[i], places[i] != NOWHERE, HEAD_DIM, BLOCK_SIZE)
                    tl.extra.cuda.gdc_wait()
                    must_wait = False
            hopper.mbarrier.wait(empty.index(stage), phase)
            hopper.mbarrier.expect(full.index(stage), KEYS * HEAD_DIM * 2)
            for i in gl.static_range(BLOCKS):
                for half in gl.static_range(HALVES):
                    hopper.tma.async_copy_global_to_shared(
                        cache, [places[i], half * 64], full.index(stage), held.index(half * BLOCKS + i)
                    )
            stage += 1
            if stage == STAGES:
                stage = 0
                phase = phase ^ 1
        tile = until
        if until == row_end:
            row_tile = until
            row += 1
            seq_len = next_len


@jit()
def _fetch_block(
    cache_at: tl.tensor,
    place: tl.tensor,
    is_block: tl.tensor,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
) -> None:
    """Ask for a block's lines of 128 bytes in the second-level cache: a hint, which never gives old bytes."""
    LINES: gl.constexpr = BLOCK_SIZE * HEAD_DIM // 64
    lines = gl.arange(0, LINES, gl.BlockedLayout([1], [32], [1], [0]))
    at = cache_at + gl.where(is_block, place, 0).to(gl.int64) * HEAD_DIM + lines * 64
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1
    )
