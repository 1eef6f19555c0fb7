"""OPT: learned positions, layer norms, biases everywhere, a plain MLP with ReLU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from aphro_core.models import llama
from aphro_core.models.hf_config import HfConfig
from aphro_core.models.rules import ends, norm_rules, out_rules, plain_mlp_rules, qkv_rules, separate_qkv
from aphro_core.models.spec import Activation, DecoderSpec, RopeSpec
from aphro_core.models.tensors import Source, TensorRule

_POSITION_OFFSET: Final = 2  # the first rows of the table belong to padding (OPTLearnedPositionalEmbedding)
_ACTIVATIONS: Final[dict[str, Activation]] = {"relu": "relu", "gelu": "gelu"}

_DECODER: Final = "model.decoder"
_LAYER: Final = f"{_DECODER}.layers.{{i}}"

tensors: Final[tuple[TensorRule, ...]] = (
    *ends(f"{_DECODER}.embed_tokens", f"{_DECODER}.final_layer_norm"),
    TensorRule(
        "embed_positions.weight",
        (Source(f"{_DECODER}.embed_positions.weight", "positions"),),
        "hidden",
        place="embedding",
    ),
    *norm_rules("input_norm", f"{_LAYER}.self_attn_layer_norm"),
    *norm_rules("post_attention_norm", f"{_LAYER}.final_layer_norm"),
    *qkv_rules(separate_qkv(f"{_LAYER}.self_attn")),
    *out_rules(f"{_LAYER}.self_attn.out_proj"),
    *plain_mlp_rules(f"{_LAYER}.fc1", f"{_LAYER}.fc2"),
)


def spec(hf: Mapping[str, Any]) -> DecoderSpec:
    config = HfConfig(hf)
    if not config.flag("do_layer_norm_before", True) or config.flag("_remove_final_layer_norm", False):
        raise config.refuse("do_layer_norm_before", "true (norms before attention and MLP, and one behind the layers)")
    if config.integer("word_embed_proj_dim", config.integer("hidden_size")) != config.integer("hidden_size"):
        raise config.refuse("word_embed_proj_dim", f"hidden_size ({config.integer('hidden_size')})")
    if not config.flag("layer_norm_elementwise_affine", True):
        raise config.refuse("layer_norm_elementwise_affine", "true")
    has_bias = config.flag("enable_bias", True)
    renamed: dict[str, Any] = {
        "intermediate_size": config.integer("ffn_dim"),
        "hidden_act": hf.get("activation_function"),
    }
    renamed |= dict.fromkeys(("head_dim", "num_key_value_heads"))  # not OPT's keys
    base = llama.decoder_spec({**hf, **renamed}, max_position_embeddings=2048, activations=_ACTIVATIONS, is_tied=True)
    return replace(
        base,
        rope=RopeSpec(theta=1.0, rotary_dim=0),
        position_offset=_POSITION_OFFSET,
        gated_mlp=False,
        norm="layer",
        norm_bias=True,
        norm_eps=1e-5,
        qkv_bias=has_bias,
        o_bias=has_bias,
        mlp_bias=has_bias,
    )
