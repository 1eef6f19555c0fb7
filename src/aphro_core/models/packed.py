"""Which parameters of a rank are kept quantised, in what groups, and what all its parameters take in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Final

from aphro_core.errors import ModelError
from aphro_core.models.quantization import GGUF_GROUP, GGUF_KINDS, QuantSpec, online_group, whole_group
from aphro_core.models.spec import DecoderSpec
from aphro_core.models.tensors import (
    Axis,
    Shard,
    TensorRule,
    axis_sizes,
    local_sizes,
    rules_of_rank,
    source_shapes,
    tied_parameters,
)

DEQUANTISED_AT_ONCE: Final = 2**27  # weights, on a GPU: a layer of experts is whole, other matrices go in parts
_CUT_COLUMNS: Final = ("mlp", "expert_mlp", "shared_mlp")


def module_of(source_name: str) -> str:
    """model.layers.0.mlp.up_proj.weight -> model.layers.0.mlp.up_proj."""
    return source_name.removesuffix(".weight")


def is_packed(rule: TensorRule, spec: DecoderSpec) -> bool:
    """Whether a parameter is kept quantised: a linear layer inside a block whose sources are all covered, an output
    head that is, and of GGUF files the embedding.

    Raises ModelError when only some of the tensors that are fused into it are.
    """
    quantization = spec.quantization
    if quantization is None or not _may_be_packed(rule, quantization):
        return False
    covered = {quantization.covers(module_of(source.name)) for source in rule.sources}
    if covered == {True, False} and quantization.layout != "gguf":
        names = ", ".join(sorted({source.name for source in rule.sources})[:4])
        raise ModelError(
            f"the model's quantization_config leaves out some of {names}, which are computed as one",
            hint="use a checkpoint in which they are all quantised, or none of them",
        )
    return covered == {True}


def _may_be_packed(rule: TensorRule, quantization: QuantSpec) -> bool:
    if rule.parameter == "embed_tokens.weight":
        return quantization.layout == "gguf"
    if rule.parameter == "lm_head.weight":
        return quantization.layout == "gguf" or quantization.has_head
    return rule.parameter.endswith("_proj.weight")


def column_group(spec: DecoderSpec, axis: Axis) -> int | None:
    """Inputs of a matrix with columns along ``axis`` that share a scale, None for the whole row: between their
    multiples the columns may be cut."""
    quantization = spec.quantization
    assert quantization is not None
    width = axis_sizes(spec)[axis]
    if quantization.layout == "gguf":
        return GGUF_GROUP
    if quantization.layout != "online":
        return None if quantization.group_size == width else quantization.group_size
    if axis == "hidden" and quantization.kind != "int4":
        return None  # 8 bits need no groups, but a rank that has a part of a row cannot know the scale of the whole
    if axis == "heads":
        return whole_group(spec.head_dim)
    return online_group(width) if axis in _CUT_COLUMNS else whole_group(width)


def cut_unit(spec: DecoderSpec, axis: Axis) -> int:
    """Columns along ``axis`` may be cut at multiples of this: 1 unless they are quantised in groups or share words."""
    quantization = spec.quantization
    if quantization is None:
        return 1
    if quantization.has_act_order:
        return quantization.per_word
    return column_group(spec, axis) or (2 if quantization.kind == "int4" else 1)


def source_group(spec: DecoderSpec, module: str, group: int | None) -> int | None:
    """The group of one source: GGUF's formats have their own."""
    quantization = spec.quantization
    assert quantization is not None
    if quantization.layout != "gguf":
        return group
    return GGUF_KINDS[quantization.block_formats[f"{module}.weight"]][1]


def checkpoint_shapes(rules: Sequence[TensorRule], spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that the checkpoint must have, with its shape, in the layout of its quantisation."""
    quantization, shapes = spec.quantization, source_shapes(rules, spec)
    if quantization is None or quantization.layout in ("online", "gguf"):
        return shapes
    linear = {source.name for rule in rules_everywhere(rules, spec) if is_packed(rule, spec) for source in rule.sources}
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        found |= quantization.tensors_of(module_of(name), *shape) if name in linear else {name: shape}
    return found


def rules_everywhere(rules: Sequence[TensorRule], spec: DecoderSpec) -> list[TensorRule]:
    """The rules of all layers and experts, whoever has them."""
    return list(rules_of_rank(rules, spec, None))


def parameter_bytes(rules: Sequence[TensorRule], spec: DecoderSpec, shard: Shard, dtype_bytes: int) -> int:
    """Bytes of a rank's parameters as they are kept: codes, scales and offsets of quantised ones."""
    local, total = local_sizes(spec, shard), 0
    for rule in rules_of_rank(rules, spec, shard):
        shape = [sum(local[source.rows] for source in rule.sources)]
        if rule.columns is not None:
            shape.append(local[rule.columns])
        if is_packed(rule, spec):
            total += sum(
                matrix_bytes(
                    spec, rule.columns or "hidden", module_of(source.name), local[source.rows], shape[1], dtype_bytes
                )
                for source in rule.sources
            )
        else:
            is_finer = spec.norm_offset and rule.parameter.endswith("norm.weight")  # float32, see layers/decoder.py
            total += prod(shape) * (4 if is_finer else dtype_bytes)
    return total


def tied_copy_bytes(
    rules: Sequence[TensorRule], spec: DecoderSpec, shard: Shard, dtype: str, dtype_bytes: int, *, is_gpu: bool
) -> int:
    """Bytes of a head that is the embedding's tensor too, in the order that it is multiplied in: CPUs have one of
    their own (but in dtypes that they multiply as they are), GPUs of 4-bit codes."""
    if not tied_parameters(rules, spec, shard):
        return 0
    rule = next(rule for rule in rules if rule.parameter == "embed_tokens.weight")
    rows, module = local_sizes(spec, shard)["vocab"], module_of(rule.sources[0].name)
    if not is_packed(rule, spec):
        return 0 if is_gpu or dtype == "float16" else rows * spec.hidden_size * dtype_bytes
    assert spec.quantization is not None
    has_copy = spec.quantization.kind_of(module) == "int4" if is_gpu else dtype == "bfloat16"
    return matrix_bytes(spec, "hidden", module, rows, spec.hidden_size, dtype_bytes) if has_copy else 0


def dequantised_weights(rules: Sequence[TensorRule], spec: DecoderSpec, shard: Shard) -> int:
    """Weights that a GPU has dequantised at once at most, of the quantised parameters of a rank."""
    local = local_sizes(spec, shard)
    looked_up = "" if tied_parameters(rules, spec, shard) else "embed_tokens.weight"
    most = 0
    for rule in rules_of_rank(rules, spec, shard):
        if rule.columns is not None and rule.parameter != looked_up and is_packed(rule, spec):
            number = sum(local[source.rows] for source in rule.sources) * local[rule.columns]
            most = max(most, number if ".moe." in rule.parameter else min(number, DEQUANTISED_AT_ONCE))
    return most


def matrix_bytes(spec: DecoderSpec, axis: Axis, module: str, rows: int, columns: int, dtype_bytes: int) -> int:
    """Bytes of one quantised matrix in memory: codes, scales, offsets. ``axis`` is that of its columns."""
    quantization = spec.quantization
    assert quantization is not None
    kind, group = quantization.kind_of(module), source_group(spec, module, column_group(spec, axis))
    codes = rows * columns // 2 if kind == "int4" else rows * columns
    per_scale = 2 if kind == "int4" or not quantization.is_symmetric else 1  # a scale and an offset
    width = columns
    if quantization.has_act_order:  # inputs in an order of their own; those of a part of the rows are of any group
        codes, width = codes + 4 * columns, axis_sizes(spec)[axis]
    if group is None:
        return codes + rows * 4 * per_scale
    return codes + rows * (width // group) * dtype_bytes * per_scale
