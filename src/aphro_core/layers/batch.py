"""One step as tensors: what the layers read, and the masks that they share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class DecodeGroup:
    """Rows ``start`` to ``stop`` of the batch: one token each, contexts of about the same number of blocks."""

    start: int
    stop: int
    block_rows: Tensor  # [rows * num_kv_heads * blocks] int64: rows of the cache seen as [blocks * kv_heads, ...]
    seq_lens: Tensor  # [rows] int64, the row's own token included
    max_len: int  # blocks * block_size

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """``[rows, 1, 1, max_len]``: 0 where a key is seen, -inf elsewhere."""
        keys = torch.arange(self.max_len, device=self.seq_lens.device)
        lens = self.seq_lens[:, None]
        hidden = keys >= lens
        if window is not None:
            hidden |= keys < lens - window
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))[
            :, None, None
        ]


@dataclass(slots=True)
class Chunk:
    """Rows ``start`` to ``stop`` of the batch: consecutive tokens of one sequence behind ``context`` cached ones."""

    start: int
    stop: int
    context: int
    block_rows: Tensor  # [num_kv_heads * blocks] int64

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """``[tokens, context + tokens]``: 0 where a key is seen (causal, aligned to the last key), -inf elsewhere."""
        num_tokens = self.stop - self.start
        device = self.block_rows.device
        queries = torch.arange(self.context, self.context + num_tokens, device=device)[:, None]
        keys = torch.arange(self.context + num_tokens, device=device)
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


@dataclass(slots=True)
class Batch:
    """One step of a rank. Rows are tokens: decode rows first, by length, then the chunks."""

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    slot_rows: (
        Tensor  # [num_tokens * num_kv_heads] int64: rows of the cache seen as [blocks * kv_heads * block_size, ...]
    )
    decode: list[DecodeGroup]
    chunks: list[Chunk]
    first_rows: dict[int, int]  # seq_id -> its first row
    sampled_rows: list[int]  # in plan order
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)  # made once a step, shared by layers

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    def mask_of(self, part: DecodeGroup | Chunk, window: int | None, dtype: torch.dtype) -> Tensor:
        key = (part.start, window)
        if key not in self.masks:
            self.masks[key] = part.mask(window, dtype)
        return self.masks[key]
