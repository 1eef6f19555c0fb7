"""One code a stored element, and scales of tensor, rows, groups or blocks: FP8 checkpoints, compressed-tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from aphro_core.errors import ModelError
from aphro_core.quantization.grouped import from_unsigned
from aphro_core.quantization.matrix import PackedMatrix, RoundedInputs
from aphro_core.quantization.packing import unpack_words
from aphro_core.quantization.source import QuantSource, words_of


def read_scaled(source: QuantSource) -> PackedMatrix:
    """``weight`` [out, in] float8_e4m3fn or int8 and its scales: one, [out, 1], [out, groups] or one a block.
    weight = code * scale (``weight_scale``, or ``weight_scale_inv`` of blocks, which is a factor as well)."""
    spec = source.spec
    codes = read_part(source, "weight")
    scales = _scales(source).to(source.dtype).contiguous()
    return PackedMatrix(spec.kind, codes.contiguous(), scales, inputs=_inputs(source))


def read_packed_words(source: QuantSource) -> PackedMatrix:
    """compressed-tensors' ``pack-quantized``: ``weight_packed`` [out, in / per word] with signed codes stored plus half
    the range, ``weight_scale`` [out, groups], ``weight_zero_point`` in words along the outputs, ``weight_g_idx``."""
    spec = source.spec
    words, inside = words_of(source.columns, spec.per_word)
    codes = unpack_words(source.read("weight_packed", source.rows, words), spec.bits, 1)[:, inside].contiguous()
    index = source.read("weight_g_idx")[source.columns.start : source.columns.stop] if spec.has_act_order else None
    groups = range(-(-source.shape[1] // (spec.group_size or source.shape[1]))) if index is not None else source.groups
    scales = source.read("weight_scale", source.rows, groups)
    half = 2 ** (spec.bits - 1)
    zeros = torch.full(scales.shape, half, dtype=torch.int32)
    if not spec.is_symmetric:
        row_words, among = words_of(source.rows, spec.per_word)
        zeros = unpack_words(source.read("weight_zero_point", row_words, groups), spec.bits, 0)[among].to(torch.int32)
    return from_unsigned(source, codes, scales, zeros, index)


def read_part(source: QuantSource, name: str) -> Tensor:
    """The module's rows and columns of a tensor of its shape."""
    if len(source.columns) == source.shape[1]:
        return source.read(name, source.rows)
    return source.read_columns(name, source.columns)[source.rows.start : source.rows.stop]


def _inputs(source: QuantSource) -> RoundedInputs | None:
    """Raises ModelError for a stored scale that is no positive number."""
    if source.spec.activations is None:
        return None
    if source.spec.activations == "dynamic":
        return RoundedInputs(None)
    scale = float(source.read("input_scale").float().flatten()[0])
    if not 0.0 < scale < float("inf"):
        raise ModelError(
            f"{source.module}.input_scale in {source.checkpoint.path} is {scale}, expected a positive number",
            hint="fetch the model again, or use a checkpoint with dynamic scales",
        )
    return RoundedInputs(scale)


def _scales(source: QuantSource) -> Tensor:
    """[rows, groups]."""
    spec = source.spec
    if spec.is_per_tensor:
        return source.read(spec.scale_name).float().reshape(1, 1).expand(len(source.rows), 1)
    if spec.group_size is None:
        return source.read(spec.scale_name, source.rows).view(-1, 1)
    if spec.block_rows == 1:
        return source.read(spec.scale_name, source.rows, source.groups)
    first, last = source.rows.start // spec.block_rows, -(-source.rows.stop // spec.block_rows)
    blocks = source.read(spec.scale_name, range(first, last), source.groups)
    start = source.rows.start - first * spec.block_rows
    return blocks.repeat_interleave(spec.block_rows, 0)[start : start + len(source.rows)]
