"""Each layer's attention from a config: heads, windows, chunks, latent caches and recurrent states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from aphro_core.errors import ModelError
from aphro_core.estimate.config_keys import ConfigKeys
from aphro_core.estimate.facts import AttentionFacts, AttentionKind, LatentFacts, StateFacts

_QKV_BIAS: Final = ("qwen", "opt", "gpt2", "gpt_bigcode", "gpt_neox", "bloom", "phi", "starcoder2", "chatglm")
_OUTPUT_BIAS: Final = ("opt", "gpt2", "gpt_bigcode", "gpt_neox", "bloom", "phi", "starcoder2")
_QK_NORM: Final = ("qwen3", "gemma3", "gemma4", "olmo2", "glm4_moe")
_KINDS: Final[dict[str, AttentionKind]] = {
    "full_attention": "full",
    "indexed_attention": "full",
    "attention": "full",
    "global": "full",
    "sliding_attention": "sliding",
    "sliding_window": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "linear",
    "mamba": "linear",
    "mamba2": "linear",
}


def read_attention(keys: ConfigKeys, num_layers: int) -> tuple[AttentionFacts, ...]:
    """One entry a layer; layers that are alike share theirs."""
    kinds = _kinds(keys, num_layers)
    window = keys.integer("sliding_window", 0, minimum=0)
    chunk = keys.integer("attention_chunk_size", 0, minimum=0)
    base = _full(keys)
    by_kind = {
        "full": _global_heads(keys, base),
        "sliding": replace(base, kind="sliding", window=window),
        "chunked": replace(base, kind="chunked", window=chunk),
        "none": replace(base, kind="none", num_kv_heads=0),
    }
    if "linear" in kinds:
        by_kind["linear"] = replace(base, kind="linear", num_kv_heads=0, latent=None, state=_state(keys))
    layers = [by_kind[kind] for kind in kinds]
    blocks = keys.list("block_configs")
    if blocks:
        layers = [_of_block(layer, block) for layer, block in zip(layers, blocks, strict=False)]
    shared = keys.integer("num_kv_shared_layers", 0, minimum=0)
    return tuple(
        replace(layer, shares_cache=True) if at >= num_layers - shared else layer for at, layer in enumerate(layers)
    )


def _of_block(attention: AttentionFacts, block: object) -> AttentionFacts:
    """Nemotron-NAS: each layer says how many query heads share a KV head, or that it has no attention."""
    found = block.get("attention") if isinstance(block, Mapping) else None
    each = found.get("n_heads_in_group") if isinstance(found, Mapping) else None
    if isinstance(each, int) and not isinstance(each, bool) and each > 0:
        return replace(attention, num_kv_heads=max(attention.num_heads // each, 1))
    return replace(attention, kind="none", num_kv_heads=0)


def _full(keys: ConfigKeys) -> AttentionFacts:
    hidden, heads = keys.integer("hidden"), keys.integer("heads")
    head_dim = keys.integer("head_dim", max(hidden // heads, 1))
    kv_heads = _kv_heads(keys, heads)
    latent = _latent(keys)
    has_bias = keys.flag("attention_bias", keys.flag("bias", keys.model_type.startswith(_QKV_BIAS)))
    if keys.model_type.startswith(("qwen3", "phi3", "phimoe")):
        has_bias = keys.flag("attention_bias", False)
    has_gate = keys.flag("attn_output_gate", keys.model_type.startswith(("qwen3_next", "qwen3_5")))
    has_norm = keys.model_type.startswith(_QK_NORM) or keys.flag("use_qk_norm", False)
    return AttentionFacts(
        kind="full",
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=keys.integer("v_head_dim", head_dim) if latent is None else latent.v_dim,
        latent=latent,
        has_bias=has_bias,
        has_output_bias=has_bias and (keys.model_type.startswith(_OUTPUT_BIAS) or keys.flag("attention_bias", False)),
        has_gate=has_gate,
        qk_norm_size=2 * head_dim if has_norm else 0,
        index_bytes=keys.integer("index_head_dim") + 4 if latent and keys.has("index_head_dim") else 0,
    )


def _kv_heads(keys: ConfigKeys, heads: int) -> int:
    """Falcon and the like say ``multi_query`` instead of a number."""
    if keys.model_type in ("falcon", "RefinedWeb", "RefinedWebModel"):
        is_new = keys.flag("new_decoder_architecture", False)
        return keys.integer("kv_heads", heads) if is_new else 1 if keys.flag("multi_query", True) else heads
    if keys.model_type in ("mpt", "dbrx"):
        return keys.integer("kv_n_heads", heads)
    found = keys.integer("kv_heads", heads)
    if heads % found:
        raise ModelError(
            f"the model's config has num_key_value_heads = {found}, allowed: a divisor of its {heads} query heads",
            hint="compare config.json with the publisher's original",
        )
    return found


def _latent(keys: ConfigKeys) -> LatentFacts | None:
    if not keys.has("kv_lora_rank"):
        return None
    return LatentFacts(
        q_rank=keys.integer("q_lora_rank") if keys.has("q_lora_rank") else None,
        kv_rank=keys.integer("kv_lora_rank"),
        rope_dim=keys.integer("qk_rope_head_dim", 64),
        nope_dim=keys.integer("qk_nope_head_dim", 128),
        v_dim=keys.integer("v_head_dim", 128),
    )


def _global_heads(keys: ConfigKeys, base: AttentionFacts) -> AttentionFacts:
    """Gemma-4's full layers have heads of their own, and may use K as V."""
    head_dim = keys.integer("global_head_dim", base.head_dim)
    kv_heads = keys.integer("num_global_key_value_heads", base.num_kv_heads)
    has_value = not keys.flag("attention_k_eq_v", False)
    v_head_dim = base.v_head_dim if head_dim == base.head_dim else head_dim
    return replace(base, head_dim=head_dim, v_head_dim=v_head_dim, num_kv_heads=kv_heads, has_value=has_value)


def _state(keys: ConfigKeys) -> StateFacts:
    """Gated DeltaNet (Qwen3-Next on) or Mamba-2, by the keys that are there."""
    hidden = keys.integer("hidden")
    kernel = keys.integer("linear_conv_kernel_dim", keys.integer("mamba_d_conv", keys.integer("conv_kernel", 4)))
    if keys.has("linear_num_value_heads"):
        key_heads, value_heads = keys.integer("linear_num_key_heads"), keys.integer("linear_num_value_heads")
        key_dim, value_dim = keys.integer("linear_key_head_dim"), keys.integer("linear_value_head_dim")
        channels = 2 * key_heads * key_dim + value_heads * value_dim
        inner = value_heads * value_dim
        parameters = hidden * (channels + inner + 2 * value_heads) + inner * hidden + channels * kernel
        return StateFacts(
            recurrent=value_heads * key_dim * value_dim,
            conv_channels=channels,
            conv_kernel=kernel,
            parameters=parameters,
        )
    if keys.has("linear_num_heads"):  # Kimi Delta Attention: q, k, v and gates of the same width
        heads, head_dim = keys.integer("linear_num_heads"), keys.integer("linear_head_dim", 128)
        inner = heads * head_dim
        parameters = hidden * (4 * inner + 2 * head_dim + heads) + inner * hidden
        return StateFacts(
            recurrent=inner * head_dim, conv_channels=3 * inner, conv_kernel=kernel, parameters=parameters
        )
    if keys.has("attn_type_list"):  # lightning attention: q, k, v and a gate of the queries' width
        heads = keys.integer("heads")
        head_dim = keys.integer("head_dim", hidden // heads)
        inner = heads * head_dim
        return StateFacts(recurrent=inner * head_dim, conv_channels=0, conv_kernel=1, parameters=5 * hidden * inner)
    if keys.has("mamba_dt_rank"):  # Mamba-1
        inner, size = keys.integer("mamba_expand", 2) * hidden, keys.integer("mamba_d_state", 16)
        rank = keys.integer("mamba_dt_rank")
        parameters = inner * (3 * hidden + kernel + 2 * rank + 3 * size)
        return StateFacts(recurrent=inner * size, conv_channels=inner, conv_kernel=kernel, parameters=parameters)
    heads = keys.integer("mamba_n_heads", keys.integer("mamba_num_heads", 0, minimum=0), minimum=0)
    head_dim = keys.integer("mamba_d_head", keys.integer("mamba_head_dim", 64))
    size = keys.integer("mamba_d_state", keys.integer("ssm_state_size", 128))
    groups = keys.integer("mamba_n_groups", keys.integer("n_groups", 1))
    inner = heads * head_dim or keys.integer("mamba_expand", 2) * hidden
    heads = heads or inner // head_dim
    channels = inner + 2 * groups * size
    return StateFacts(
        recurrent=heads * head_dim * size,
        conv_channels=channels,
        conv_kernel=kernel,
        parameters=hidden * (inner + channels + heads) + inner * hidden + channels * kernel,
        recurrent_bytes=4 if keys.text("mamba_ssm_cache_dtype") == "float32" else 2,
    )


def _kinds(keys: ConfigKeys, num_layers: int) -> list[AttentionKind]:
    """By ``layer_types`` where the config has it, else by the rule of the family."""
    named = keys.list("layer_types") or keys.list("layers_block_type")
    if named:
        kinds = [_KINDS.get(str(name)) for name in named]
        if len(kinds) != num_layers or None in kinds:
            unknown = sorted({str(name)[:40] for name in named} - _KINDS.keys())
            raise ModelError(
                f"the model's config has layer_types of {len(named)} entries"
                + (f" with {', '.join(unknown)}" if unknown else f" for {num_layers} layers"),
                hint=f"one entry a layer is expected, of {', '.join(sorted(_KINDS))}",
            )
        return [kind for kind in kinds if kind is not None]
    listed = keys.list("attn_type_list")  # MiniMax: 1 full, 0 lightning
    if listed:
        return ["full" if each else "linear" for each in listed]
    full = keys.list("full_attn_layers")  # Kimi Linear, counted from 1
    if full:
        return ["full" if layer + 1 in full else "linear" for layer in range(num_layers)]
    pattern = keys.text("hybrid_override_pattern")
    if pattern:  # Nemotron-H: M a state, * attention, - an MLP alone
        letters: dict[str, AttentionKind] = {"M": "linear", "*": "full"}
        return [letters.get(letter, "none") for letter in pattern]
    is_global = _global_rule(keys)
    other: AttentionKind = "full"
    if keys.has("linear_num_value_heads") or keys.has("attn_layer_period"):
        other = "linear"
    elif keys.model_type.startswith("llama4") and keys.has("attention_chunk_size"):
        other = "chunked"
    elif _slides(keys):
        other = "sliding"
    return ["full" if is_global(layer) else other for layer in range(num_layers)]


def _slides(keys: ConfigKeys) -> bool:
    window = keys.integer("sliding_window", 0, minimum=0)
    if not window or not keys.flag("use_sliding_window", True):
        return False
    if keys.model_type.startswith("qwen") and not keys.flag("use_sliding_window", False):
        return False
    return window < keys.integer("position", 2**31)


def _global_rule(keys: ConfigKeys) -> Callable[[int], bool]:
    """Which layers see everything although others of the model slide, are chunked or linear."""
    kind = keys.model_type
    if kind.startswith("qwen") and keys.has("linear_num_value_heads"):
        every = keys.integer("full_attention_interval", 4)
        return lambda layer: (layer + 1) % every == 0
    if kind.startswith("qwen"):
        first = keys.integer("max_window_layers", 28, minimum=0)
        return lambda layer: layer < first
    if kind.startswith("llama4"):
        rotates = keys.list("no_rope_layers")  # 1 where a layer has rotary positions, and then chunks
        step = keys.integer("no_rope_layer_interval", 4)
        return lambda layer: not rotates[layer] if layer < len(rotates) else (layer + 1) % step == 0
    return _periodic_rule(keys)


def _periodic_rule(keys: ConfigKeys) -> Callable[[int], bool]:
    """One layer of every so many."""
    kind = keys.model_type
    if keys.has("attn_layer_period"):  # Jamba
        period, offset = keys.integer("attn_layer_period"), keys.integer("attn_layer_offset", 0, minimum=0)
        return lambda layer: layer % period == offset
    letters = keys.text("sliding_window_pattern")
    if letters:  # exaone4: LLLG
        return lambda layer: letters[layer % len(letters)] == "G"
    default = {"gemma2": 2, "cohere2": 4, "gpt_oss": 2, "gemma3n_text": 5, "exaone4": 4}.get(kind)
    default = default or (6 if kind in ("gemma3", "gemma3_text", "gemma4_text") else None)
    if default is None:
        return lambda layer: False
    every = keys.integer("sliding_window_pattern", keys.integer("_sliding_window_pattern", default))
    return lambda layer: (layer + 1) % every == 0
