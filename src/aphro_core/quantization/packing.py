"""Codes in and out of words and bytes: what the formats store, and what is kept in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_words(words: Tensor, bits: int, dim: int) -> Tensor:
    """Unsigned codes of ``bits`` out of int32 words, the lowest bits first along ``dim``: uint8, 32 / bits times as
    long there."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    codes = (words.movedim(dim, -1).unsqueeze(-1) >> shifts) & (2**bits - 1)
    flat: Tensor = codes.to(torch.uint8).flatten(-2).movedim(-1, dim).contiguous()
    return flat


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes below 16 [rows, columns], two a byte: the even column in the low half."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of ``pack_nibbles``."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
