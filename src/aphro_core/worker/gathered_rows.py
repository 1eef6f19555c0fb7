"""A step's rows for attention on a CPU: which rows of the cache to write, block tables, which to gather, and masks."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from aphro_core.layers.batch import Chunk, ChunkTile, DirectRows, GatheredRows
from aphro_core.worker.span import Span

# A chunk that ends within so many keys is read row by row, like one that decodes: products as small as its own are slow
_SHORT_KEYS: Final = 128
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
        is_deterministic: bool = False,
    ) -> None:
        """``is_deterministic``: every row is read by itself, so that no chunk decides how its keys are added up."""
        self._is_deterministic = is_deterministic
        self._num_heads, self._num_kv_heads, self._head_dim = num_heads, num_kv_heads, head_dim
        self._block_size = block_size
        self._windows = windows
        self._dtype = dtype
        planes = 2 * num_kv_heads  # K heads, then V heads: what a block consists of
        self._block_stride = planes * block_size  # rows to write
        self._plane_rows = torch.arange(planes) * block_size
        self._planes = torch.arange(planes).view(2, num_kv_heads, 1)
        self._causal = torch.full((_TILE_ROWS[-1], _TILE_ROWS[-1]), _HIDDEN, dtype=dtype).triu_(1)
        self._gathered, self._scores = Scratch(dtype), Scratch(dtype)

    def build(self, decode: Sequence[Span], chunks: Sequence[Span]) -> GatheredRows:
        """``decode`` spans have one position each; both come in ascending order of their last one."""
        num_short = len(chunks) if self._is_deterministic else bisect_right(chunks, _SHORT_KEYS, key=_stop_of)
        direct, chunks = [*decode, *chunks[:num_short]], chunks[num_short:]
        num_direct = sum(span.stop - span.start for span in direct)
        first_rows = [row for span in (*direct, *chunks) for row in span.slots(self._block_size, self._block_stride)]
        return GatheredRows(
            slot_rows=torch.tensor(first_rows, dtype=torch.int64)[:, None] + self._plane_rows,
            direct=_direct_rows(direct) if direct else None,
            chunks={window: self._chunks(num_direct, chunks, window) for window in self._windows},
        )

    def _chunks(self, row: int, spans: Sequence[Span], window: int | None) -> list[Chunk]:
        chunks: list[Chunk] = []
        for span in spans:
            chunks.append(self._chunk(row, span, window))
            row = chunks[-1].stop
        return chunks

    def _blocks_seen(self, span: Span, window: int | None) -> range:
        """Places in the block table that hold a key which some query of the span sees."""
        start, stop, _ = span
        first = 0 if window is None else max(start + 1 - window, 0)
        return range(first // self._block_size, (stop - 1) // self._block_size + 1)

    def _chunk(self, row: int, span: Span, window: int | None) -> Chunk:
        start, stop, blocks = span
        seen = self._blocks_seen(span, window)
        block_rows = self._block_rows(torch.tensor(blocks[seen.start : seen.stop]))
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

    def _block_rows(self, blocks: Tensor) -> Tensor:
        """``[2, num_kv_heads, blocks]`` flattened: all K, then all V, each head's blocks one after the other."""
        return (blocks * self._planes.numel() + self._planes).flatten()


class Scratch:
    """Memory that is used again and again: fresh pages in every layer would cost more than what is written to them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._memory = torch.empty(0, dtype=dtype)

    def take(self, rows: int, width: int) -> Tensor:
        """``[rows, width]``, the same memory each time while it is large enough."""
        if self._memory.numel() < rows * width:
            self._memory = torch.empty(rows * width, dtype=self._memory.dtype)
        return self._memory[: rows * width].view(rows, width)


def _direct_rows(spans: Sequence[Span]) -> DirectRows:
    max_blocks = max(len(span.blocks) for span in spans)
    tables, seq_lens = bytearray(), array("q")
    for span in spans:
        table = span.blocks + array("q", [0] * (max_blocks - len(span.blocks)))
        tables += table.tobytes() * (span.stop - span.start)
        seq_lens.extend(range(span.start + 1, span.stop + 1))
    block_tables = torch.frombuffer(tables, dtype=torch.int64).view(len(seq_lens), max_blocks)
    return DirectRows(block_tables, torch.frombuffer(seq_lens, dtype=torch.int64))


def _stop_of(span: Span) -> int:
    return span.stop
