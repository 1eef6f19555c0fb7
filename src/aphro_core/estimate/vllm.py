"""What a vLLM server of a given version would print: the balance of each of its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from aphro_core.estimate.activations import Run, activation_peak
from aphro_core.estimate.balance import RankBalance, Sizes
from aphro_core.estimate.cards import GIB, Card
from aphro_core.estimate.facts import ModelFacts, QuantizationFacts
from aphro_core.estimate.kv_layout import KvLayout, build_layout
from aphro_core.estimate.parameters import RankSlice, lora_elements, rank_heads
from aphro_core.estimate.vllm_overheads import context_bytes, graph_bytes, has_fused_all_reduce, non_torch_bytes
from aphro_core.estimate.vllm_versions import Generation
from aphro_core.estimate.weights import (
    DTYPE_BYTES,
    StoredTensor,
    allocator_slack,
    rotary_bytes,
    stored_weight_bytes,
    weight_bytes,
)
from aphro_core.parallel.shard import split_layers

# What the laws of graphs and contexts are wrong by at most: measured on Hopper from 0.18 on, a guess elsewhere.
_MEASURED_ERROR: Final = round(0.15 * GIB)
_GUESSED_ERROR: Final = round(1.0 * GIB)

AfterSizing = Literal["starts", "may_die", "dies"]


@dataclass(frozen=True, kw_only=True)
class VllmServer:
    """One version on one kind of card with one model. ``stated_share`` corrects counted weights by an index's total."""

    generation: Generation
    card: Card | None
    total_bytes: int
    facts: ModelFacts
    sizes: Sizes
    quantization: QuantizationFacts | None
    tensors: Sequence[StoredTensor] | None = None
    stated_share: float = 1.0

    def balances(self) -> list[RankBalance]:
        """In rank order: rank = stage x tp + tp rank. Raises PlacementError for layers that do not fill the stages."""
        sizes = self.sizes
        known: dict[tuple[object, ...], RankBalance] = {}
        balances = []
        for stage, layers in enumerate(split_layers(self.facts.num_layers, sizes.pp, sizes.pp_layers)):
            for tp_rank in range(sizes.tp):
                ends = (stage == 0, stage == sizes.pp - 1)
                part = RankSlice(layers, tp_rank, sizes.tp, *ends, expert_parallel=sizes.expert_parallel)
                held = len(layers) if self.facts.is_uniform else layers
                # all tp ranks but V0's first are alike, unless whole experts do not divide
                which = tp_rank if sizes.expert_parallel else tp_rank == 0
                kind = (held, part.has_embedding, part.has_head, which)
                known[kind] = known.get(kind) or self._balance(part, stage)
                rank = stage * sizes.tp + tp_rank
                balances.append(known[kind].at(rank=rank, stage=stage, tp_rank=tp_rank, layers=layers))
        return balances

    def after_sizing(self, balance: RankBalance) -> AfterSizing:
        """Whether the start dies after the cache is sized: graphs and the sampler's first call come on top.

        total - context - budget - graphs >= S V 4, give or take the laws' own error.
        """
        sizes = self.sizes
        context = context_bytes(self.generation, self.card, self.facts, sizes)
        first_call = min(sizes.max_num_seqs, sizes.max_num_batched_tokens) * self.facts.vocab_size * 4
        room = self.total_bytes - context - balance.budget_bytes - balance.after_sizing_bytes - first_call
        is_measured = has_fused_all_reduce(self.card) and self.generation.has_fused_all_reduce
        doubt = _MEASURED_ERROR if is_measured else _GUESSED_ERROR
        return "dies" if room < -doubt else "may_die" if room < 0 else "starts"

    def _balance(self, part: RankSlice, stage: int) -> RankBalance:
        facts, sizes, generation = self.facts, self.sizes, self.generation
        samples = part.has_head and (generation.is_v1 or part.tp_rank == 0)
        splits_k = generation.splits_awq and (self._scheme or "").startswith("awq")
        run = Run.of(sizes, self._scheme, unpacks_weights=self._unpacks_weights, splits_k=splits_k)
        peak = activation_peak(facts, run, generation.law, samples=samples)
        heads, kv_heads = rank_heads(facts.num_heads, facts.num_kv_heads, sizes.tp, part.tp_rank)
        graphs = graph_bytes(generation, facts, sizes, len(part.layers), self._scheme)
        other = non_torch_bytes(generation, self.card, facts, sizes)
        return RankBalance(
            rank=stage * sizes.tp + part.tp_rank,
            stage=stage,
            tp_rank=part.tp_rank,
            layers=part.layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            budget_bytes=round(self.total_bytes * sizes.utilization),
            weights_bytes=self._weights_bytes(part),
            activation_bytes=round((peak.total + self._retained_bytes(part)) * generation.slack),
            overhead_bytes=other + (graphs if generation.counts_graphs else 0),
            layout=self._layout(part),
            after_sizing_bytes=0 if generation.counts_graphs else graphs,
        )

    def _retained_bytes(self, part: RankSlice) -> int:
        """Of two all-reduces a layer: torch gives a block that another stream has used back only after that stream."""
        if not self.generation.retains_reduced or part.tp == 1:
            return 0
        tokens, hidden = self.sizes.max_num_batched_tokens, self.facts.hidden_size
        return 2 * len(part.layers) * tokens * hidden * DTYPE_BYTES[self.sizes.dtype]

    @property
    def _scheme(self) -> str | None:
        return self.quantization.scheme if self.quantization else None

    @property
    def _unpacks_weights(self) -> bool:
        """bitsandbytes always; AWQ and GPTQ on cards that the Marlin kernels do not run on."""
        scheme = self._scheme or ""
        is_old = self.card is not None and self.card.capability < 8.0
        return scheme.startswith("bnb") or (is_old and scheme.startswith(("awq", "gptq", "w4a16")))

    def _layout(self, part: RankSlice) -> KvLayout:
        sizes, generation = self.sizes, self.generation
        return build_layout(
            self.facts,
            part.layers,
            tp=sizes.tp,
            tp_rank=part.tp_rank,
            block_size=sizes.block_size,
            cache_bytes=sizes.cache_bytes,
            dtype_bytes=DTYPE_BYTES[sizes.dtype],
            has_groups=generation.has_kv_groups,
            pads_latent=not generation.is_v1,
            has_latent=generation.has_latent_cache,
            extra_layers=sizes.draft_layers if part.has_head else 0,
            states_per_request=(2 if sizes.prefix_caching else 1) + sizes.draft_tokens,
            draft_tokens=sizes.draft_tokens,
            prints_by_concurrency=generation.prints_by_concurrency,
        )

    def _weights_bytes(self, part: RankSlice) -> int:
        """With what servers print as weights besides: the allocator's rounding, the rotary table, LoRA's buffers."""
        facts, sizes, quantization = self.facts, self.sizes, self.quantization
        padding = self.generation.mxfp4_padding
        if self.tensors is not None:
            weights = stored_weight_bytes(facts, part, self.tensors, sizes.dtype, mxfp4_padding=padding)
        else:
            counted = weight_bytes(facts, part, sizes.dtype, quantization, mxfp4_padding=padding)
            weights = round(counted * self.stated_share)
        lora = sizes.max_loras * sizes.max_lora_rank * lora_elements(facts, part) * 2
        slack = allocator_slack(facts, part, sizes.dtype, quantization)
        return weights + slack + rotary_bytes(facts, sizes.dtype) + lora
