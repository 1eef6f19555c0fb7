"""One step as tensors: where its rows stand in the paged cache, for the two ways of attention."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class DecodeGroup:
    """Rows ``start`` to ``stop`` of the batch: one token each, contexts of about the same number of blocks."""

    start: int
    stop: int
    block_rows: Tensor  # [2 * rows * num_kv_heads * blocks] int64, see GatheredRows
    seq_lens: Tensor  # [rows] int64, the row's own token included
    max_len: int  # blocks * block_size

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """``[rows, 1, 1, max_len]``: 0 where a key is seen, -inf elsewhere."""
        keys = torch.arange(self.max_len)
        lens = self.seq_lens[:, None]
        hidden = keys >= lens
        if window is not None:
            hidden |= keys < lens - window
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[:, None, None]


@dataclass(slots=True)
class Chunk:
    """Rows ``start`` to ``stop`` of the batch: consecutive tokens of one sequence behind ``context`` cached ones."""

    start: int
    stop: int
    context: int
    block_rows: Tensor  # [2 * num_kv_heads * blocks] int64, see GatheredRows

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """``[tokens, context + tokens]``: 0 where a key is seen (causal, aligned to the last key), -inf elsewhere."""
        queries = torch.arange(self.context, self.context + self.stop - self.start)[:, None]
        keys = torch.arange(self.context + self.stop - self.start)
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


@dataclass(slots=True)
class GatheredRows:
    """For attention by torch's operations (CPU): rows of the cache to write and to gather.

    The cache ``[num_blocks, 2, num_kv_heads, block_size, head_dim]`` is seen as a matrix: one row a (block, K or V,
    head, offset) to write, one row a (block, K or V, head) to gather.
    """

    slot_rows: Tensor  # [num_tokens * 2 * num_kv_heads] int64: each token's K heads, then its V heads
    decode: list[DecodeGroup]
    chunks: list[Chunk]
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)  # made once a step, shared by layers

    def mask_of(self, part: DecodeGroup | Chunk, window: int | None, dtype: torch.dtype) -> Tensor:
        key = (part.start, window)
        if key not in self.masks:
            self.masks[key] = part.mask(window, dtype)
        return self.masks[key]


@dataclass(slots=True)
class PagedPart:
    """Rows ``start`` to ``stop`` of the batch for one call of the paged attention kernel."""

    start: int
    stop: int
    block_tables: Tensor  # [num_seqs, max_blocks] int32
    seq_lens: Tensor  # [num_seqs] int32
    query_start_loc: Tensor  # [num_seqs + 1] int32
    max_query_len: int
    max_seq_len: int


@dataclass(slots=True)
class PagedRows:
    """For the kernels (GPU): slots to write, block tables to read."""

    slot_mapping: Tensor  # [num_tokens] int64 = block * block_size + offset
    parts: list[PagedPart]  # decode rows, then chunks


@dataclass(slots=True)
class Batch:
    """One step of a rank. Rows are tokens: decode rows first, the short contexts before the long, then the chunks."""

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    cache_rows: GatheredRows | PagedRows
    first_rows: dict[int, int]  # seq_id -> its first row
    sampled_rows: list[int]  # in plan order

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]
