"""The encoder beside a decoder: parameters of a vision or audio tower, from its own section of the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from aphro_core.estimate.config_keys import ConfigKeys
from aphro_core.estimate.facts import TowerFacts

# (layers, width, MLP width, MLP matrices, patch) by the whole model's type: what the section may leave out
_SHAPES: Final[dict[str, tuple[int, int, int, int, int]]] = {
    "qwen2_vl": (32, 1280, 5120, 2, 14),
    "qwen2_5_vl": (32, 1280, 3420, 3, 14),
    "qwen2_5_omni": (32, 1280, 3420, 3, 14),
    "qwen3_vl": (27, 1152, 4304, 2, 16),
    "qwen3_vl_moe": (27, 1152, 4304, 2, 16),
    "qwen3_5": (27, 1152, 4304, 2, 16),
    "qwen3_5_moe": (27, 1152, 4304, 2, 16),
    "mistral3": (24, 1024, 4096, 3, 14),
    "pixtral": (24, 1024, 4096, 3, 16),
    "gemma3": (27, 1152, 4304, 2, 14),
    "gemma4": (27, 1152, 4304, 2, 14),
    "llama4": (34, 1408, 5632, 2, 14),
    "llava": (24, 1024, 4096, 2, 14),
    "llava_next": (24, 1024, 4096, 2, 14),
    "llava_onevision": (26, 1152, 4304, 2, 14),
    "kimi_vl": (27, 1152, 4304, 2, 14),
    "internvl": (24, 1024, 4096, 2, 14),
    "internvl_chat": (24, 1024, 4096, 2, 14),
    "mllama": (40, 1280, 5120, 2, 14),
    "idefics3": (27, 1152, 4304, 2, 14),
    "paligemma": (27, 1152, 4304, 2, 14),
    "deepseek_vl_v2": (27, 1152, 4304, 2, 14),
    "phi3_v": (24, 1024, 4096, 2, 14),
}
_GENERIC: Final = (27, 1152, 4304, 2, 14)  # SigLIP so400m: the commonest
_ANY_SIZE: Final = 16_384  # tokens of the largest image of models that take images as they are (12.8 million pixels)
_ONE_IMAGE: Final = 3025  # of a 1540 x 1540 image in merged patches of 28 x 28, the largest of the fixed sizes
_MERGED: Final = 4  # neighbouring patches that one text token is made of, in models that merge them
_MERGING: Final = ("qwen", "mistral3", "kimi_vl", "internvl", "llama4")


def read_tower(keys: ConfigKeys) -> TowerFacts | None:
    """The encoder with its projector, None for a model of text alone."""
    section = (
        keys.whole.get("vision_config")
        or keys.values.get("vision_config")
        or keys.whole.get("visual")
        or keys.whole.get("vision_tower_config")
    )
    kind = keys.whole_type.removesuffix("_text")
    is_whole = keys.whole_type in _SHAPES or keys.architecture.endswith("ForConditionalGeneration")
    if not isinstance(section, Mapping) and not (is_whole and kind in _SHAPES):
        return None
    shape = _SHAPES.get(kind, _GENERIC)
    found: Mapping[str, Any] = section if isinstance(section, Mapping) else {}
    layers = _first(found, ("depth", "num_hidden_layers", "layers", "num_layers"), shape[0])
    width = _first(found, ("embed_dim", "hidden_size", "width"), shape[1])
    if "out_hidden_size" in found or kind == "qwen2_vl":
        width = _first(found, ("embed_dim",), width)
    if kind == "qwen2_5_vl" and width > 2048:  # a key that means the text model's width there
        width = shape[1]
    columns = _first(found, ("intermediate_size",), shape[2])
    if "mlp_ratio" in found and "intermediate_size" not in found:
        columns = int(width * float(found["mlp_ratio"]))
    patch = _first(found, ("patch_size",), shape[4])
    block = 4 * width * width + shape[3] * width * columns
    hidden = keys.integer("hidden")
    merged = width * (_MERGED if kind.startswith(_MERGING) else 1)
    projector = merged * merged + merged * hidden if merged != width else width * hidden + hidden * hidden
    return TowerFacts(
        parameters=_audio_parameters(keys.values) + layers * block + 3 * patch * patch * width + projector,
        width=width,
        columns=columns,
        num_matrices=shape[3],
        max_tokens=_ANY_SIZE if kind.startswith("qwen") else _ONE_IMAGE,
    )


def _audio_parameters(text: Mapping[str, Any]) -> int:
    """Of a Whisper-like encoder beside the one for images; 0 without one."""
    found = text.get("audio_config")
    if not isinstance(found, Mapping) or "encoder_layers" not in found:
        return 0
    width = _first(found, ("d_model",), 1280)
    columns = _first(found, ("encoder_ffn_dim",), 4 * width)
    layers = _first(found, ("encoder_layers",), 32)
    return layers * (4 * width * width + 2 * width * columns)


def _first(section: Mapping[str, Any], names: tuple[str, ...], default: int) -> int:
    for name in names:
        value = section.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**24:
            return value
    return default
