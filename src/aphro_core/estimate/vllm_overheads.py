"""What a vLLM process takes besides tensors: context, kernels, communicators, CUDA graphs, by version and card."""

from __future__ import annotations

from typing import Final

from aphro_core.estimate.balance import Sizes
from aphro_core.estimate.cards import GIB, Card
from aphro_core.estimate.facts import ModelFacts
from aphro_core.estimate.vllm_versions import Generation

_GRAPH_SIZES: Final = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
_MORE_PEERS: Final = round(0.26 * GIB)  # of a communicator: 2.1 GiB are printed for tp 8 on A100s, 1.8 with ROCm
_MXFP4_AFTER_SIZING: Final = round(1.82 * GIB)  # its kernels' modules and work space, loaded by the first steps


def has_fused_all_reduce(card: Card | None) -> bool:
    return card is not None and card.fused_all_reduce


def kernel_bytes(card: Card | None) -> int:
    """What loading kernels costs outside torch: more on chips with more multiprocessors (T4 0.03, 4090 0.07, A100
    0.09, H100 0.13 GiB as printed, less again on consumer Blackwell), half a GiB with ROCm."""
    if card is not None and not card.is_nvidia:
        return round(0.5 * GIB)
    capability = card.capability if card is not None else 8.0
    if capability < 8.0:
        return round(0.03 * GIB)
    if 9.0 <= capability < 12.0:
        return round(0.13 * GIB)
    return round((0.09 if capability == 8.0 else 0.07) * GIB)


def non_torch_bytes(generation: Generation, card: Card | None, facts: ModelFacts, sizes: Sizes) -> int:
    """What grows outside torch while the worker runs: kernels, communicators, fused all-reduce's work space."""
    if generation.counts_context:
        context = 0.65 if card is not None and card.capability in (8.0, 9.0) else 0.35
        return round((context if sizes.tp == 1 else context + 0.2) * GIB)
    if not generation.counts_non_torch:
        return 0
    if sizes.tp == 1:
        return round(0.07 * GIB) if sizes.pp > 1 else kernel_bytes(card) + generation.more_non_torch
    if generation.has_fused_all_reduce and has_fused_all_reduce(card):
        width = facts.hidden_size / 1024  # work space for every peer, as wide as the hidden states
        return round((2.0 + 0.015 * sizes.tp + 0.0045 * sizes.tp * width) * GIB)
    return generation.group_non_torch + (_MORE_PEERS * (min(sizes.tp, 8) - 2) if _is_switched(card) else 0)


def _is_switched(card: Card | None) -> bool:
    """Whether boards with that card connect all its peers (NVLink, Infinity Fabric): buffers for each of them then."""
    return card is not None and (card.capability == 8.0 or 9.0 <= card.capability < 11.0)


def context_bytes(generation: Generation, card: Card | None, facts: ModelFacts, sizes: Sizes) -> int:
    """What a process holds before its budget is measured: the CUDA context, on Hopper communicators too."""
    if generation.counts_context:
        return 0
    if not has_fused_all_reduce(card):
        return round(0.4 * GIB)
    if sizes.tp * sizes.pp == 1:
        return round(0.5 * GIB)
    return round((2.0 if facts.is_moe else 1.5) * GIB)


def graph_bytes(generation: Generation, facts: ModelFacts, sizes: Sizes, num_layers: int, scheme: str | None) -> int:
    """CUDA graphs in GiB: 0.2 + 0.02 a layer (V0 0.006) + 0.1 for each expert of a token (up to 0.5), for 51 sizes.

    Sizes are 1, 2, 4, then every 8 up to 256 and every 16 up to 512, as far as twice max_num_seqs.
    """
    if sizes.enforce_eager or not generation.has_graphs:
        return 0
    largest = min(2 * sizes.max_num_seqs, 512)
    captured = len([size for size in _GRAPH_SIZES if size <= largest])
    decoder = generation.graph_gib_per_layer * num_layers
    experts = min(0.1 * max(layer.mlp.experts_per_token for layer in facts.layers), 0.5)
    graphs = round((0.2 + (decoder + experts) * captured / len(_GRAPH_SIZES)) * GIB)
    return graphs + (_MXFP4_AFTER_SIZING if scheme == "mxfp4" and not generation.counts_graphs else 0)
