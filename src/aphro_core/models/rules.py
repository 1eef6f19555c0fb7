"""The rules of the usual checkpoint layouts, and builders for families with other names."""

from __future__ import annotations

from typing import Final, Literal

from aphro_core.models.tensors import Axis, Flag, Source, TensorRule

Layers = Literal["all", "dense", "experts"]


def layer_rule(
    parameter: str,
    *sources: Source,
    columns: Axis | None = None,
    layers: Layers = "all",
    only_if: Flag | None = None,
    first_rank_only: bool = False,
) -> TensorRule:
    return TensorRule(
        f"layers.{{i}}.{parameter}",
        sources,
        columns,
        layers=layers,
        only_if=only_if,
        first_rank_only=first_rank_only,
    )


def ends(embedding: str, norm: str, head: str = "lm_head") -> tuple[TensorRule, ...]:
    """What stands before and behind the layers."""
    embed, final = Source(f"{embedding}.weight", "vocab"), Source(f"{norm}.weight", "hidden")
    return (
        TensorRule("embed_tokens.weight", (embed,), "hidden", place="embedding"),
        TensorRule("norm.weight", (final,), place="head"),
        TensorRule("norm.bias", (Source(f"{norm}.bias", "hidden"),), place="head", only_if="norm_bias"),
        TensorRule(
            "lm_head.weight",
            (Source(f"{head}.weight", "vocab"),),
            "hidden",
            place="head",
            tied_to="embed_tokens.weight",
        ),
    )


def norm_rules(parameter: str, source: str) -> tuple[TensorRule, ...]:
    return (
        layer_rule(f"{parameter}.weight", Source(f"{source}.weight", "hidden")),
        layer_rule(f"{parameter}.bias", Source(f"{source}.bias", "hidden"), only_if="norm_bias"),
    )


def qkv_rules(weights: tuple[Source, Source, Source]) -> tuple[TensorRule, ...]:
    """``weights`` are the stems of q, k and v: without ``.weight``."""

    def of(kind: str) -> tuple[Source, ...]:
        return tuple(source._replace(name=f"{source.name}.{kind}") for source in weights)

    return (
        layer_rule("attention.qkv_proj.weight", *of("weight"), columns="hidden"),
        layer_rule("attention.qkv_proj.bias", *of("bias"), only_if="qkv_bias"),
    )


def separate_qkv(prefix: str) -> tuple[Source, Source, Source]:
    """q_proj, k_proj and v_proj behind ``prefix``."""
    return (
        Source(f"{prefix}.q_proj", "heads"),
        Source(f"{prefix}.k_proj", "kv_heads"),
        Source(f"{prefix}.v_proj", "kv_heads"),
    )


def fused_qkv(stem: str, *, by_group: bool = False) -> tuple[Source, Source, Source]:
    """q, k and v in one tensor, one after the other or by KV group."""
    parts: tuple[Axis, ...] = ("heads", "kv_heads", "kv_heads")
    q, k, v = (Source(stem, axis, parts, part, by_group) for part, axis in enumerate(parts))
    return q, k, v


def out_rules(stem: str) -> tuple[TensorRule, ...]:
    """Attention's output projection."""
    return _row_parallel("attention.o_proj", stem, "heads", only_if="o_bias")


def gated_mlp_rules(
    gate: Source, up: Source, down: str, *, parameter: str = "mlp", layers: Layers = "dense"
) -> tuple[TensorRule, ...]:
    """``gate`` and ``up`` are stems with the axis of their rows, which is the axis of down's columns."""

    def of(kind: str) -> tuple[Source, Source]:
        return gate._replace(name=f"{gate.name}.{kind}"), up._replace(name=f"{up.name}.{kind}")

    return (
        layer_rule(f"{parameter}.gate_up_proj.weight", *of("weight"), columns="hidden", layers=layers),
        layer_rule(f"{parameter}.gate_up_proj.bias", *of("bias"), only_if="mlp_bias", layers=layers),
        *_row_parallel(f"{parameter}.down_proj", down, up.rows, only_if="mlp_bias", layers=layers),
    )


def plain_mlp_rules(up: str, down: str) -> tuple[TensorRule, ...]:
    return (
        layer_rule("mlp.up_proj.weight", Source(f"{up}.weight", "mlp"), columns="hidden"),
        layer_rule("mlp.up_proj.bias", Source(f"{up}.bias", "mlp"), only_if="mlp_bias"),
        *_row_parallel("mlp.down_proj", down, "mlp", only_if="mlp_bias"),
    )


def expert_rules(router: str, gate: str, up: str, down: str) -> tuple[TensorRule, ...]:
    """Stems with ``{e}``. Locally [experts * 2 * columns, hidden] (an expert's gate, its up) and [experts * hidden,
    columns]; the router is whole on each rank."""
    return (
        layer_rule("moe.router.weight", Source(f"{router}.weight", "experts"), columns="hidden", layers="experts"),
        layer_rule(
            "moe.gate_up_proj.weight",
            Source(f"{gate}.weight", "expert_mlp"),
            Source(f"{up}.weight", "expert_mlp"),
            columns="hidden",
            layers="experts",
        ),
        layer_rule("moe.down_proj.weight", Source(f"{down}.weight", "hidden"), columns="expert_mlp", layers="experts"),
    )


def _row_parallel(
    parameter: str, stem: str, columns: Axis, *, only_if: Flag, layers: Layers = "all"
) -> tuple[TensorRule, ...]:
    return (
        layer_rule(f"{parameter}.weight", Source(f"{stem}.weight", "hidden"), columns=columns, layers=layers),
        layer_rule(
            f"{parameter}.bias", Source(f"{stem}.bias", "hidden"), only_if=only_if, layers=layers, first_rank_only=True
        ),
    )


_LAYER: Final = "model.layers.{i}"
_MLP: Final = f"{_LAYER}.mlp"

ENDS: Final = ends("model.embed_tokens", "model.norm")
INPUT_NORMS: Final = (
    *norm_rules("input_norm", f"{_LAYER}.input_layernorm"),
    *norm_rules("post_attention_norm", f"{_LAYER}.post_attention_layernorm"),
)
ATTENTION: Final = (
    *qkv_rules(separate_qkv(f"{_LAYER}.self_attn")),
    layer_rule("attention.q_norm.weight", Source(f"{_LAYER}.self_attn.q_norm.weight", "head_dim"), only_if="qk_norm"),
    layer_rule("attention.k_norm.weight", Source(f"{_LAYER}.self_attn.k_norm.weight", "head_dim"), only_if="qk_norm"),
    *out_rules(f"{_LAYER}.self_attn.o_proj"),
)
MLP: Final = gated_mlp_rules(Source(f"{_MLP}.gate_proj", "mlp"), Source(f"{_MLP}.up_proj", "mlp"), f"{_MLP}.down_proj")
DECODER_RULES: Final[tuple[TensorRule, ...]] = (*ENDS, *INPUT_NORMS, *ATTENTION, *MLP)
