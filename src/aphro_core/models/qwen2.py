"""Qwen2 and Qwen2.5: Llama with biases on q, k and v; the upper layers may slide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from aphro_core.models import llama
from aphro_core.models.hf_config import HfConfig
from aphro_core.models.spec import DecoderSpec

tensors = llama.tensors

_SLIDES: Final = {"full_attention": False, "sliding_attention": True}


def spec(hf: Mapping[str, Any]) -> DecoderSpec:
    return with_window(replace(llama.decoder_spec(hf, max_position_embeddings=32_768), qkv_bias=True), hf)


def with_window(base: DecoderSpec, hf: Mapping[str, Any]) -> DecoderSpec:
    """Qwen's window: on only with ``use_sliding_window``, for the layers that ``layer_types`` names, or else from
    ``max_window_layers`` on. Long-context variants attend in chunks beyond the length that they were trained for; up
    to it they are plain, and are served so."""
    config = HfConfig(hf)
    chunks = config.section("dual_chunk_attention_config")
    trained = chunks.integer("original_max_position_embeddings", base.max_position_embeddings, maximum=2**31)
    base = replace(base, max_position_embeddings=min(base.max_position_embeddings, trained))
    window = config.integer("sliding_window", 4096, maximum=2**31) if config.flag("use_sliding_window", False) else None
    if config.has("layer_types"):
        kinds = config.names("layer_types")
        if len(kinds) != base.num_layers or not set(kinds) <= set(_SLIDES):
            raise config.refuse("layer_types", f"{base.num_layers} entries of {', '.join(_SLIDES)}")
        slides = tuple(_SLIDES[kind] for kind in kinds)
        if any(slides) and window is None:
            raise config.refuse("use_sliding_window", "true, as layer_types has sliding_attention")
    else:
        first = config.integer("max_window_layers", 28, minimum=0)
        slides = tuple(layer >= first for layer in range(base.num_layers))
    if window is None or not any(slides):
        return base
    return replace(base, sliding_window=window, sliding_layers=None if all(slides) else slides)
