"""AWQ: codes and zero points in words along the outputs, in an order of their own."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from aphro_core.quantization.grouped import from_unsigned
from aphro_core.quantization.matrix import PackedMatrix
from aphro_core.quantization.packing import unpack_words
from aphro_core.quantization.source import QuantSource, words_of

_ORDER: Final = (0, 4, 1, 5, 2, 6, 3, 7)  # where output i of a word's eight is among its nibbles, the lowest first


def read_awq(source: QuantSource) -> PackedMatrix:
    """Layout of AutoAWQ's ``gemm``: ``qweight`` [in, out / 8], ``qzeros`` [groups, out / 8], ``scales`` [groups, out].
    weight[o, i] = (q - z) * scale."""
    words, inside = words_of(source.rows, 8)
    codes = _in_order(source.read("qweight", source.columns, words))[:, inside].T.contiguous()
    zeros = _in_order(source.read("qzeros", source.groups, words))[:, inside].T
    scales = source.read("scales", source.groups, source.rows).T
    return from_unsigned(source, codes, scales, zeros.to(torch.int32), None)


def _in_order(words: Tensor) -> Tensor:
    nibbles = unpack_words(words, 4, 1)
    return nibbles.view(len(words), -1, 8)[..., _ORDER].flatten(1)
