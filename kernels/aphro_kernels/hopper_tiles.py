"""Which tile of queries and which keys a program of hopper_attention.py has next."""
# ruff: noqa: N803, N806  (constants in capitals; of kernels)

from __future__ import annotations

from aphro_kernels.hopper import gl, jit
from aphro_kernels.language import tl


@jit()
def tile_of(
    item: tl.tensor,
    seq_lens: tl.tensor,
    query_start_loc: tl.tensor,
    num_seqs: tl.tensor,
    num_tiles: tl.tensor,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    KEYS: gl.constexpr,
) -> tl.tensor:
    """KV head, sequence, its first token and length and number of rows, the tile's first row and its tiles of keys.

    A round of all programs goes through the tiles one way, the next the other way: nobody gets all the long ones.
    """
    programs = gl.num_programs(0)
    round_ = item // programs
    place = item % programs
    place = gl.where(round_ % 2 == 1, programs - 1 - place, place)
    at = round_ * programs + place
    is_there = at < num_tiles * NUM_KV_HEADS
    at = gl.minimum(at, num_tiles * NUM_KV_HEADS - 1)
    kv_head = at % NUM_KV_HEADS
    tile = num_tiles - 1 - at // NUM_KV_HEADS
    LANES: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, 4], [1, 32], [gl.num_warps(), 1], [1, 0]))
    seq = 0
    start = 0
    end = 0
    seq_len = 0
    for base in range(0, num_seqs, 128):  # at once: each load that waits for another costs a microsecond
        seqs = base + gl.arange(0, 128, LANES)
        starts = gl.load(query_start_loc + seqs, mask=seqs < num_seqs, other=0)
        ends = gl.load(query_start_loc + seqs + 1, mask=seqs < num_seqs, other=0)
        lens = gl.load(seq_lens + seqs, mask=seqs < num_seqs, other=0)
        is_here = (seqs < num_seqs) & (starts * GROUP // 128 + seqs <= tile)
        is_here = is_here & ((seqs + 1 >= num_seqs) | (ends * GROUP // 128 + seqs + 1 > tile))
        seq += gl.sum(gl.where(is_here, seqs, 0), axis=0)
        start += gl.sum(gl.where(is_here, starts, 0), axis=0)
        end += gl.sum(gl.where(is_here, ends, 0), axis=0)
        seq_len += gl.sum(gl.where(is_here, lens, 0), axis=0)
    num_rows = (end - start) * GROUP
    first = (tile - (start * GROUP // 128 + seq)) * 128
    last_query = gl.minimum(first + 127, num_rows - 1) // GROUP
    num_keys = seq_len - num_rows // GROUP + last_query + 1
    steps = gl.where(is_there & (first < num_rows), (num_keys + KEYS - 1) // KEYS, 0)
    return kv_head, seq, start, seq_len, num_rows, first, steps
