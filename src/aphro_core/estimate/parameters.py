"""How many parameters of each precision a rank holds, counted from the model's facts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from typing import Final, Literal

from aphro_core.estimate.facts import AttentionFacts, LayerFacts, MlpFacts, ModelFacts
from aphro_core.parallel.shard import split_heads

VOCAB_UNIT: Final = 64  # rows that a vocabulary is rounded up to
_TOWER_PARTS: Final = 100  # matrices that a tower consists of, for the allocator; they are small


@dataclass(frozen=True, slots=True)
class RankSlice:
    """Which part of a model one rank holds, before any matrix is cut."""

    layers: range
    tp_rank: int
    tp: int
    has_embedding: bool
    has_head: bool
    expert_parallel: bool = False  # tp ranks hold whole experts instead of columns of each


Precision = Literal["linear", "experts", "kept"]  # what a quantisation scheme does with it; kept stays in 16 bit


@dataclass(frozen=True, slots=True)
class Matrix:
    """One parameter of a rank as it is allocated (q, k and v are one matrix), ``count`` times."""

    elements: int
    precision: Precision
    count: int = 1


@cache
def rank_heads(num_heads: int, num_kv_heads: int, tp: int, tp_rank: int) -> tuple[int, int]:
    """(query heads, KV heads) of a rank, by the sharding plan's rule. Raises PlacementError for too many ranks."""
    if num_kv_heads == 0:
        return ceil(num_heads / tp), 0
    heads, kv_heads = split_heads(num_heads, num_kv_heads, tp)[tp_rank]
    return len(heads), len(kv_heads)


def rank_columns(columns: int, tp: int) -> int:
    """The largest share of a dimension that is cut evenly."""
    return ceil(columns / tp)


def rank_experts(num_experts: int, part: RankSlice) -> int:
    """How many of a layer's experts a rank holds: all, cut by columns, or its share of whole ones."""
    if not part.expert_parallel:
        return num_experts
    each, rest = divmod(num_experts, part.tp)
    return each + (part.tp_rank < rest)


def padded_vocab(facts: ModelFacts, tp: int) -> int:
    """Rows of the vocabulary in all ranks together."""
    rows = ceil(facts.vocab_size / VOCAB_UNIT) * VOCAB_UNIT
    return ceil(rows / tp) * tp


def rank_matrices(facts: ModelFacts, part: RankSlice) -> list[Matrix]:
    """All parameters of a rank. Towers are cut as evenly as the decoder and sit on the first stage."""
    layers = Counter(facts.layers[part.layers.start : part.layers.stop])
    matrices = [
        replace(matrix, count=matrix.count * times)
        for layer, times in layers.items()
        for matrix in _layer(facts, layer, part)
    ]
    width = facts.embedding_size or facts.hidden_size
    vocab = Matrix(padded_vocab(facts, part.tp) // part.tp * width, "kept")
    if width != facts.hidden_size:  # projections between the two
        matrices.append(Matrix(width * facts.hidden_size, "kept", part.has_embedding + part.has_head))
    if part.has_embedding:
        matrices += [vocab, Matrix(facts.learned_positions * facts.hidden_size, "kept")]
        if facts.layer_input_size:
            width = facts.layer_input_size * facts.num_layers
            rows = padded_vocab(facts, part.tp) // part.tp
            matrices += [Matrix(rows * width, "kept"), Matrix(facts.hidden_size * width, "kept")]
        if facts.tower is not None:
            matrices.append(Matrix(facts.tower.parameters // part.tp // _TOWER_PARTS, "kept", _TOWER_PARTS))
    if part.has_head:
        matrices.append(Matrix(facts.hidden_size, "kept"))
        if not (facts.tie_word_embeddings and part.has_embedding):
            matrices.append(vocab)
    return matrices


def _layer(facts: ModelFacts, layer: LayerFacts, part: RankSlice) -> list[Matrix]:
    norms = facts.norms_per_layer * facts.hidden_size + layer.attention.qk_norm_size
    kept = layer.left_alone
    own = [Matrix(facts.hidden_size * facts.layer_input_size, "linear", 2)] if facts.layer_input_size else []
    attention = _attention(facts, layer.attention, part)
    if "attention" in kept:
        attention = [replace(matrix, precision="kept") for matrix in attention]
    mlp = [
        replace(matrix, precision="kept") if _part_of(layer.mlp, matrix) in kept else matrix
        for matrix in _mlp(facts, layer.mlp, part)
    ]
    return [*attention, *mlp, *own, Matrix(norms, "kept")]


def _part_of(mlp: MlpFacts, matrix: Matrix) -> str:
    """Which part of a layer, as left_alone names them, a matrix of its MLP is."""
    if matrix.precision == "experts":
        return "experts"
    return "shared" if mlp.num_experts else "mlp"


def _attention(facts: ModelFacts, attention: AttentionFacts, part: RankSlice) -> list[Matrix]:
    hidden = facts.hidden_size
    if attention.kind == "none":
        return []
    if attention.state is not None:
        return [Matrix(attention.state.parameters // part.tp, "linear")]
    if attention.latent is not None:
        return _latent(facts, attention, part.tp)
    heads, kv_heads = rank_heads(attention.num_heads, attention.num_kv_heads, part.tp, part.tp_rank)
    query = heads * attention.head_dim * (2 if attention.has_gate else 1)
    key_value = kv_heads * (attention.head_dim + attention.v_head_dim * attention.has_value)
    bias = (query + key_value) * attention.has_bias + hidden * attention.has_output_bias
    return [
        Matrix(hidden * (query + key_value), "linear"),
        Matrix(hidden * heads * attention.v_head_dim, "linear"),
        Matrix(bias, "kept"),
    ]


def _latent(facts: ModelFacts, attention: AttentionFacts, tp: int) -> list[Matrix]:
    """Up-projections by head, down-projections copied; servers keep the absorbed kv_b once more, in 16 bit."""
    latent = attention.latent
    assert latent is not None
    hidden, heads = facts.hidden_size, ceil(attention.num_heads / tp)
    width = heads * (latent.nope_dim + latent.rope_dim)
    queries = [hidden * width] if latent.q_rank is None else [hidden * latent.q_rank, latent.q_rank * width]
    up = latent.kv_rank * heads * (latent.nope_dim + latent.v_dim)
    down = hidden * (latent.kv_rank + latent.rope_dim)
    linear = [*queries, down, up, heads * latent.v_dim * hidden]
    return [*(Matrix(elements, "linear") for elements in linear), Matrix(up, "kept"), Matrix(latent.kv_rank, "kept")]


def _mlp(facts: ModelFacts, mlp: MlpFacts, part: RankSlice) -> list[Matrix]:
    tp = 1 if part.expert_parallel and mlp.num_experts else part.tp
    hidden, columns = facts.hidden_size, rank_columns(mlp.intermediate_size, tp)
    inputs = mlp.num_matrices - 1  # gate and up are one matrix
    if not mlp.num_experts:
        bias = (columns * inputs + hidden) * mlp.has_bias
        return [
            Matrix(inputs * hidden * columns, "linear"),
            Matrix(hidden * columns, "linear"),
            Matrix(bias, "kept"),
        ]
    shared, experts = rank_columns(mlp.shared_size, part.tp), rank_experts(mlp.num_experts, part)
    return [
        Matrix(experts * inputs * hidden * columns, "experts"),
        Matrix(experts * hidden * columns, "experts"),
        Matrix(hidden * mlp.num_experts, "kept"),
        Matrix(experts * (2 * columns + hidden) * mlp.has_bias, "kept"),
        Matrix(2 * hidden * shared, "linear"),
        Matrix(hidden * shared, "linear"),
    ]


def absorbed_elements(facts: ModelFacts, part: RankSlice) -> int:
    """Of the copies of kv_b that servers of latent attention make: in no file, but in memory."""
    total = 0
    for layer in facts.layers[part.layers.start : part.layers.stop]:
        latent = layer.attention.latent
        if latent is not None:
            heads = ceil(layer.attention.num_heads / part.tp)
            total += latent.kv_rank * heads * (latent.nope_dim + latent.v_dim)
    return total


def lora_elements(facts: ModelFacts, part: RankSlice) -> int:
    """Sum of (inputs + outputs) over the matrices that LoRA wraps on a rank, the head included: times rank and
    adapters it is the size of the buffers. Of a matrix cut by columns the inputs are whole, by rows the outputs."""
    hidden, total = facts.hidden_size, 0
    for layer, times in Counter(facts.layers[part.layers.start : part.layers.stop]).items():
        attention, mlp = layer.attention, layer.mlp
        heads, kv_heads = rank_heads(attention.num_heads, attention.num_kv_heads, part.tp, part.tp_rank)
        query, kv = heads * attention.head_dim, kv_heads * attention.head_dim
        columns = rank_columns(mlp.intermediate_size if not mlp.num_experts else mlp.shared_size, part.tp)
        total += times * (2 * (hidden + query) + 2 * (hidden + kv) + 3 * (hidden + columns))
    if part.has_head:
        total += hidden + facts.vocab_size
    return total
