"""Bytes of weights on a rank, from the facts or, better, from the tensors that the files hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from aphro_core.estimate.facts import ModelFacts, QuantizationFacts
from aphro_core.estimate.parameters import (
    Precision,
    RankSlice,
    absorbed_elements,
    padded_vocab,
    rank_experts,
    rank_matrices,
)
from aphro_core.estimate.quantization import SCHEMES

DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}

_MIB: Final = 2**20

_LAYER: Final = re.compile(r"\b(?:layers|h|blocks|blk)\.(\d+)\.")
_TOWER: Final = re.compile(r"vision|visual|image|audio|multi_modal|mm_projector|mlp1\.|patch_embed|vit\b")
_EMBEDDING: Final = re.compile(r"embed_tokens|wte|embed_in|word_embeddings|token_embd|tok_embeddings")
_POSITIONS: Final = re.compile(r"embed_positions|wpe|position_embd")
_HEAD: Final = re.compile(r"lm_head|embed_out|output\.weight|output_layer")
_COPIED: Final = re.compile(r"norm|ln_|router|mlp\.gate\.|ffn_gate_inp|q_a_proj|kv_a_proj|kv_a_layernorm|rotary|bias$")
_EXPERT: Final = re.compile(r"(?<!shared_)experts?\.|_exps\.")  # not the shared ones
_KEY_VALUE: Final = re.compile(r"[._](k_proj|v_proj|attn_k|attn_v)[._]")
_MXFP4: Final = re.compile(r"experts\.\w+_(blocks|scales)$")  # as gpt-oss stores them
_DRAFT: Final = re.compile(r"\bmtp\.|eagle|nextn")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint's files, by its header."""

    name: str
    num_elements: int
    num_bytes: int
    is_float: bool  # 16 or 32 bit: loaded in the run's data type; anything else keeps its bytes


def weight_bytes(
    facts: ModelFacts,
    part: RankSlice,
    dtype: str,
    quantization: QuantizationFacts | None,
    *,
    mxfp4_padding: float = 1.0,
) -> int:
    """Bytes of a rank's parameters. ``mxfp4_padding``: what kernels round the experts of gpt-oss up by."""
    factors = _bytes_per_element(dtype, quantization, mxfp4_padding)
    return round(
        sum(matrix.count * matrix.elements * factors[matrix.precision] for matrix in rank_matrices(facts, part))
    )


def allocator_slack(facts: ModelFacts, part: RankSlice, dtype: str, quantization: QuantizationFacts | None) -> int:
    """Bytes that torch's caching allocator adds to a rank's matrices, and that servers print as weights.

    From 10 MiB on a block is a multiple of 2 MiB, and what is left of one is split off only if it is more than 1 MiB
    (CUDACachingAllocator.cpp: kMinLargeAlloc, kRoundLarge, should_split). 160 MiB a rank for a 14B model at tp 2.
    """
    factors = _bytes_per_element(dtype, quantization, 1.0)
    total = 0
    for matrix in rank_matrices(facts, part):
        size = round(matrix.elements * factors[matrix.precision])
        left = -size % (2 * _MIB)
        if size >= 10 * _MIB and left <= _MIB:
            total += matrix.count * left
    return total


def _bytes_per_element(
    dtype: str, quantization: QuantizationFacts | None, mxfp4_padding: float
) -> dict[Precision, float]:
    full = float(DTYPE_BYTES[dtype])
    if quantization is None:
        return {"linear": full, "experts": full, "kept": full}
    scheme = SCHEMES[quantization.scheme]
    packed = quantization.bits / 8 if quantization.bits else scheme.bytes_per_weight(quantization.group_size)
    if scheme.experts_only:
        return {"linear": full, "experts": packed * mxfp4_padding, "kept": full}
    return {"linear": packed, "experts": packed, "kept": full}


def rotary_bytes(facts: ModelFacts, dtype: str) -> int:
    """The cos/sin tables: positions x rotated dims x bytes of the run's data type."""
    return facts.rotary_rows * facts.rotary_dim * DTYPE_BYTES[dtype]


def stored_weight_bytes(
    facts: ModelFacts, part: RankSlice, tensors: Sequence[StoredTensor], dtype: str, *, mxfp4_padding: float = 1.0
) -> int:
    """Bytes on a rank of what the files hold: by layer to a stage, cut by tp where servers cut, else copied.

    The vocabulary is padded; KV projections are copied beyond one head a rank; drafts' layers stay on disk; servers add
    the absorbed projections of latent attention, and pad experts in MXFP4.
    """
    total, head_rows = 0.0, 0.0
    padding = padded_vocab(facts, part.tp) / facts.vocab_size
    for tensor in tensors:
        size = float(tensor.num_elements * DTYPE_BYTES[dtype]) if tensor.is_float else float(tensor.num_bytes)
        found = _LAYER.search(tensor.name)
        if _DRAFT.search(tensor.name):
            continue
        if _TOWER.search(tensor.name):
            total += size / part.tp * part.has_embedding
        elif found:
            if int(found[1]) in part.layers:
                is_packed = _MXFP4.search(tensor.name) is not None
                total += size * _share(facts, tensor.name, part) * (mxfp4_padding if is_packed else 1.0)
        elif _POSITIONS.search(tensor.name):
            total += size * part.has_embedding
        elif _EMBEDDING.search(tensor.name):
            total += size * padding / part.tp * part.has_embedding
            head_rows = size * padding / part.tp if facts.tie_word_embeddings else 0.0
        elif _HEAD.search(tensor.name):
            total += size * padding / part.tp * part.has_head * (not facts.tie_word_embeddings)
        elif part.has_head:
            total += size
    if part.has_head and not part.has_embedding:
        total += head_rows
    return round(total) + absorbed_elements(facts, part) * DTYPE_BYTES[dtype]


def _share(facts: ModelFacts, name: str, part: RankSlice) -> float:
    """How much of a layer's tensor one rank holds."""
    tp = part.tp
    if _COPIED.search(name):
        return 1.0
    if part.expert_parallel and _EXPERT.search(name):
        num_experts = max(layer.mlp.num_experts for layer in facts.layers)
        return rank_experts(num_experts, part) / max(num_experts, 1)
    return max(1 / tp, 1 / facts.num_kv_heads) if _KEY_VALUE.search(name) else 1 / tp
