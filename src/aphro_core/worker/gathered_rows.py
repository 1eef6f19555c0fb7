"""A step's rows for attention by torch's operations: which rows of the cache to write, which to gather, and masks."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from aphro_core.layers.batch import Chunk, ChunkTile, DecodeGroup, GatheredRows, KeyView
from aphro_core.worker.span import Span

# Rows times keys of a decode group below which torch's fused attention beats two products and a softmax: it starts in
# half the time, but then reads bfloat16 three times as slowly.
_FUSED_KEYS: Final = 256
# Elements of K and V. Padding up to the first is cheaper than a group of its own, about 0.1 ms a layer on two cores;
# a group above the second leaves the processor's cache between gathering and multiplying.
_MAX_WASTE: Final = 2**18
_MAX_GROUP: Final = 2**21
# Elements of a tile's scores, which are written and read four times and should stay in the cache; rows of a tile.
_MAX_SCORES: Final = 2**21
_TILE_ROWS: Final = range(16, 129)
_HIDDEN: Final = float("-inf")


class GatheredRowsBuilder:
    """Makes one rank's rows. Owns the scratch memory that all layers of a step gather into, one part at a time."""

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        windows: set[int | None],
        dtype: torch.dtype,
    ) -> None:
        self._num_heads, self._num_kv_heads, self._head_dim = num_heads, num_kv_heads, head_dim
        self._block_size = block_size
        self._windows = windows
        self._dtype = dtype
        planes = 2 * num_kv_heads  # K heads, then V heads: what a block consists of
        self._block_stride = planes * block_size  # rows to write
        self._plane_rows = torch.arange(planes) * block_size
        self._planes = torch.arange(planes).view(2, 1, num_kv_heads, 1)
        self._causal = torch.full((_TILE_ROWS[-1], _TILE_ROWS[-1]), _HIDDEN, dtype=dtype).triu_(1)
        self._gathered, self._scores = Scratch(dtype), Scratch(dtype)

    def build(self, decode: Sequence[Span], chunks: Sequence[Span]) -> GatheredRows:
        """``decode`` spans have one position each and come in ascending order of it."""
        size, stride = self._block_size, self._block_stride
        first_rows = [row for span in (*decode, *chunks) for row in span.slots(size, stride)]
        begun = [
            blocks[stop // size]
            for start, stop, blocks in (*decode, *chunks)
            if stop % size and stop - stop % size >= start
        ]
        return GatheredRows(
            slot_rows=torch.tensor(first_rows, dtype=torch.int64)[:, None] + self._plane_rows,
            begun_blocks=torch.tensor(begun) if begun else None,
            views={window: self._view(window, decode, chunks) for window in self._windows},
        )

    def _view(self, window: int | None, decode: Sequence[Span], chunks: Sequence[Span]) -> KeyView:
        seen = [self._blocks_seen(span, window) for span in decode]
        groups = [
            self._group(start, decode[start:stop], seen[start:stop], window)
            for start, stop in pairwise(self._cut_groups(seen))
        ]
        view, row = KeyView(groups, []), len(decode)
        for span in chunks:
            view.chunks.append(self._chunk(row, span, window))
            row = view.chunks[-1].stop
        return view

    def _blocks_seen(self, span: Span, window: int | None) -> range:
        """Places in the block table that hold a key which some query of the span sees."""
        start, stop, _ = span
        first = 0 if window is None else max(start + 1 - window, 0)
        return range(first // self._block_size, (stop - 1) // self._block_size + 1)

    def _cut_groups(self, seen: Sequence[range]) -> list[int]:
        """Where groups begin, and the number of rows: from the longest row down, as long as padding pays."""
        block = self._block_stride * self._head_dim  # elements
        cuts, longest, waste = [len(seen)], 0, 0
        for row in reversed(range(len(seen))):
            longest = max(longest, len(seen[row]))
            waste += (longest - len(seen[row])) * block
            if row + 1 < cuts[-1] and (waste > _MAX_WASTE or (cuts[-1] - row) * longest * block > _MAX_GROUP):
                cuts.append(row + 1)
                longest, waste = len(seen[row]), 0
        return [0, *reversed(cuts)] if seen else []

    def _group(self, row: int, spans: Sequence[Span], seen: Sequence[range], window: int | None) -> DecodeGroup:
        num_rows, num_blocks = len(spans), max(map(len, seen))
        tables = b"".join(_padded(span.blocks, places, num_blocks) for span, places in zip(spans, seen, strict=True))
        block_rows = self._block_rows(torch.frombuffer(bytearray(tables), dtype=torch.int64), num_rows)
        num_keys = num_blocks * self._block_size
        is_fused = num_rows * num_keys < _FUSED_KEYS
        key_rows, value_rows = block_rows.chunk(2)
        gathered = self._gathered.take(len(block_rows if is_fused else key_rows), self._block_size * self._head_dim)
        matrices = gathered.view(-1, num_rows, self._num_kv_heads, num_keys, self._head_dim)
        ends = [span.stop - places.start * self._block_size for span, places in zip(spans, seen, strict=True)]
        return DecodeGroup(
            start=row,
            stop=row + num_rows,
            is_fused=is_fused,
            key_rows=block_rows if is_fused else key_rows,
            value_rows=value_rows,
            gathered=gathered,
            keys=matrices[0],
            values=matrices[-1],
            mask=self._decode_mask(torch.tensor(ends), num_keys, window),
        )

    def _decode_mask(self, ends: Tensor, num_keys: int, window: int | None) -> Tensor:
        """``ends`` [rows]: keys up to there exist, counted from the first gathered one."""
        keys, ends = torch.arange(num_keys), ends[:, None]
        hidden = keys >= ends
        if window is not None:
            hidden |= keys < ends - window
        return torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, _HIDDEN)[:, None, None]

    def _chunk(self, row: int, span: Span, window: int | None) -> Chunk:
        start, stop, blocks = span
        seen = self._blocks_seen(span, window)
        block_rows = self._block_rows(torch.tensor(blocks[seen.start : seen.stop]), 1)
        gathered = self._gathered.take(len(block_rows), self._block_size * self._head_dim)
        first_key = seen.start * self._block_size
        num_rows = _MAX_SCORES // (self._num_heads * (stop - first_key))
        num_rows = min(max(num_rows, _TILE_ROWS[0]), _TILE_ROWS[-1])
        tiles = [
            self._tile(range(first, min(first + num_rows, stop)), start, gathered, first_key, window)
            for first in range(start, stop, num_rows)
        ]
        return Chunk(row, row + stop - start, block_rows, gathered, tiles)

    def _tile(self, queries: range, start: int, gathered: Tensor, first_key: int, window: int | None) -> ChunkTile:
        """``queries`` are positions of a chunk from ``start`` on, ``first_key`` the position gathered first."""
        low = first_key if window is None else max(queries.start + 1 - window, first_key)
        matrices = gathered.view(2, self._num_kv_heads, -1, self._head_dim)
        keys, values = matrices[:, :, low - first_key : queries.stop - first_key]
        scores = self._scores.take(self._num_heads * len(queries), queries.stop - low)
        grouped = scores.view(self._num_kv_heads, -1, len(queries), queries.stop - low)
        mask = self._tile_mask(queries, range(low, queries.stop), window)
        return ChunkTile(
            start=queries.start - start,
            stop=queries.stop - start,
            keys_t=keys.transpose(1, 2),
            values=values,
            scores=grouped.flatten(1, 2),
            masked_scores=grouped[..., -mask.shape[1] :],
            mask=mask,
        )

    def _tile_mask(self, queries: range, keys: range, window: int | None) -> Tensor:
        """``queries`` and ``keys`` are positions; they end together."""
        if window is None or len(keys) <= window:
            return self._causal[: len(queries), : len(queries)]
        distance = torch.arange(queries.start, queries.stop)[:, None] - torch.arange(keys.start, keys.stop)
        hidden = (distance < 0) | (distance >= window)
        return torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, _HIDDEN)

    def _block_rows(self, tables: Tensor, num_rows: int) -> Tensor:
        """``[2, rows, num_kv_heads, blocks]`` flattened: all K, then all V, each head's blocks one after the other."""
        return (tables.view(1, num_rows, 1, -1) * self._planes.numel() + self._planes).flatten()


class Scratch:
    """Memory that is used again and again: fresh pages in every layer would cost more than what is written to them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._memory = torch.empty(0, dtype=dtype)

    def take(self, rows: int, width: int) -> Tensor:
        """``[rows, width]``, the same memory each time while it is large enough."""
        if self._memory.numel() < rows * width:
            self._memory = torch.empty(rows * width, dtype=self._memory.dtype)
        return self._memory[: rows * width].view(rows, width)


def _padded(blocks: array[int], places: range, num_blocks: int) -> bytes:
    """A row of a group's table. Its own last block pads it: a stranger's might hold NaN, and 0 * NaN is NaN."""
    table = blocks[places.start : places.stop]
    return (table + table[-1:] * (num_blocks - len(table))).tobytes()
