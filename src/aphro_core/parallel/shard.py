"""The sharding plan: the layers, heads, columns and vocabulary rows of each rank, for any legal (tp, pp)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd
from typing import Final

from aphro_core.errors import PlacementError
from aphro_core.models.packed import cut_unit
from aphro_core.models.registry import family_of
from aphro_core.models.spec import DecoderSpec
from aphro_core.models.tensors import Axis, axis_sizes
from aphro_core.parallel.partition import partition

MLP_UNIT: Final = 32  # columns: the block of the small GGUF formats, and a tile that every kernel likes
VOCAB_UNIT: Final = 128  # rows: whole blocks of those that a draw begins with (aphro_kernels/sample_kernels.py)
_WHOLE_VOCAB_UNIT: Final = 64  # rows of a rank that has all: products without padding are logits that nobody copies


@dataclass(frozen=True, slots=True)
class RankShard:
    """What one rank holds. Ranges count the whole model's layers, heads, MLP columns and (padded) vocabulary rows.

    Local query head j belongs to local KV head ``j // (len(heads) // len(kv_heads))``: a rank has whole groups, or
    some of the heads of one group.
    """

    rank: int  # pp_rank * tp_size + tp_rank
    pp_rank: int
    tp_rank: int
    pp_size: int
    tp_size: int
    layers: range
    heads: range
    kv_heads: range
    mlp: range
    experts: range  # all of them, each cut by columns; with expert parallelism some of them, whole
    expert_mlp: range  # columns of each expert
    shared_mlp: range  # columns of the expert that every token takes
    vocab: range  # may reach past vocab_size, or lie wholly behind it
    has_embedding: bool
    has_head: bool  # final norm and output head


@dataclass(frozen=True, slots=True)
class ShardingPlan:
    ranks: tuple[RankShard, ...]  # in rank order
    tp_size: int
    pp_size: int
    padded_vocab_size: int


def build_plan(
    spec: DecoderSpec, tp: int, pp: int, pp_layers: Sequence[int] | None = None, *, expert_parallel: bool = False
) -> ShardingPlan:
    """What each of the tp x pp ranks holds. ``pp_layers`` gives the layers of each stage instead of the stated rule.
    ``expert_parallel`` gives a rank whole experts instead of columns of each; it may leave a rank without any.

    MLP columns are split evenly even where attention is not: the ranks wait for each other after each of the two,
    so leaning one against the other would balance bytes and cost time. Raises PlacementError for sizes that the
    model's shapes forbid, naming the dimension and the nearest legal size.
    """
    _check_tensor_parallel(spec, tp, expert_parallel)
    stages = split_layers(spec.num_layers, pp, pp_layers)
    heads = _split_heads(spec, tp)
    mlp = _split_columns(spec, "mlp", tp)
    experts, expert_mlp, shared_mlp = _split_experts(spec, tp, expert_parallel)
    unit = VOCAB_UNIT if tp > 1 else _WHOLE_VOCAB_UNIT
    rows = -(-spec.vocab_size // (tp * unit)) * unit
    ranks = tuple(
        RankShard(
            rank=pp_rank * tp + tp_rank,
            pp_rank=pp_rank,
            tp_rank=tp_rank,
            pp_size=pp,
            tp_size=tp,
            layers=layers,
            heads=heads[tp_rank][0],
            kv_heads=heads[tp_rank][1],
            mlp=mlp[tp_rank],
            experts=experts[tp_rank],
            expert_mlp=expert_mlp[tp_rank],
            shared_mlp=shared_mlp[tp_rank],
            vocab=range(tp_rank * rows, (tp_rank + 1) * rows),
            has_embedding=pp_rank == 0,
            has_head=pp_rank == pp - 1,
        )
        for pp_rank, layers in enumerate(stages)
        for tp_rank in range(tp)
    )
    return ShardingPlan(ranks, tp_size=tp, pp_size=pp, padded_vocab_size=tp * rows)


def head_halves(vocab_size: int) -> tuple[range, range]:
    """Outputs of a head that the last stage of a pipeline shares with the first: its own, then those of the first,
    which may reach past the vocabulary."""
    half = -(-vocab_size // (2 * VOCAB_UNIT)) * VOCAB_UNIT
    return range(half), range(half, 2 * half)


def legal_tensor_parallel_sizes(spec: DecoderSpec, *, expert_parallel: bool = False) -> Sequence[int]:
    """From 1 to the number of query heads (or of MLP columns, if a model has fewer): all sizes, or of quantised
    weights those that cut between their groups."""
    sizes = range(1, min(spec.num_heads, _fewest_columns(spec)) + 1)
    if spec.quantization is None:
        return sizes
    return [tp for tp in sizes if _split_in_groups(spec, tp, expert_parallel) is None]


def _fewest_columns(spec: DecoderSpec) -> int:
    """Of the MLPs that are cut by columns."""
    moe = spec.moe
    widths = [spec.intermediate_size] + ([moe.intermediate_size, moe.shared_intermediate_size] if moe else [])
    return min(width for width in widths if width)


def _has_dense_mlp(spec: DecoderSpec) -> bool:
    return not all(map(spec.has_experts, range(spec.num_layers)))


def _check_tensor_parallel(spec: DecoderSpec, tp: int, expert_parallel: bool) -> None:
    legal = legal_tensor_parallel_sizes(spec, expert_parallel=expert_parallel)
    if tp in legal:
        return
    is_in_range = 1 <= tp <= min(spec.num_heads, _fewest_columns(spec))
    if spec.quantization is not None and (is_in_range or not legal):
        raise _between_groups(spec, tp, legal, expert_parallel)
    nearest = legal[-1] if tp > legal[-1] else legal[0]
    what = "query heads" if spec.num_heads <= _fewest_columns(spec) else "MLP columns"
    raise PlacementError(
        f"tensor_parallel_size is {tp}, but {spec.architecture} here has {legal[-1]} {what} and each rank needs one, "
        f"allowed: {_listed(legal)}",
        hint=f"-tp {nearest}, and -pp for more devices" if tp > nearest else f"-tp {nearest}",
    )


def _split_in_groups(spec: DecoderSpec, tp: int, expert_parallel: bool) -> Axis | None:
    """The first axis that does not split ``tp`` ways between whole groups of its quantised matrix, None if all do."""
    moe = spec.moe
    attempts: dict[Axis, Callable[[], object]] = {"heads": lambda: _split_heads(spec, tp)}
    if _has_dense_mlp(spec):
        attempts["mlp"] = lambda: _split_columns(spec, "mlp", tp)
    if moe is not None and not expert_parallel:
        attempts["expert_mlp"] = lambda: _split_columns(spec, "expert_mlp", tp)
    if moe is not None and moe.shared_intermediate_size:
        attempts["shared_mlp"] = lambda: _split_columns(spec, "shared_mlp", tp)
    for axis, attempt in attempts.items():
        try:
            attempt()
        except PlacementError:
            return axis
    return None


def _between_groups(spec: DecoderSpec, tp: int, legal: Sequence[int], expert_parallel: bool) -> PlacementError:
    axis = _split_in_groups(spec, tp, expert_parallel)
    assert axis is not None
    rule = next(rule for rule in family_of(spec).tensors if rule.columns == axis)
    name = rule.sources[0].name.replace("{i}", "0").replace("{e}", "0")
    width, group = axis_sizes(spec)[axis], cut_unit(spec, axis)
    heads = f" ({spec.num_heads} heads of {spec.head_dim})" if axis == "heads" else ""
    is_gguf = spec.quantization is not None and spec.quantization.layout == "gguf"
    if not legal:
        return PlacementError(
            f"{name} is quantised in groups of {group} along dimension 1, {width}{heads}, which they do not divide",
            hint="-q none expands the blocks" if is_gguf else "use the unquantised model, or another format",
        )
    nearest = min(legal, key=lambda size: (abs(size - tp), size))
    unpacked = "; or -q none, which expands the blocks" if is_gguf else ""
    return PlacementError(
        f"tensor_parallel_size is {tp}, but {name} is quantised in groups of {group} along "
        f"dimension 1, {width}{heads}, and a rank needs whole groups, allowed: {_listed(legal)}",
        hint=f"-tp {nearest}" + (", and -pp for more devices" if nearest < tp else "") + unpacked,
    )


def _listed(sizes: Sequence[int]) -> str:
    is_run = len(sizes) == sizes[-1] - sizes[0] + 1
    return f"{sizes[0]} to {sizes[-1]}" if is_run and len(sizes) > 1 else ", ".join(map(str, sizes))


def _split_heads(spec: DecoderSpec, tp: int) -> list[tuple[range, range]]:
    """Between quantised groups of the output projection's inputs."""
    cut = cut_unit(spec, "heads")
    return split_heads(spec.num_heads, spec.num_kv_heads, tp, unit=cut // gcd(cut, spec.head_dim))


def split_heads(num_heads: int, num_kv_heads: int, tp: int, *, unit: int = 1) -> list[tuple[range, range]]:
    """(query heads, KV heads) of each tp rank.

    Up to ``num_kv_heads`` ranks: whole groups (one KV head and its query heads). Beyond: one KV head a rank, copied
    to as many ranks as share its query heads. ``unit`` query heads stay together.
    """
    group = num_heads // num_kv_heads
    kv_unit = unit // gcd(unit, group)
    if tp <= num_kv_heads:
        kv_heads = partition(num_kv_heads, [1] * tp, unit=kv_unit)
        return [(range(kv.start * group, kv.stop * group), kv) for kv in kv_heads]
    if kv_unit > 1:
        raise PlacementError(f"{unit} query heads that stay together reach over {kv_unit} KV heads")
    sharers = [len(ranks) for ranks in partition(tp, [1] * num_kv_heads)]
    return [
        (range(kv * group + part.start, kv * group + part.stop), range(kv, kv + 1))
        for kv, num_ranks in enumerate(sharers)
        for part in partition(group, [1] * num_ranks, unit=unit)
    ]


def _split_columns(spec: DecoderSpec, axis: Axis, tp: int) -> list[range]:
    width = axis_sizes(spec)[axis]
    least = 1 if axis == "mlp" and not _has_dense_mlp(spec) else cut_unit(spec, axis)  # 1: nothing is cut by them
    return partition(width, [1] * tp, unit=_mlp_unit(width, tp, least))


def _split_experts(spec: DecoderSpec, tp: int, expert_parallel: bool) -> tuple[list[range], list[range], list[range]]:
    """(experts, columns of each, columns of the shared expert) of each tp rank; empty ranges without experts."""
    moe, nothing = spec.moe, [range(0)] * tp
    if moe is None:
        return nothing, nothing, nothing
    shared = _split_columns(spec, "shared_mlp", tp) if moe.shared_intermediate_size else nothing
    if not expert_parallel:
        return [range(moe.num_experts)] * tp, _split_columns(spec, "expert_mlp", tp), shared
    each, rest = divmod(moe.num_experts, tp)
    starts = [rank * each + min(rank, rest) for rank in range(tp + 1)]
    return [range(*cut) for cut in pairwise(starts)], [range(moe.intermediate_size)] * tp, shared


def _mlp_unit(width: int, tp: int, least: int) -> int:
    """The largest power of two up to MLP_UNIT that divides the columns and leaves every rank at least one unit; not
    less than ``least``, and a multiple of it."""
    unit = MLP_UNIT if MLP_UNIT % least == 0 else least
    while unit > least and (width % unit or width // unit < tp):
        unit //= 2
    return unit


def split_layers(num_layers: int, pp: int, pp_layers: Sequence[int] | None) -> list[range]:
    """Layers of each stage: evenly; what is left over goes one each to the stages before the last, from the back.

    The last stage has the head besides, so it is the last to get more (the rule of vLLM's ``get_pp_indices``).
    """
    if not 1 <= pp <= num_layers:
        nearest = num_layers if pp > num_layers else 1
        raise PlacementError(
            f"pipeline_parallel_size is {pp}, but the model has {num_layers} layers and each stage needs one, "
            f"allowed: 1 to {num_layers}",
            hint=f"-pp {nearest}",
        )
    if pp_layers is not None:
        _check_pp_layers(num_layers, pp, pp_layers)
        sizes = list(pp_layers)
    else:
        each, rest = divmod(num_layers, pp)
        sizes = [each + (pp - 1 - rest <= stage < pp - 1) for stage in range(pp)]
    starts = [sum(sizes[:stage]) for stage in range(pp)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _check_pp_layers(num_layers: int, pp: int, pp_layers: Sequence[int]) -> None:
    shown = ",".join(map(str, pp_layers))
    even = ",".join(str(len(layers)) for layers in split_layers(num_layers, pp, None))
    if len(pp_layers) != pp:
        problem = f"names {len(pp_layers)} stages, but pipeline_parallel_size is {pp}"
    elif any(size < 1 for size in pp_layers):
        problem = "leaves a stage without layers, allowed: 1 and up for each"
    elif sum(pp_layers) != num_layers:
        problem = f"adds up to {sum(pp_layers)} layers, but the model has {num_layers}"
    else:
        return
    raise PlacementError(f"pp_layers {shown} {problem}", hint=f"--pp-layers {even}")
