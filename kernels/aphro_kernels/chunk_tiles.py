"""Which tiles of queries a step's chunks make, longest first: listed once a step, read by each layer's attention.

A tile is ``ROWS`` rows, queries times heads of a group, of one sequence; it meets ``steps`` tiles of keys. Attention on
Hopper (hopper_attention.py) deals the list out to programs that stay on their multiprocessor. A program that had to
find its next tile among the sequences' lengths would take longer for that than for the products of a short one.
"""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from aphro_kernels.language import jit, tl, triton

ROWS: Final = 128  # of a tile: queries times heads of a group
KEYS: Final = 128
FIELDS: Final = 8  # sequence, its first query, length and rows, the tile's first row and tiles of keys; two unused
# Tiles of so many steps and more come in the order of their sequences, whose keys then stay in the second-level cache.
_LONG: Final = 8
_AT_ONCE: Final = 128
_MOST_SEQUENCES: Final = 2**12


def list_tiles(seq_lens: Tensor, query_start_loc: Tensor, num_queries: int, group: int) -> Tensor:
    """``[1 + tiles, FIELDS]`` int32: how many there are, then each. For chunks of CUDA tensors as ``paged_attention``
    takes them, ``num_queries`` in all, with ``group`` heads a KV head."""
    num_seqs = len(seq_lens)
    assert num_seqs <= _MOST_SEQUENCES
    most = num_queries * group // ROWS + num_seqs
    found, listed = (seq_lens.new_empty(1 + most, FIELDS, dtype=torch.int32) for _ in range(2))
    grid = (triton.cdiv(most, _AT_ONCE),)
    sizes = {"AT_ONCE": _AT_ONCE, "FIELDS": FIELDS, "num_warps": 4}  # not chained: attention may read before it waits
    tile = {"GROUP": group, "ROWS": ROWS, "KEYS": KEYS}
    _find_kernel[grid](seq_lens, query_start_loc, found, num_seqs, most, **tile, MOST=_MOST_SEQUENCES, **sizes)
    _order_kernel[grid](found, listed, most, LONG=_LONG, **sizes)
    return listed


@jit(do_not_specialize=["num_seqs", "num_tiles"])
def _find_kernel(
    seq_lens: tl.tensor,
    query_start_loc: tl.tensor,
    found: tl.tensor,
    num_seqs: tl.tensor,
    num_tiles: tl.tensor,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MOST: tl.constexpr,
    AT_ONCE: tl.constexpr,
    FIELDS: tl.constexpr,
) -> None:
    """Tile t belongs to the last sequence s with start * GROUP // ROWS + s <= t; some tiles are nobody's."""
    tile = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    low = tl.zeros([AT_ONCE], tl.int32)
    high = low + num_seqs
    size = MOST
    while size > 1:  # bisection, as many rounds as the most sequences take
        middle = (low + high) // 2
        is_open = high - low > 1
        begin = tl.load(query_start_loc + middle, mask=is_open, other=0) * GROUP // ROWS + middle
        low = tl.where(is_open & (begin <= tile), middle, low)
        high = tl.where(is_open & (begin > tile), middle, high)
        size = size // 2
    start = tl.load(query_start_loc + low)
    num_queries = tl.load(query_start_loc + low + 1) - start
    seq_len = tl.load(seq_lens + low)
    first = (tile - (start * GROUP // ROWS + low)) * ROWS
    last_query = tl.minimum(first + ROWS - 1, num_queries * GROUP - 1) // GROUP
    num_keys = tl.maximum(seq_len - num_queries + last_query + 1, 0)
    is_there = (tile < num_tiles) & (first < num_queries * GROUP)
    at = found + (1 + tile) * FIELDS
    is_tile = tile < num_tiles
    tl.store(at, low, mask=is_tile)
    tl.store(at + 1, start, mask=is_tile)
    tl.store(at + 2, seq_len, mask=is_tile)
    tl.store(at + 3, num_queries * GROUP, mask=is_tile)
    tl.store(at + 4, first, mask=is_tile)
    tl.store(at + 5, tl.where(is_there, (num_keys + KEYS - 1) // KEYS, 0), mask=is_tile)


@jit(do_not_specialize=["num_tiles"])
def _order_kernel(
    found: tl.tensor,
    listed: tl.tensor,
    num_tiles: tl.tensor,
    LONG: tl.constexpr,
    AT_ONCE: tl.constexpr,
    FIELDS: tl.constexpr,
) -> None:
    """Each tile's place is the number of those that go before it: longer ones, and of its kind those behind it."""
    tile = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    at = found + (1 + tile) * FIELDS
    steps = tl.load(at + 5, mask=tile < num_tiles, other=0)
    kind = tl.minimum(steps, LONG)
    place = tl.zeros([AT_ONCE], tl.int32)
    count = 0
    for base in range(0, num_tiles, AT_ONCE):
        other = base + tl.arange(0, AT_ONCE)
        other_kind = tl.minimum(tl.load(found + (1 + other) * FIELDS + 5, mask=other < num_tiles, other=0), LONG)
        is_before = other_kind[None, :] > kind[:, None]
        is_before = is_before | ((other_kind[None, :] == kind[:, None]) & (other[None, :] > tile[:, None]))
        place += tl.sum(is_before.to(tl.int32), axis=1)
        count += tl.sum((other_kind > 0).to(tl.int32), axis=0)
    to = listed + (1 + place) * FIELDS
    is_there = (tile < num_tiles) & (steps > 0)
    tl.store(to + 5, steps, mask=is_there)
    for field in tl.static_range(5):
        tl.store(to + field, tl.load(at + field, mask=is_there, other=0), mask=is_there)
    if tl.program_id(0) == 0:
        tl.store(listed, count)
