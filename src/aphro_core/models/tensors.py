"""Which slice of which checkpoint tensor goes where in which parameter of a rank: rules, and the pieces they yield."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, Protocol

from aphro_core.models.spec import DecoderSpec

Axis = Literal["hidden", "heads", "kv_heads", "head_dim", "mlp", "vocab"]
Flag = Literal["qkv_bias", "o_bias", "mlp_bias", "qk_norm"]


class Shard(Protocol):
    """What the rules ask of a rank (``parallel.shard.RankShard`` has it). ``vocab`` counts padded rows."""

    @property
    def tp_rank(self) -> int: ...
    @property
    def layers(self) -> range: ...
    @property
    def heads(self) -> range: ...
    @property
    def kv_heads(self) -> range: ...
    @property
    def mlp(self) -> range: ...
    @property
    def vocab(self) -> range: ...
    @property
    def has_embedding(self) -> bool: ...
    @property
    def has_head(self) -> bool: ...


@dataclass(frozen=True)
class TensorRule:
    """One local parameter: checkpoint tensors fused along dim 0. ``{i}`` in the names is the layer.

    ``sources`` are (checkpoint name, axis of its rows) in the order of the fusion; ``columns`` is the axis of dim 1,
    None for vectors. Axes heads, kv_heads, mlp and vocab are cut over the tp ranks, the others are whole on each.
    """

    parameter: str
    sources: tuple[tuple[str, Axis], ...]
    columns: Axis | None = None
    place: Literal["embedding", "layer", "head"] = "layer"
    only_if: Flag | None = None  # the spec's dial that brings it in
    first_rank_only: bool = False  # a bias added after the all-reduce's summands: once, not once a rank
    tied_to: str | None = None  # with tied embeddings it is this other parameter


def _layer(
    parameter: str,
    *sources: tuple[str, Axis],
    columns: Axis | None = None,
    only_if: Flag | None = None,
    first_rank_only: bool = False,
) -> TensorRule:
    prefixed = tuple((f"model.layers.{{i}}.{name}", axis) for name, axis in sources)
    return TensorRule(f"layers.{{i}}.{parameter}", prefixed, columns, only_if=only_if, first_rank_only=first_rank_only)


DECODER_RULES: Final[tuple[TensorRule, ...]] = (
    TensorRule("embed_tokens.weight", (("model.embed_tokens.weight", "vocab"),), "hidden", place="embedding"),
    _layer("input_norm.weight", ("input_layernorm.weight", "hidden")),
    _layer(
        "attention.qkv_proj.weight",
        ("self_attn.q_proj.weight", "heads"),
        ("self_attn.k_proj.weight", "kv_heads"),
        ("self_attn.v_proj.weight", "kv_heads"),
        columns="hidden",
    ),
    _layer(
        "attention.qkv_proj.bias",
        ("self_attn.q_proj.bias", "heads"),
        ("self_attn.k_proj.bias", "kv_heads"),
        ("self_attn.v_proj.bias", "kv_heads"),
        only_if="qkv_bias",
    ),
    _layer("attention.q_norm.weight", ("self_attn.q_norm.weight", "head_dim"), only_if="qk_norm"),
    _layer("attention.k_norm.weight", ("self_attn.k_norm.weight", "head_dim"), only_if="qk_norm"),
    _layer("attention.o_proj.weight", ("self_attn.o_proj.weight", "hidden"), columns="heads"),
    _layer("attention.o_proj.bias", ("self_attn.o_proj.bias", "hidden"), only_if="o_bias", first_rank_only=True),
    _layer("post_attention_norm.weight", ("post_attention_layernorm.weight", "hidden")),
    _layer("mlp.gate_up_proj.weight", ("mlp.gate_proj.weight", "mlp"), ("mlp.up_proj.weight", "mlp"), columns="hidden"),
    _layer("mlp.gate_up_proj.bias", ("mlp.gate_proj.bias", "mlp"), ("mlp.up_proj.bias", "mlp"), only_if="mlp_bias"),
    _layer("mlp.down_proj.weight", ("mlp.down_proj.weight", "hidden"), columns="mlp"),
    _layer("mlp.down_proj.bias", ("mlp.down_proj.bias", "hidden"), only_if="mlp_bias", first_rank_only=True),
    TensorRule("norm.weight", (("model.norm.weight", "hidden"),), place="head"),
    TensorRule("lm_head.weight", (("lm_head.weight", "vocab"),), "hidden", place="head", tied_to="embed_tokens.weight"),
)


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """Elements ``index`` along ``dim`` of ``source`` fill ``parameter`` from row ``offset`` on.

    ``dim`` None takes the whole tensor. ``full_shape`` is what the checkpoint must have.
    """

    parameter: str
    source: str
    full_shape: tuple[int, ...]
    dim: int | None
    index: range
    offset: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the slice."""
        return tuple(len(self.index) if dim == self.dim else size for dim, size in enumerate(self.full_shape))


def rank_pieces(rules: Sequence[TensorRule], spec: DecoderSpec, shard: Shard) -> list[TensorPiece]:
    """All that a rank reads, parameter by parameter. Rows that no piece fills (vocabulary padding) are zero."""
    sizes, ranges = _axis_sizes(spec), _axis_ranges(spec, shard)
    pieces = []
    for rule in _rules_of_rank(rules, spec, shard):
        offset = 0
        for source, axis in rule.sources:
            full_shape = _shape(sizes, axis, rule.columns)
            dim: int | None = None
            index = range(full_shape[0])
            for at, name in enumerate((axis, rule.columns)):
                if name in ranges:
                    dim, index = at, range(ranges[name].start, min(ranges[name].stop, sizes[name]))
            if index:
                pieces.append(TensorPiece(rule.parameter, source, full_shape, dim, index, offset))
            offset += len(ranges[axis]) if axis in ranges else sizes[axis]
    return pieces


def parameter_shapes(rules: Sequence[TensorRule], spec: DecoderSpec, shard: Shard) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter of a rank, padding included. A head that is the embedding does not count twice."""
    local = _axis_sizes(spec) | {axis: len(extent) for axis, extent in _axis_ranges(spec, shard).items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in _rules_of_rank(rules, spec, shard):
        rows = sum(local[axis] for _, axis in rule.sources)
        shapes[rule.parameter] = (rows,) if rule.columns is None else (rows, local[rule.columns])
    return shapes


def tied_parameters(rules: Sequence[TensorRule], spec: DecoderSpec, shard: Shard) -> dict[str, str]:
    """Parameters of this rank that are another one's tensor: name -> the other's name."""
    if not (spec.tie_word_embeddings and shard.has_embedding and shard.has_head):
        return {}
    return {rule.parameter: rule.tied_to for rule in rules if rule.tied_to is not None}


def source_shapes(rules: Sequence[TensorRule], spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that the checkpoint must have, with its shape."""
    sizes = _axis_sizes(spec)
    used = [
        each
        for rule in rules
        if _is_used(rule, spec) and not (spec.tie_word_embeddings and rule.tied_to)
        for each in _of_layers(rule, range(spec.num_layers))
    ]
    return {source: _shape(sizes, axis, rule.columns) for rule in used for source, axis in rule.sources}


def _rules_of_rank(rules: Sequence[TensorRule], spec: DecoderSpec, shard: Shard) -> Iterator[TensorRule]:
    by_name = {rule.parameter: rule for rule in rules}
    is_here = {"embedding": shard.has_embedding, "layer": True, "head": shard.has_head}
    tied = tied_parameters(rules, spec, shard)
    for rule in rules:
        first_only = rule.first_rank_only and shard.tp_rank != 0
        if not is_here[rule.place] or not _is_used(rule, spec) or first_only or rule.parameter in tied:
            continue
        if spec.tie_word_embeddings and rule.tied_to:
            rule = replace(rule, sources=by_name[rule.tied_to].sources)  # noqa: PLW2901 - the last stage's own copy
        yield from _of_layers(rule, shard.layers)


def _of_layers(rule: TensorRule, layers: range) -> Iterator[TensorRule]:
    if rule.place != "layer":
        yield rule
        return
    for i in layers:
        sources = tuple((name.format(i=i), axis) for name, axis in rule.sources)
        yield replace(rule, parameter=rule.parameter.format(i=i), sources=sources)


def _is_used(rule: TensorRule, spec: DecoderSpec) -> bool:
    return rule.only_if is None or bool(getattr(spec, rule.only_if))


def _shape(sizes: dict[Axis, int], rows: Axis, columns: Axis | None) -> tuple[int, ...]:
    return (sizes[rows],) if columns is None else (sizes[rows], sizes[columns])


def _axis_sizes(spec: DecoderSpec) -> dict[Axis, int]:
    return {
        "hidden": spec.hidden_size,
        "heads": spec.num_heads * spec.head_dim,
        "kv_heads": spec.num_kv_heads * spec.head_dim,
        "head_dim": spec.head_dim,
        "mlp": spec.intermediate_size,
        "vocab": spec.vocab_size,
    }


def _axis_ranges(spec: DecoderSpec, shard: Shard) -> dict[Axis, range]:
    """Of the axes that are cut over tp ranks: this rank's elements."""
    width = spec.head_dim
    return {
        "heads": range(shard.heads.start * width, shard.heads.stop * width),
        "kv_heads": range(shard.kv_heads.start * width, shard.kv_heads.stop * width),
        "mlp": shard.mlp,
        "vocab": shard.vocab,
    }
