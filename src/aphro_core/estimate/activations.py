"""The law of the activation peak: what a profiling run of T tokens and S samples allocates beside the weights."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Final

from aphro_core.estimate.balance import Sizes
from aphro_core.estimate.facts import MlpFacts, ModelFacts
from aphro_core.estimate.weights import DTYPE_BYTES

GIB: Final = 2**30
_LORA_HIDDEN: Final = 1.1  # [T, H] more with adapters: the wrapped layers keep what they were given
_EXPERT_CHUNK: Final = 32_768  # tokens that fused experts take at once
_TOWER_HIDDEN: Final = 7  # an encoder block's q, k, v, their rotated q and k, residual and norm
_SUMMANDS: Final = 8  # of the first AWQ kernel: as many as values in a packed word
_PATCHES_PER_TOKEN: Final = 4


@dataclass(frozen=True)
class Law:
    """The constants of one generation of servers.

    ``logits_copies``: float32 copies of the sampled rows' logits, and ``sampler_bytes`` beside them.
    ``hidden_copies``: [T, H] tensors that live at the forward's peak. ``keeps_expert_space``: experts' work space is
    kept, instead of being part of the forward. ``samples_beside_tower``: whether the peak that is printed for a model
    with an encoder has the sampler in it (from 0.17 on it has; before, the prints of such models lack it).
    ``reduced_copies``: [T, H] more with tp > 1, where all-reduces are out of place. ``spread``: rows of a tile, and how
    many an expert must have, on average, for each one's to stand in tiles of their own.
    """

    logits_copies: float
    sampler_bytes: int
    hidden_copies: float
    keeps_expert_space: bool
    samples_beside_tower: bool = True
    reduced_copies: float = 0.0
    spread: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """The sizes of one profiling run."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    tp: int
    pp: int
    dtype: str
    scheme: str | None = None  # of the quantisation
    has_lora: bool = False
    expert_parallel: bool = False
    unpacks_weights: bool = False  # a 4-bit matrix is written out in 16 bit before it is multiplied
    splits_k: bool = False  # a product is computed as eight summands over parts of K, kept until they are added

    @classmethod
    def of(cls, sizes: Sizes, scheme: str | None, *, unpacks_weights: bool = False, splits_k: bool = False) -> Run:
        return cls(
            sizes.max_num_batched_tokens,
            sizes.max_num_seqs,
            sizes.max_model_len,
            sizes.tp,
            sizes.pp,
            sizes.dtype,
            scheme,
            has_lora=sizes.max_loras > 0,
            expert_parallel=sizes.expert_parallel,
            unpacks_weights=unpacks_weights,
            splits_k=splits_k,
        )


@dataclass(frozen=True, slots=True)
class Peak:
    """The terms in bytes. Sampler, forward and encoder do not overlap; what is kept comes on top."""

    sampler: int
    forward: int
    encoder: int
    kept: int

    @property
    def total(self) -> int:
        return max(self.sampler, self.forward, self.encoder) + self.kept


def activation_peak(facts: ModelFacts, run: Run, law: Law, *, samples: bool) -> Peak:
    """The peak of one rank, in bytes: sampler F S V 4 + T H e; forward T e (3 I / tp + n H); kept.

    ``samples``: whether this rank draws tokens. The sampler's logits are float32 copies of logits in the model's data
    type, so half a copy more for a model in float32.
    """
    tokens, hidden, element = run.max_num_batched_tokens, facts.hidden_size, DTYPE_BYTES[run.dtype]
    rows = min(run.max_num_seqs, tokens)
    samples = samples and (law.samples_beside_tower or facts.tower is None)
    copies = law.logits_copies + (0.5 if element == 4 else 0.0)
    sampler = copies * rows * facts.vocab_size * 4 + law.sampler_bytes + tokens * hidden * element if samples else 0
    mlps = {layer.mlp for layer in facts.layers}
    forward = max(_forward(mlp, hidden, run, law, element) for mlp in mlps)
    kept = max(_expert_space(mlp, hidden, run, law, element) for mlp in mlps)
    kept += 2 * tokens * hidden * element if run.pp > 1 else 0
    encoder = 0.0
    if facts.tower is not None:
        encoder = _encoder(facts, run, element)
        kept += tokens * hidden * element + GIB // 10  # the embeddings that replace token ids, and the encoder's own
    return Peak(round(sampler), round(forward), round(encoder), round(kept))


def _forward(mlp: MlpFacts, hidden: int, run: Run, law: Law, element: int) -> float:
    """T e (3 I / tp + n H); dynamic 8-bit schemes hold the MLP's product once more, in 8 bit."""
    tokens = run.max_num_batched_tokens
    columns = ceil(mlp.intermediate_size / _expert_cut(mlp, run))
    width = mlp.num_matrices * columns
    quantised = columns if run.scheme in ("int8", "fp8", "fp8-block") else 0
    copies = law.hidden_copies + (_LORA_HIDDEN if run.has_lora else 0.0)
    copies += law.reduced_copies if run.tp > 1 else 0.0
    if not mlp.num_experts:
        unpacked = hidden * columns * element if run.unpacks_weights else 0
        summands = _SUMMANDS * tokens * (mlp.num_matrices - 1) * columns * element if run.splits_k else 0
        return tokens * (element * (width + copies * hidden) + quantised) + unpacked + summands
    shared = 3 * ceil(mlp.shared_size / run.tp)
    if law.keeps_expert_space and run.scheme != "mxfp4":
        return tokens * element * (shared + law.hidden_copies * hidden)
    slots = min(tokens, _EXPERT_CHUNK) * mlp.experts_per_token
    if law.spread is not None and slots >= law.spread[1] * mlp.num_experts:
        slots += law.spread[0] * ceil(
            mlp.num_experts * _expert_cut(mlp, run) / run.tp
        )  # an expert's last tile is padded
    return slots * (width + hidden) * element + 3 * tokens * hidden * element


def _expert_space(mlp: MlpFacts, hidden: int, run: Run, law: Law, element: int) -> float:
    """The two work buffers of fused experts: T k (max(2 I/tp, H) + max(I/tp, H)) e."""
    if not mlp.num_experts or not law.keeps_expert_space or run.scheme == "mxfp4":
        return 0.0
    columns = ceil(mlp.intermediate_size / _expert_cut(mlp, run))
    tokens = min(run.max_num_batched_tokens, _EXPERT_CHUNK)
    return tokens * mlp.experts_per_token * (max(2 * columns, hidden) + max(columns, hidden)) * element


def _expert_cut(mlp: MlpFacts, run: Run) -> int:
    """Into how many parts columns are cut: whole experts are not, though all of a step's tokens come to each rank."""
    return 1 if run.expert_parallel and mlp.num_experts else run.tp


def _encoder(facts: ModelFacts, run: Run, element: int) -> float:
    """An encoder's block over the largest image that the model takes, and the embeddings that come of it."""
    tower = facts.tower
    assert tower is not None
    tokens = tower.max_tokens  # however short requests may be
    width = (tower.num_matrices * tower.columns / run.tp) + _TOWER_HIDDEN * tower.width
    return tokens * element * (_PATCHES_PER_TOKEN * width + facts.hidden_size)
