"""Which tile of queries and which keys a program of hopper_attention.py has next."""
# ruff: noqa: N803  (constants in capitals; of kernels)

from __future__ import annotations

from aphro_kernels.hopper import gl, jit
from aphro_kernels.language import tl


@jit()
def num_items_of(tiles: tl.tensor, NUM_KV_HEADS: gl.constexpr) -> tl.tensor:
    return gl.load(tiles) * NUM_KV_HEADS


@jit()
def tile_of(
    item: tl.tensor,
    tiles: tl.tensor,
    num_items: tl.tensor,
    NUM_KV_HEADS: gl.constexpr,
    FIELDS: gl.constexpr,
) -> tl.tensor:
    """KV head, sequence, its first token and length and number of rows, the tile's first row and its tiles of keys.

    A round of all programs goes through the list one way, the next the other way: nobody gets all the long ones.
    """
    programs = gl.num_programs(0)
    round_ = item // programs
    place = item % programs
    place = gl.where(round_ % 2 == 1, programs - 1 - place, place)
    at = round_ * programs + place
    is_there = at < num_items
    at = gl.where(is_there, at, 0)
    entry = tiles + (1 + at // NUM_KV_HEADS) * FIELDS
    seq = gl.load(entry)
    start = gl.load(entry + 1)
    seq_len = gl.load(entry + 2)
    num_rows = gl.load(entry + 3)
    first = gl.load(entry + 4)
    steps = gl.where(is_there, gl.load(entry + 5), 0)
    return at % NUM_KV_HEADS, seq, start, seq_len, num_rows, first, steps
