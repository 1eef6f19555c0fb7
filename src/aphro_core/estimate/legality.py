"""Which sizes an engine refuses, and why: the tensor, the dimension and the group that do not divide."""

from __future__ import annotations

from math import ceil

from aphro_core.errors import PlacementError
from aphro_core.estimate.facts import MlpFacts, ModelFacts, QuantizationFacts
from aphro_core.estimate.parameters import VOCAB_UNIT


def check_vllm(
    facts: ModelFacts, tp: int, pp: int, quantization: QuantizationFacts | None, *, expert_parallel: bool = False
) -> None:
    """Raise PlacementError with every reason. ``quantization`` is the checkpoint's own: whole groups a rank."""
    reasons = [*_heads(facts, tp), *_columns(facts, tp, quantization, expert_parallel)]
    vocab = ceil(facts.vocab_size / VOCAB_UNIT) * VOCAB_UNIT
    if vocab % tp:
        reasons.append(f"embedding: the padded vocabulary {vocab} does not divide by {tp}")
    if pp > facts.num_layers:
        reasons.append(f"{facts.num_layers} layers do not fill {pp} stages")
    if reasons:
        raise PlacementError(
            f"vLLM refuses tensor parallel {tp} x pipeline parallel {pp}: {'; '.join(reasons)}",
            hint="leave -tp and -pp out: aphro estimate lists the sizes that are legal",
        )


def check_general(
    facts: ModelFacts, tp: int, pp: int, quantization: QuantizationFacts | None, *, expert_parallel: bool = False
) -> None:
    """aphro's rules for a model that it does not run yet: a whole head and a whole group of columns for each rank."""
    group = (quantization.group_size or 1) if quantization else 1
    limits = {"query heads": facts.num_heads}
    for mlp in _cut_by_columns(facts, expert_parallel):
        limits["MLP columns" if group == 1 else f"groups of {group} MLP columns"] = mlp.intermediate_size // group
    for what, number in limits.items():
        if tp > number > 0:
            raise PlacementError(
                f"tensor_parallel_size is {tp}, but {facts.architecture} has {number} {what} and each rank needs one, "
                f"allowed: 1 to {number}",
                hint=f"-tp {number}, and -pp for more devices",
            )
    if pp > facts.num_layers:
        raise PlacementError(
            f"pipeline_parallel_size is {pp}, but the model has {facts.num_layers} layers, "
            f"allowed: 1 to {facts.num_layers}",
            hint=f"-pp {facts.num_layers}",
        )


def _heads(facts: ModelFacts, tp: int) -> list[str]:
    heads, kv_heads = facts.num_heads, facts.num_kv_heads
    reasons = [f"attention: {heads} query heads do not divide by {tp}"] if heads % tp else []
    if max(kv_heads, tp) % min(kv_heads, tp) and not facts.has_latent:
        reasons.append(f"attention: {kv_heads} KV heads and {tp} ranks, neither divides the other")
    return reasons


def _cut_by_columns(facts: ModelFacts, expert_parallel: bool) -> set[MlpFacts]:
    return {layer.mlp for layer in facts.layers if not (expert_parallel and layer.mlp.num_experts)}


def _columns(facts: ModelFacts, tp: int, quantization: QuantizationFacts | None, expert_parallel: bool) -> list[str]:
    reasons = []
    is_grouped = quantization is not None and "int" in quantization.scheme and quantization.scheme != "int8"
    group = (quantization.group_size or 128) if quantization and is_grouped else 1
    for mlp in _cut_by_columns(facts, expert_parallel):
        columns, name = mlp.intermediate_size, "experts' down_proj" if mlp.num_experts else "mlp.down_proj"
        if columns % tp:
            reasons.append(f"{name}: {columns} columns do not divide by {tp}")
        elif columns // tp % group:
            reasons.append(f"{name}: {columns} / {tp} = {columns // tp} columns are not whole groups of {group}")
    return reasons
