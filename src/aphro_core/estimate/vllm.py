"""What a vLLM server of a given version would print: the balance of each of its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final, Literal

from aphro_core.estimate.activations import Run, activation_peak
from aphro_core.estimate.balance import RankBalance, Sizes
from aphro_core.estimate.cards import Card
from aphro_core.estimate.facts import ModelFacts, QuantizationFacts
from aphro_core.estimate.kv_layout import build_layout
from aphro_core.estimate.parameters import RankSlice, lora_elements, rank_heads
from aphro_core.estimate.vllm_versions import Generation, kernel_bytes
from aphro_core.estimate.weights import (
    DTYPE_BYTES,
    StoredTensor,
    allocator_slack,
    rotary_bytes,
    stored_weight_bytes,
    weight_bytes,
)

GIB: Final = 2**30
_GRAPH_SIZES: Final = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
# What the law of graphs and contexts is wrong by at most: measured on Hopper from 0.18 on, a guess elsewhere.
_MEASURED_ERROR: Final = round(0.15 * GIB)
_GUESSED_ERROR: Final = round(1.0 * GIB)
_MXFP4_AFTER_SIZING: Final = round(1.82 * GIB)  # its kernels' modules and work space, loaded by the first steps


AfterSizing = Literal["starts", "may_die", "dies"]


@dataclass(frozen=True)
class VllmEngine:
    """One version on one card; builds the balance of every rank."""

    generation: Generation
    card: Card | None
    total_bytes: int

    def balances(
        self,
        facts: ModelFacts,
        sizes: Sizes,
        quantization: QuantizationFacts | None,
        tensors: Sequence[StoredTensor] | None,
    ) -> list[RankBalance]:
        """In rank order: rank = stage x tp + tp rank."""
        return [
            self._balance(facts, sizes, quantization, tensors, stage, layers, tp_rank)
            for stage, layers in enumerate(split_layers(facts.num_layers, sizes.pp, sizes.pp_layers))
            for tp_rank in range(sizes.tp)
        ]

    def context_bytes(self, facts: ModelFacts, sizes: Sizes) -> int:
        """What a process holds before its budget is measured: the CUDA context, on Hopper communicators too."""
        if self.generation.counts_context:
            return 0
        if not self._has_fused_card:
            return round(0.4 * GIB)
        if sizes.tp * sizes.pp == 1:
            return round(0.5 * GIB)
        return round((2.0 if facts.is_moe else 1.5) * GIB)

    def after_sizing(self, facts: ModelFacts, sizes: Sizes, balance: RankBalance) -> AfterSizing:
        """Whether the start dies after the cache is sized: graphs and the sampler's first call come on top.

        total - context - budget - graphs >= S V 4, give or take the laws' own error.
        """
        room = self.total_bytes - self.context_bytes(facts, sizes) - balance.budget_bytes - balance.after_sizing_bytes
        room -= min(sizes.max_num_seqs, sizes.max_num_batched_tokens) * facts.vocab_size * 4
        is_measured = self._has_fused_card and self.generation.has_fused_all_reduce
        doubt = _MEASURED_ERROR if is_measured else _GUESSED_ERROR
        return "dies" if room < -doubt else "may_die" if room < 0 else "starts"

    @property
    def _has_fused_card(self) -> bool:
        return self.card is not None and self.card.fused_all_reduce

    def _balance(
        self,
        facts: ModelFacts,
        sizes: Sizes,
        quantization: QuantizationFacts | None,
        tensors: Sequence[StoredTensor] | None,
        stage: int,
        layers: range,
        tp_rank: int,
    ) -> RankBalance:
        generation, is_last = self.generation, stage == sizes.pp - 1
        part = RankSlice(layers, tp_rank, sizes.tp, stage == 0, is_last)
        run = Run(
            sizes.max_num_batched_tokens,
            sizes.max_num_seqs,
            sizes.max_model_len,
            sizes.tp,
            sizes.pp,
            sizes.dtype,
            quantization.scheme if quantization else None,
        )
        samples = is_last and (generation.is_v1 or tp_rank == 0)
        peak = activation_peak(facts, run, generation.law, samples=samples)
        heads, kv_heads = rank_heads(facts.num_heads, facts.num_kv_heads, sizes.tp, tp_rank)
        has_prefixes = bool(sizes.prefix_caching)
        graphs = self._graph_bytes(facts, layers, sizes, quantization)
        return RankBalance(
            rank=stage * sizes.tp + tp_rank,
            stage=stage,
            tp_rank=tp_rank,
            layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            budget_bytes=round(self.total_bytes * sizes.utilization),
            weights_bytes=self._weights(facts, part, sizes, quantization, tensors),
            activation_bytes=round(peak.total * generation.slack),
            overhead_bytes=self._non_torch(facts, sizes) + (graphs if generation.counts_graphs else 0),
            layout=build_layout(
                facts,
                layers,
                tp=sizes.tp,
                tp_rank=tp_rank,
                block_size=sizes.block_size,
                cache_bytes=sizes.cache_bytes,
                dtype_bytes=DTYPE_BYTES[sizes.dtype],
                has_groups=generation.has_kv_groups,
                pads_latent=not generation.is_v1,
                extra_layers=sizes.draft_layers if is_last else 0,
                states_per_request=2 if has_prefixes else 1,
                prints_by_concurrency=generation.prints_by_concurrency,
            ),
            after_sizing_bytes=0 if generation.counts_graphs else graphs,
        )

    def _weights(
        self,
        facts: ModelFacts,
        part: RankSlice,
        sizes: Sizes,
        quantization: QuantizationFacts | None,
        tensors: Sequence[StoredTensor] | None,
    ) -> int:
        if tensors is not None:
            weights = stored_weight_bytes(facts, part, tensors, sizes.dtype)
        else:
            padding = self.generation.mxfp4_padding
            weights = weight_bytes(facts, part, sizes.dtype, quantization, mxfp4_padding=padding)
        lora = sizes.max_loras * sizes.max_lora_rank * lora_elements(facts, part) * 2
        slack = allocator_slack(facts, part, sizes.dtype, quantization)
        return weights + slack + rotary_bytes(facts, sizes.dtype) + lora

    def _non_torch(self, facts: ModelFacts, sizes: Sizes) -> int:
        """What grows outside torch while the worker runs: kernels, communicators, fused all-reduce's work space."""
        generation = self.generation
        if generation.counts_context:
            return round((0.4 if sizes.tp == 1 else 0.65) * GIB)
        if not generation.counts_non_torch:
            return 0
        if sizes.tp == 1 and sizes.pp > 1:
            return round(0.07 * GIB)
        kernels = kernel_bytes(self.card) + generation.more_non_torch
        if sizes.tp == 1:
            return kernels
        if generation.has_fused_all_reduce and self._has_fused_card:
            width = facts.hidden_size / 1024
            return round((2.0 + 0.015 * sizes.tp + 0.0045 * sizes.tp * width) * GIB)
        return generation.group_non_torch

    def _graph_bytes(
        self, facts: ModelFacts, layers: range, sizes: Sizes, quantization: QuantizationFacts | None
    ) -> int:
        """CUDA graphs in GiB: 0.2 + 0.02 a layer (V0 0.006) + 0.1 for each expert of a token (up to 0.5), for 51 sizes.

        Sizes are 1, 2, 4, then every 8 up to 256 and every 16 up to 512, as far as twice max_num_seqs.
        """
        if sizes.enforce_eager or not self.generation.has_graphs:
            return 0
        largest = min(2 * sizes.max_num_seqs, 512)
        captured = len([size for size in _GRAPH_SIZES if size <= largest])
        decoder = self.generation.graph_gib_per_layer * len(layers)
        experts = min(0.1 * max(layer.mlp.experts_per_token for layer in facts.layers), 0.5)
        graphs = round((0.2 + (decoder + experts) * captured / len(_GRAPH_SIZES)) * GIB)
        is_mxfp4 = quantization is not None and quantization.scheme == "mxfp4"
        return graphs + (_MXFP4_AFTER_SIZING if is_mxfp4 and not self.generation.counts_graphs else 0)


def split_layers(num_layers: int, pp: int, pp_layers: Sequence[int] | None) -> list[range]:
    """Layers of each stage: evenly, the rest one each to the stages before the last (vLLM's get_pp_indices)."""
    each, rest = divmod(num_layers, pp)
    sizes = list(pp_layers or [each + (pp - 1 - rest <= stage < pp - 1) for stage in range(pp)])
    starts = [sum(sizes[:stage]) for stage in range(pp)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def illegal_reasons(facts: ModelFacts, tp: int, pp: int, quantization: QuantizationFacts | None) -> list[str]:
    """Why vLLM refuses these sizes: each tensor that the number does not divide, with its dimension and group."""
    reasons = []
    heads, kv_heads = facts.num_heads, facts.num_kv_heads
    if heads % tp:
        reasons.append(f"{heads} query heads do not divide by {tp}")
    larger, smaller = max(kv_heads, tp), min(kv_heads, tp)
    if larger % smaller and not facts.has_latent:
        reasons.append(f"{kv_heads} KV heads and {tp} ranks: neither divides the other")
    vocab = ceil(facts.vocab_size / 64) * 64
    if vocab % tp:
        reasons.append(f"embedding: the padded vocabulary {vocab} does not divide by {tp}")
    for mlp in {layer.mlp for layer in facts.layers}:
        columns = mlp.intermediate_size
        name = "experts" if mlp.num_experts else "mlp.down_proj"
        group = quantization.group_size or 128 if quantization and "int4" in quantization.scheme else 1
        if columns % tp:
            reasons.append(f"{name}: {columns} columns do not divide by {tp}")
        elif group > 1 and columns // tp % group:
            reasons.append(f"{name}: {columns} / {tp} = {columns // tp} columns are not whole groups of {group}")
    if pp > facts.num_layers:
        reasons.append(f"{facts.num_layers} layers do not fill {pp} stages")
    return reasons
