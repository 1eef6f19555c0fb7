"""The random number of a token: Gumbel noise as a function of (seed, position, token id), the same on every device.

Integer hash, 32 bits, all arithmetic modulo 2**32 (``>>`` is logical):

- token: ``mixed[t] = lowbias32(t + 0x9E3779B9)``, a table made once;
- row: ``key = splitmix64(splitmix64(seed) + position)``, made on the host; ``k0`` is its high half, ``k1`` its low;
- ``x = mixed[t] ^ k0``, then lowbias32 with ``k1`` added behind its first multiplication.

lowbias32 is Chris Wellons' two-round mixer (0x7FEB352D, 0x846CA68B), splitmix64 is Steele, Lea and Flood's. The low 31
bits give ``v = (x + 1/2) / 2**31`` in float32, which is fine near 0, where the winners of a draw come from; then
``E = -log(1 - v)`` is exponential and ``-log(E)`` is Gumbel noise between -2.8 and 22.2. The integers are equal on CPU
and CUDA; the two logarithms may differ in the last place.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_MASK64: Final = 2**64 - 1
_GOLDEN64: Final = 0x9E3779B97F4A7C15
_BLOCK_ELEMENTS: Final = 2**19  # numbers made at once on a CPU: three buffers of 2 MiB stay in its cache

# v = x * _SCALE + _TINY lies inside (0, 1): neither logarithm meets a 0 at either end
_SCALE: Final = 2.0**-31 * (1 - 2.0**-23)
_TINY: Final = 2.0**-32


class GumbelNoise:
    """Adds noise to scores. Owns the table of mixed token ids and, on a CPU, scratch memory."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        ids = torch.arange(vocab_size, dtype=torch.int64, device=device)
        self._mixed_ids = _lowbias32_(_as_int32(ids + 0x9E3779B9), torch.zeros((), dtype=torch.int32, device=device))
        self._block_rows = max(1, _BLOCK_ELEMENTS // vocab_size) if device.type == "cpu" else 2**31
        self._scratch: tuple[Tensor, Tensor, Tensor] | None = None

    def add_(self, scores: Tensor, keys: Tensor) -> Tensor:
        """Add noise to ``scores`` [rows, vocab] float32 in place. ``keys`` [rows, 2] int32: :func:`draw_keys`."""
        for start in range(0, scores.shape[0], self._block_rows):
            block = scores[start : start + self._block_rows]
            bits, spare, noise = self._buffers(block)
            torch.bitwise_xor(self._mixed_ids, keys[start : start + len(block), :1], out=bits)
            block -= _log_exponential(bits, keys[start : start + len(block), 1:], spare, noise)
        return scores

    def add_at_(self, scores: Tensor, keys: Tensor, token_ids: Tensor) -> Tensor:
        """The same noise for chosen tokens only: ``scores``, ``token_ids`` [rows, n]; in place on ``scores``."""
        bits = self._mixed_ids[token_ids] ^ keys[:, :1]
        scores -= _log_exponential(bits, keys[:, 1:], torch.empty_like(bits), torch.empty_like(scores))
        return scores

    def _buffers(self, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if block.device.type != "cpu":
            bits = torch.empty_like(block, dtype=torch.int32)
            return bits, torch.empty_like(bits), torch.empty_like(block)
        if self._scratch is None:  # fresh pages in every step would cost more than the arithmetic
            bits = torch.empty(self._block_rows, block.shape[1], dtype=torch.int32)
            self._scratch = bits, torch.empty_like(bits), torch.empty(self._block_rows, block.shape[1])
        bits, spare, noise = self._scratch
        return bits[: len(block)], spare[: len(block)], noise[: len(block)]


def draw_keys(seeds_and_positions: list[tuple[int, int]], device: torch.device) -> Tensor:
    """``[rows, 2]`` int32: the 64-bit key of each draw, high half first. Seeds from 0 to 2**63 - 1."""
    keys = [_splitmix64(_splitmix64(seed) + position) for seed, position in seeds_and_positions]
    halves = [[_to_signed(key >> 32), _to_signed(key & 0xFFFFFFFF)] for key in keys]
    return torch.tensor(halves, dtype=torch.int32, device=device)


def _splitmix64(state: int) -> int:
    z = (state + _GOLDEN64) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _to_signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _as_int32(words: Tensor) -> Tensor:
    """int64 words modulo 2**32, as the int32 of the same bits."""
    words = words & 0xFFFFFFFF
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _xorshift_(bits: Tensor, shift: int, spare: Tensor) -> None:
    # int32 shifts are arithmetic: the mask makes this one logical
    torch.bitwise_right_shift(bits, shift, out=spare)
    spare &= (1 << (32 - shift)) - 1
    bits ^= spare


def _lowbias32_(bits: Tensor, middle_key: Tensor, spare: Tensor | None = None) -> Tensor:
    spare = torch.empty_like(bits) if spare is None else spare
    _xorshift_(bits, 16, spare)
    bits *= 0x7FEB352D
    bits += middle_key
    _xorshift_(bits, 15, spare)
    bits *= _to_signed(0x846CA68B)
    _xorshift_(bits, 16, spare)
    return bits


def _log_exponential(bits: Tensor, middle_key: Tensor, spare: Tensor, out: Tensor) -> Tensor:
    """log(E) of the exponential number that each hash stands for, minus Gumbel noise. Overwrites all it gets."""
    _lowbias32_(bits, middle_key, spare)
    bits &= 0x7FFFFFFF
    torch.mul(bits, -_SCALE, out=out)
    out -= _TINY
    return out.log1p_().neg_().log_()
