"""A model as an estimate sees it: its facts always, the engine's own spec where aphro runs the family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from aphro_core.errors import ModelError, UsageError
from aphro_core.estimate.config_reader import read_facts
from aphro_core.estimate.question import ModelSource
from aphro_core.estimate.weights import StoredTensor
from aphro_core.models.registry import load_spec
from aphro_core.models.spec import DecoderSpec


def build_source(
    name: str,
    hf_config: Mapping[str, Any],
    *,
    tensors: Sequence[StoredTensor] | None = None,
    file_bytes: int | None = None,
    quantization: str | None = None,
) -> ModelSource:
    """``hf_config`` is untrusted; ``quantization`` is what ``-q`` asked of aphro.

    Raises ModelError when the config lacks a size that no family's default fills.
    """
    facts = read_facts(hf_config)
    spec: DecoderSpec | None = None
    refusal = None
    try:
        spec = load_spec(hf_config, quantization)
    except (ModelError, UsageError) as error:
        refusal = error.message
    if spec is not None:  # what both readers know, the engine's has checked
        facts = replace(facts, dtype=_stated_dtype(hf_config, spec))
    return ModelSource(name=name, facts=facts, spec=spec, refusal=refusal, tensors=tensors, file_bytes=file_bytes)


def _stated_dtype(hf_config: Mapping[str, Any], spec: DecoderSpec) -> str:
    """The config's; where it is silent the engine reads float32, but published weights are 16 bit."""
    return spec.dtype if hf_config.get("dtype") or hf_config.get("torch_dtype") else "bfloat16"
