"""Which slice of which checkpoint tensor goes where in which parameter of a rank: rules, and the pieces they yield."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

from aphro_core.models.spec import DecoderSpec

Axis = Literal[
    "hidden", "heads", "kv_heads", "head_dim", "mlp", "vocab", "positions", "experts", "expert_mlp", "shared_mlp", "one"
]
Flag = Literal["qkv_bias", "o_bias", "mlp_bias", "qk_norm", "norm_bias"]


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
    def experts(self) -> range: ...
    @property
    def expert_mlp(self) -> range: ...
    @property
    def shared_mlp(self) -> range: ...
    @property
    def vocab(self) -> range: ...
    @property
    def has_embedding(self) -> bool: ...
    @property
    def has_head(self) -> bool: ...


class Source(NamedTuple):
    """Rows of one checkpoint tensor. ``{i}`` in the name is the layer, ``{e}`` the expert.

    ``fused`` are the axes that the tensor's rows consist of, one after the other, ``part`` which of them is meant;
    ``by_group`` says that they alternate: the q heads of a KV head, its k head, its v head, then the next.
    """

    name: str
    rows: Axis
    fused: tuple[Axis, ...] = ()
    part: int = 0
    by_group: bool = False


@dataclass(frozen=True)
class TensorRule:
    """One local parameter: checkpoint tensors fused along dim 0, of every expert in turn if a name has ``{e}``.

    ``columns`` is the axis of dim 1, None for vectors. Axes heads, kv_heads, mlp, expert_mlp, shared_mlp and vocab are
    cut over the tp ranks, the others are whole on each; with expert parallelism a rank has whole experts.
    """

    parameter: str
    sources: tuple[Source, ...]
    columns: Axis | None = None
    place: Literal["embedding", "layer", "head"] = "layer"
    layers: Literal["all", "dense", "experts"] = "all"  # which of them, by their MLP
    only_if: Flag | None = None  # the spec's dial that brings it in
    first_rank_only: bool = False  # a bias added after the all-reduce's summands: once, not once a rank
    tied_to: str | None = None  # with tied embeddings it is this other parameter


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

    @property
    def ranges(self) -> tuple[range, range]:
        """(rows, columns) within the checkpoint tensor; a vector is one row."""
        whole = [range(size) for size in self.full_shape]
        if self.dim is not None:
            whole[self.dim] = self.index
        return (range(1), whole[0]) if len(whole) == 1 else (whole[0], whole[1])


def rank_pieces(rules: Sequence[TensorRule], spec: DecoderSpec, shard: Shard) -> list[TensorPiece]:
    """All that a rank reads, parameter by parameter. Rows that no piece fills (vocabulary padding) are zero."""
    sizes, ranges = axis_sizes(spec), _axis_ranges(spec, shard)
    pieces = []
    for rule in rules_of_rank(rules, spec, shard):
        offset = 0
        for source in rule.sources:
            full_shape = _shape(sizes, source, rule.columns)
            filled = 0
            if rule.columns is not None and rule.columns in ranges:
                pieces.append(TensorPiece(rule.parameter, source.name, full_shape, 1, ranges[rule.columns], offset))
            elif source.rows not in ranges and not source.fused:
                pieces.append(TensorPiece(rule.parameter, source.name, full_shape, None, range(full_shape[0]), offset))
            else:
                for index in _row_ranges(source, spec, shard, sizes, ranges):
                    pieces.append(TensorPiece(rule.parameter, source.name, full_shape, 0, index, offset + filled))
                    filled += len(index)
            offset += len(ranges[source.rows]) if source.rows in ranges else sizes[source.rows]
    return pieces


def parameter_shapes(rules: Sequence[TensorRule], spec: DecoderSpec, shard: Shard) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter of a rank, padding included. A head that is the embedding does not count twice."""
    local = local_sizes(spec, shard)
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in rules_of_rank(rules, spec, shard):
        rows = sum(local[source.rows] for source in rule.sources)
        shapes[rule.parameter] = (rows,) if rule.columns is None else (rows, local[rule.columns])
    return shapes


def tied_parameters(rules: Sequence[TensorRule], spec: DecoderSpec, shard: Shard) -> dict[str, str]:
    """Parameters of this rank that are another one's tensor: name -> the other's name."""
    if not (spec.tie_word_embeddings and shard.has_embedding and shard.has_head):
        return {}
    return {rule.parameter: rule.tied_to for rule in rules if rule.tied_to is not None}


def source_shapes(rules: Sequence[TensorRule], spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that the checkpoint must have, with its shape."""
    sizes = axis_sizes(spec)
    used = [rule for rule in rules_of_rank(rules, spec, None) if not (spec.tie_word_embeddings and rule.tied_to)]
    return {source.name: _shape(sizes, source, rule.columns) for rule in used for source in rule.sources}


def rules_of_rank(rules: Sequence[TensorRule], spec: DecoderSpec, shard: Shard | None) -> Iterator[TensorRule]:
    """The rules of a rank for each of its layers and experts; None: those of the whole model."""
    if shard is None:
        experts = range(spec.moe.num_experts if spec.moe else 0)
        for rule in rules:
            if _is_used(rule, spec):
                yield from _expanded(rule, spec, range(spec.num_layers), experts)
        return
    by_name = {rule.parameter: rule for rule in rules}
    is_here = {"embedding": shard.has_embedding, "layer": True, "head": shard.has_head}
    tied = tied_parameters(rules, spec, shard)
    for rule in rules:
        first_only = rule.first_rank_only and shard.tp_rank != 0
        if not is_here[rule.place] or not _is_used(rule, spec) or first_only or rule.parameter in tied:
            continue
        if spec.tie_word_embeddings and rule.tied_to:
            rule = replace(rule, sources=by_name[rule.tied_to].sources)  # noqa: PLW2901 - the last stage's own copy
        yield from _expanded(rule, spec, shard.layers, shard.experts)


def _expanded(rule: TensorRule, spec: DecoderSpec, layers: range, experts: range) -> Iterator[TensorRule]:
    """The rule for each layer that it holds for, its sources for each expert."""
    sources = rule.sources
    if any("{e}" in source.name for source in sources):
        sources = tuple(
            source._replace(name=source.name.replace("{e}", str(expert))) for expert in experts for source in sources
        )
    if rule.place != "layer":
        yield rule
        return
    for i in layers:
        if rule.layers != "all" and (rule.layers == "experts") != spec.has_experts(i):
            continue
        named = tuple(source._replace(name=source.name.replace("{i}", str(i))) for source in sources)
        yield replace(rule, parameter=rule.parameter.format(i=i), sources=named)


def _is_used(rule: TensorRule, spec: DecoderSpec) -> bool:
    return rule.only_if is None or bool(getattr(spec, rule.only_if))


def _shape(sizes: Mapping[Axis, int], source: Source, columns: Axis | None) -> tuple[int, ...]:
    rows = sum(sizes[axis] for axis in source.fused) if source.fused else sizes[source.rows]
    return (rows,) if columns is None else (rows, sizes[columns])


def _row_ranges(
    source: Source, spec: DecoderSpec, shard: Shard, sizes: Mapping[Axis, int], ranges: Mapping[Axis, range]
) -> list[range]:
    """The rows of the checkpoint tensor that a rank takes, in the order in which they fill its parameter."""
    if source.by_group:
        return _alternating_rows(source, spec, shard)
    whole = range(sizes[source.rows])
    before = sum(sizes[axis] for axis in source.fused[: source.part])
    mine = ranges.get(source.rows, whole)
    stop = min(mine.stop, whole.stop)  # without the vocabulary's padding
    return [range(before + mine.start, before + stop)] if mine.start < stop else []


def _alternating_rows(source: Source, spec: DecoderSpec, shard: Shard) -> list[range]:
    """Heads in the layout ``by_group``; neighbours that stand together are one range."""
    width, group = spec.head_dim, spec.group_size
    if source.rows == "heads":
        places = [head // group * (group + 2) + head % group for head in shard.heads]
    else:
        places = [kv_head * (group + 2) + group + source.part - 1 for kv_head in shard.kv_heads]
    found: list[range] = []
    for place in places:
        start = place * width
        if found and found[-1].stop == start:
            found[-1] = range(found[-1].start, start + width)
        else:
            found.append(range(start, start + width))
    return found


def local_sizes(spec: DecoderSpec, shard: Shard) -> dict[Axis, int]:
    """Elements of each axis on a rank."""
    return axis_sizes(spec) | {axis: len(extent) for axis, extent in _axis_ranges(spec, shard).items()}


def axis_sizes(spec: DecoderSpec) -> dict[Axis, int]:
    """Elements of each axis of the model."""
    moe = spec.moe
    return {
        "hidden": spec.hidden_size,
        "heads": spec.num_heads * spec.head_dim,
        "kv_heads": spec.num_kv_heads * spec.head_dim,
        "head_dim": spec.head_dim,
        "mlp": spec.intermediate_size,
        "vocab": spec.vocab_size,
        "positions": spec.max_position_embeddings + (spec.position_offset or 0),
        "experts": moe.num_experts if moe else 0,
        "expert_mlp": moe.intermediate_size if moe else 0,
        "shared_mlp": moe.shared_intermediate_size if moe else 0,
        "one": 1,
    }


def _axis_ranges(spec: DecoderSpec, shard: Shard) -> dict[Axis, range]:
    """Of the axes that are cut over tp ranks: this rank's elements."""
    width = spec.head_dim
    return {
        "heads": range(shard.heads.start * width, shard.heads.stop * width),
        "kv_heads": range(shard.kv_heads.start * width, shard.kv_heads.stop * width),
        "mlp": shard.mlp,
        "expert_mlp": shard.expert_mlp,
        "shared_mlp": shard.shared_mlp,
        "vocab": shard.vocab,
    }
