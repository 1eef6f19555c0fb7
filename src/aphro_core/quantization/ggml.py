"""GGUF's block formats kept packed: blocks to codes, scales and offsets, 4 or 8 bits a weight.

Codes are kept as they are, with the products of a block's scale and its groups' as one scale a group; those of
``GGUF_REQUANTISED`` are rounded to 8 bits anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from aphro_core.checkpoint.gguf import GGUFCheckpoint
from aphro_core.models.quantization import GGUF_KINDS, GGUF_REQUANTISED
from aphro_core.quantization.matrix import PackedMatrix, below_each_other
from aphro_core.quantization.online import quantise
from aphro_core.quantization.packing import pack_nibbles
from aphro_core.quantization.source import QuantSource

# (codes [blocks, elements], scales [blocks, groups], offsets the same or None), scales and offsets in float32
Decoded = tuple[Tensor, Tensor, Tensor | None]
_IQ4_WEIGHTS: Final = torch.tensor(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.int8
)
_ROWS: Final = 1024  # that are worked on at once, to bound the memory besides the result


def read_ggml(source: QuantSource) -> PackedMatrix:
    """The module's rows and columns; columns may begin within a block of 256, as its groups are smaller."""
    checkpoint, name = source.checkpoint, f"{source.module}.weight"
    assert isinstance(checkpoint, GGUFCheckpoint), "the layout is that of GGUF files"
    block_format = source.spec.block_formats[name]
    decode, (_, group) = _DECODERS[block_format], GGUF_KINDS[block_format]
    blocks, first_column = checkpoint.read_blocks(name, source.rows, source.columns)
    inside = slice(source.columns.start - first_column, source.columns.stop - first_column)
    groups = slice(inside.start // group, inside.stop // group)

    def requantised(rows: Tensor) -> PackedMatrix:
        codes, scales, offsets = decode(rows.flatten(0, 1))
        assert offsets is not None
        values = codes.view(*scales.shape, group) * scales[..., None] + offsets[..., None]
        return quantise(values.view(len(rows), -1)[:, inside].contiguous(), "int8", group, source.scale_dtype)

    def kept(rows: Tensor) -> PackedMatrix:
        codes, *factors = decode(rows.flatten(0, 1))
        codes = codes.view(len(rows), -1)[:, inside]
        scales, offsets = (
            None if each is None else each.view(len(rows), -1)[:, groups].to(source.scale_dtype).contiguous()
            for each in factors
        )
        assert scales is not None
        if offsets is None:
            return PackedMatrix("int8", codes.contiguous(), scales)
        return PackedMatrix("int4", pack_nibbles(codes), scales, offsets)

    read = requantised if block_format in GGUF_REQUANTISED else kept
    (matrix,) = below_each_other([read(rows) for rows in torch.split(blocks, _ROWS)])
    return matrix


def _q4_0(blocks: Tensor) -> Decoded:
    scales = _halves(blocks, 0)
    return _split_nibbles(blocks[:, 2:]), scales, -8.0 * scales


def _q4_1(blocks: Tensor) -> Decoded:
    return _split_nibbles(blocks[:, 4:]), _halves(blocks, 0), _halves(blocks, 2)


def _q5_0(blocks: Tensor) -> Decoded:
    codes = _split_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6]) << 4
    return codes.to(torch.int8) - 16, _halves(blocks, 0), None


def _q5_1(blocks: Tensor) -> Decoded:
    codes = _split_nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8]) << 4
    return codes, _halves(blocks, 0), _halves(blocks, 2)


def _iq4_nl(blocks: Tensor) -> Decoded:
    """A nibble is the place of a weight among 16."""
    return _IQ4_WEIGHTS[_split_nibbles(blocks[:, 2:]).int()], _halves(blocks, 0), None


def _iq4_xs(blocks: Tensor) -> Decoded:
    """As IQ4_NL, with eight scales of 6 bits, less 32: two high bits each in a word, four low ones in half a byte."""
    words = blocks[:, 2:4].contiguous().view(torch.int16).int() & 0xFFFF
    twos = words >> torch.arange(0, 16, 2, dtype=torch.int32) & 3
    fours = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), dim=2).flatten(1)
    codes = _split_nibbles(blocks[:, 8:].reshape(-1, 16)).view(len(blocks), -1)
    return _IQ4_WEIGHTS[codes.int()], _halves(blocks, 0) * ((fours | twos << 4) - 32), None


def _q8_0(blocks: Tensor) -> Decoded:
    return blocks[:, 2:].contiguous().view(torch.int8), _halves(blocks, 0), None


def _q2_k(blocks: Tensor) -> Decoded:
    """16 bytes with a scale in their low half and a minimum in the high one; 128 weights at a time, 2 bits each."""
    both, shifts = blocks[:, :16], torch.arange(0, 8, 2, dtype=torch.uint8).view(1, 1, 4, 1)
    codes = (blocks[:, 16:80].view(-1, 2, 1, 32) >> shifts & 3).flatten(1)
    return codes, _halves(blocks, 80) * (both & 15), -_halves(blocks, 82) * (both >> 4)


def _q3_k(blocks: Tensor) -> Decoded:
    """Two low bits as in Q2_K, the third as one of eight planes of ``hmask``; 16 scales of 6 bits, less 32."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(1, 1, 4, 1)
    low = (blocks[:, 32:96].view(-1, 2, 1, 32) >> shifts & 3).flatten(1)
    planes = torch.arange(8, dtype=torch.uint8).view(1, 8, 1)
    high = (blocks[:, None, :32] >> planes & 1).flatten(1)
    packed = blocks[:, 96:108]
    fours = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), dim=1)
    twos = (packed[:, None, 8:] >> torch.arange(0, 8, 2, dtype=torch.uint8).view(1, 4, 1) & 3).flatten(1)
    scales = (fours | twos << 4).to(torch.int8) - 32
    return (low | high << 2).to(torch.int8) - 4, _halves(blocks, 108) * scales, None


def _q4_k(blocks: Tensor) -> Decoded:
    quarters = blocks[:, 16:].view(-1, 4, 32)  # 64 weights each: the low halves, then the high ones
    codes = torch.stack((quarters & 15, quarters >> 4), dim=2).flatten(1)
    return codes, *_eight_groups(blocks)


def _q5_k(blocks: Tensor) -> Decoded:
    """As Q4_K, with each weight's fifth bit in one of eight planes of ``qh``."""
    quarters, planes = blocks[:, 48:].view(-1, 4, 32), torch.arange(8, dtype=torch.uint8).view(1, 8, 1)
    codes = torch.stack((quarters & 15, quarters >> 4), dim=2).flatten(1)
    high = (blocks[:, None, 16:48] >> planes & 1).flatten(1)
    return codes | high << 4, *_eight_groups(blocks)


def _eight_groups(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of eight groups in 6 bits each: the first four whole in a byte, the last four in two parts."""
    low = blocks[:, 4:16]
    first, second, third = low[:, 0:4], low[:, 4:8], low[:, 8:12]
    scales = torch.cat((first & 63, (third & 15) | (first >> 6 << 4)), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | (second >> 6 << 4)), dim=1)
    return _halves(blocks, 0) * scales, -_halves(blocks, 2) * minima


def _q6_k(blocks: Tensor) -> Decoded:
    """Four low bits in ``ql``, two high ones in ``qh``, 16 scales of one byte; 128 weights at a time."""
    low, high = blocks[:, :128].view(-1, 2, 2, 32), blocks[:, 128:192].view(-1, 2, 1, 32)
    nibbles = torch.cat((low & 15, low >> 4), dim=2)  # [blocks, halves, 4, 32]
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(1, 1, 4, 1)
    codes = (nibbles | ((high >> shifts) & 3) << 4).flatten(1).to(torch.int8) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8)
    return codes, _halves(blocks, 208) * scales, None


_DECODERS: Final[dict[str, Callable[[Tensor], Decoded]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q8_0": _q8_0,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "Q6_K": _q6_k,
}


def _halves(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block, [blocks, 1] float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _split_nibbles(packed: Tensor) -> Tensor:
    """The low halves of all bytes, then the high ones."""
    return torch.cat((packed & 15, packed >> 4), dim=1)


def _fifth_bits(words: Tensor) -> Tensor:
    """The bits of 4 bytes, the lowest first: uint8 [blocks, 32]."""
    return (words[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)
