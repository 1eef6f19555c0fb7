"""One rank's balance in bytes, and the answer for a whole group: the types that every engine's arithmetic ends in."""

from __future__ import annotations

from dataclasses import dataclass, replace

from aphro_core.estimate.kv_layout import KvLayout


@dataclass(frozen=True, slots=True)
class RankBalance:
    """``budget`` is total x utilisation; ``after_sizing`` comes on top of it once the cache is allocated (graphs)."""

    rank: int
    stage: int
    tp_rank: int
    layers: range
    num_heads: int
    num_kv_heads: int
    budget_bytes: int
    weights_bytes: int
    activation_bytes: int
    overhead_bytes: int
    layout: KvLayout
    after_sizing_bytes: int = 0

    def at(self, *, rank: int, stage: int, tp_rank: int, layers: range) -> RankBalance:
        """The same balance of another rank: in a large group few differ."""
        return replace(self, rank=rank, stage=stage, tp_rank=tp_rank, layers=layers)

    @property
    def left_bytes(self) -> int:
        """For the cache; negative when the weights alone are too much."""
        return self.budget_bytes - self.weights_bytes - self.activation_bytes - self.overhead_bytes

    @property
    def num_blocks(self) -> int:
        return max(self.left_bytes // self.layout.block_bytes, 0)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What decides besides the model: after the engine's defaults are filled in. Lengths in tokens."""

    tp: int
    pp: int
    pp_layers: tuple[int, ...] | None
    dtype: str
    cache_bytes: int  # of one element
    block_size: int
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    utilization: float
    enforce_eager: bool
    expert_parallel: bool = False
    max_loras: int = 0
    max_lora_rank: int = 16
    prefix_caching: bool | None = None
    draft_layers: int = 0
    draft_tokens: int = 0  # speculated a step: states kept besides, in linear attention
