"""The paged cache of one rank: K and V of each local layer."""

from __future__ import annotations

import torch
from torch import Tensor

from aphro_core.models.spec import DecoderSpec
from aphro_core.parallel.shard import RankShard


def allocate_kv_cache(
    shard: RankShard, spec: DecoderSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """``[num_blocks, num_kv_heads, block_size, head_dim]`` twice a layer. On a CPU pages are taken when first written.

    Zeros on a GPU: masked keys are multiplied by 0, and 0 * NaN of stale memory would be NaN.
    """
    shape = (num_blocks, len(shard.kv_heads), block_size, spec.head_dim)

    def allocate() -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return [(allocate(), allocate()) for _ in shard.layers]
