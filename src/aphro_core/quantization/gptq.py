"""GPTQ: codes in words along the inputs, zero points in words along the outputs, act-order by a table of groups."""

from __future__ import annotations

import torch
from torch import Tensor

from aphro_core.quantization.grouped import from_unsigned
from aphro_core.quantization.matrix import PackedMatrix
from aphro_core.quantization.packing import unpack_words
from aphro_core.quantization.source import QuantSource, words_of


def read_gptq(source: QuantSource) -> PackedMatrix:
    """Layout of AutoGPTQ: ``qweight`` [in / per word, out], ``qzeros`` [groups, out / per word], ``scales`` [groups,
    out], ``g_idx`` [in]. weight[o, i] = (q - z) * scale of group ``g_idx[i]``."""
    spec = source.spec
    words, inside = words_of(source.columns, spec.per_word)
    if len(source.columns) == source.shape[1]:
        packed = source.read_columns("qweight", source.rows)
    else:
        packed = source.read("qweight", words)[:, source.rows.start : source.rows.stop]
    codes = unpack_words(packed, spec.bits, 0)[inside].T.contiguous()
    index = source.read("g_idx", source.columns) if spec.has_act_order else None
    groups = _all_groups(source) if index is not None else source.groups
    scales = source.read("scales", groups, source.rows).T
    zeros = _zeros(source, groups)
    return from_unsigned(source, codes, scales, zeros, index)


def _all_groups(source: QuantSource) -> range:
    return range(1 if source.spec.group_size is None else -(-source.shape[1] // source.spec.group_size))


def _zeros(source: QuantSource, groups: range) -> Tensor:
    """[rows, groups]; the first checkpoint format stores them less 1, taken from whole words: a zero point of 0 has
    borrowed from the one above it."""
    spec = source.spec
    words, inside = words_of(source.rows, spec.per_word)
    stored = source.read("qzeros", groups, words)
    if spec.zeros_less_one:
        stored = stored + sum(1 << spec.bits * code for code in range(spec.per_word))
    return unpack_words(stored, spec.bits, 1)[:, inside].T.to(torch.int32)
