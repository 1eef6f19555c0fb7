"""The table architecture -> family, and the way from a checkpoint's config to a DecoderSpec."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, Protocol

from aphro_core.errors import ModelError
from aphro_core.models import (
    gemma2,
    gemma3,
    granite,
    internlm2,
    llama,
    mistral,
    mixtral,
    nemotron,
    opt,
    phi3,
    qwen,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from aphro_core.models.hf_config import HfConfig
from aphro_core.models.quant_config import quant_spec, with_request
from aphro_core.models.spec import DecoderSpec
from aphro_core.models.tensors import TensorRule


class Family(Protocol):
    """What a family file offers: its config as a spec, and where its checkpoint tensors go."""

    @property
    def tensors(self) -> tuple[TensorRule, ...]: ...

    def spec(self, hf: Mapping[str, Any]) -> DecoderSpec: ...


FAMILIES: Final[dict[str, Family]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "MixtralForCausalLM": mixtral,
    "QWenLMHeadModel": qwen,
    "Qwen2ForCausalLM": qwen2,
    "Qwen2MoeForCausalLM": qwen2_moe,
    "Qwen3ForCausalLM": qwen3,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "NemotronForCausalLM": nemotron,
    "OPTForCausalLM": opt,
    "Phi3ForCausalLM": phi3,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "InternLM2ForCausalLM": internlm2,
    "GraniteForCausalLM": granite,
}

# Architectures of published models that are not supported: named when they are refused, not "unknown".
RECOGNISED_ARCHITECTURES: Final = (
    "BaichuanForCausalLM", "BloomForCausalLM", "ChatGLMModel", "CohereForCausalLM", "DbrxForCausalLM",
    "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "FalconForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM",
    "GemmaForCausalLM", "Gemma3ForConditionalGeneration", "Glm4ForCausalLM", "GptOssForCausalLM",
    "GraniteMoeForCausalLM", "JambaForCausalLM", "Llama4ForConditionalGeneration", "MPTForCausalLM",
    "MambaForCausalLM", "MiniCPMForCausalLM", "NemotronHForCausalLM", "OlmoForCausalLM", "OlmoeForCausalLM",
    "PhiForCausalLM", "Qwen2VLForConditionalGeneration", "Qwen3NextForCausalLM", "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
)  # fmt: skip


def load_spec(hf_config: Mapping[str, Any], quantization: str | None = None) -> DecoderSpec:
    """The spec of a checkpoint. ``hf_config`` is untrusted: every key is checked. ``quantization`` is what was asked
    for with ``-q``.

    Raises ModelError for an unknown architecture (naming the nearest), an unsupported quantisation, or a key that is
    missing, of the wrong type, out of range or inconsistent with another; UsageError when ``quantization`` contradicts
    the checkpoint.
    """
    config = HfConfig(hf_config)
    architectures = config.names("architectures")
    if not architectures:
        raise ModelError(
            "the model's config lacks architectures", hint=f"add one of {', '.join(FAMILIES)} to config.json"
        )
    architecture = architectures[0]
    family = FAMILIES.get(architecture)
    if family is None:
        known = "recognised but not supported" if architecture in RECOGNISED_ARCHITECTURES else "not supported"
        near = difflib.get_close_matches(architecture, FAMILIES, n=1)
        raise ModelError(
            f"architecture {architecture[:80]!r} is {known}, supported: {', '.join(FAMILIES)}",
            hint=f"the nearest is {near[0]}" if near else "use a model of a supported architecture",
        )
    spec = family.spec(hf_config)
    found = quant_spec(config.section("quantization_config")) if config.has("quantization_config") else None
    return replace(spec, quantization=with_request(found, quantization))


def family_of(spec: DecoderSpec) -> Family:
    """The family of a spec that ``load_spec`` made."""
    return FAMILIES[spec.architecture]
