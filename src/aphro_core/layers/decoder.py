"""The one decoder: the layers of one rank's shard of a spec, from token ids or hidden states to hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from aphro_kernels.begin_step import RowStart
from torch import Tensor

from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.layers.alike import one_of_each
from aphro_core.layers.batch import Batch, GatheredRows, PagedRows
from aphro_core.layers.block import Delta
from aphro_core.layers.cache_format import CacheFormat
from aphro_core.layers.chained import chain_layers
from aphro_core.layers.linear import Linear
from aphro_core.layers.parts import Parts
from aphro_core.layers.rotary import RotaryEmbedding, Rotation
from aphro_core.models.spec import DecoderSpec, RopeSpec
from aphro_core.parallel.shard import RankShard
from aphro_core.quantization.matrix import Weights


class Decoder:
    """What one rank computes. ``weights_bytes`` is what its parameters take in memory, as they are kept."""

    def __init__(
        self,
        spec: DecoderSpec,
        shard: RankShard,
        weights: Weights,
        group: TensorParallelGroup,
        cache_format: CacheFormat | None = None,
        *,
        is_deterministic: bool = False,
        is_alone: bool = True,
    ) -> None:
        """Empties ``weights`` (ARCHITECTURE.md, "Weights of a rank"): a reordered one must not stay in memory twice.
        ``cache_format`` None: the weights' dtype. ``is_deterministic``: a row is the same bits in any step (CPU).
        ``is_alone``: no other kernels run beside a step's."""
        sample = next(weight for weight in weights.values() if isinstance(weight, Tensor))
        parts = Parts(spec, shard, weights, group, cache_format or CacheFormat(sample.dtype), is_deterministic)
        ropes = [spec.rope_of(layer) for layer in shard.layers]
        self._rotaries = [RotaryEmbedding(rope, sample.dtype, sample.device) for rope in _distinct(ropes)]
        self._rotary_of = [_distinct(ropes).index(rope) for rope in ropes]
        self._embedding = parts.embedding() if shard.has_embedding else None
        self._positions = parts.positions() if shard.has_embedding and spec.position_offset is not None else None
        self._embedding_scale = float(torch.tensor(spec.embedding_scale, dtype=sample.dtype))
        if shard.has_head:
            self._norm, self._head = parts.norm("norm"), parts.head()
        self._blocks = [parts.block(layer) for layer in shard.layers]
        self._places: Sequence[int] = range(len(self._blocks))
        self._group = group
        self._can_share_out = all(block.can_share_out for block in self._blocks)
        can_chain = sample.is_cuda and is_alone  # all programs of a chain must run at once
        self._chained = chain_layers([block.parts for block in self._blocks]) if can_chain else None
        self.weights_bytes = parts.num_bytes + (0 if self._chained is None else self._chained.workspace_bytes)
        assert not weights, f"no part of the decoder reads {sorted(weights)}"

    def __call__(
        self, batch: Batch, hidden_states: Tensor | None, caches: Sequence[Tensor], kept: Tensor | None = None
    ) -> Tensor:
        """The residual stream behind this stage's layers, ``[num_tokens, hidden_size]``, or of its rows ``kept``
        [any] int64: behind the last layer others than those that are drawn from are hardly ever asked for.

        ``hidden_states`` is what the stage before handed on (written in place), None on the first stage.
        """
        x = self.begin(batch, hidden_states)
        delta = self.run_blocks(x, self.rotations(batch, x.dtype), batch.cache_rows, caches, kept)
        x = x if kept is None else x[: len(kept)]
        return x if delta is None else x.add_(delta.whole())

    @property
    def row_start(self) -> RowStart | None:
        """What a kernel may make of a row before the layers; None where there is more to it."""
        weight = None if self._embedding is None else self._embedding.plain
        is_all = self._embedding_scale == 1.0 and self._positions is None and len(self._rotaries) == 1
        if weight is None or not weight.is_contiguous() or not is_all:
            return None
        (rotary,) = self._rotaries
        return RowStart(weight, rotary.frequencies, rotary.scale) if len(rotary.frequencies) else None

    def begin(self, batch: Batch, hidden_states: Tensor | None) -> Tensor:
        """What the first block of this stage reads."""
        if batch.begun is not None:
            return batch.begun.x
        if hidden_states is not None:
            return hidden_states
        assert self._embedding is not None, "only the first stage starts from token ids"
        x = self._embedding(batch.token_ids)
        if self._embedding_scale != 1.0:
            x = x * self._embedding_scale
        return x if self._positions is None else self._positions.add_(x, batch.positions)

    def rotations(self, batch: Batch, dtype: torch.dtype) -> list[Rotation]:
        """Of this step's rows, as many as the layers have kinds."""
        if batch.begun is not None:
            return [Rotation(batch.begun.cos, batch.begun.sin)]
        halves = isinstance(batch.cache_rows, PagedRows) or dtype == torch.bfloat16
        return [rotary.at(batch.positions, halves=halves) for rotary in self._rotaries]

    def run_blocks(
        self,
        x: Tensor,
        rotations: Sequence[Rotation],
        rows: GatheredRows | PagedRows,
        caches: Sequence[Tensor],
        kept: Tensor | None = None,
    ) -> Delta | None:
        """``x`` in place; what is still to be added to it. Of ``kept`` rows the last block makes the first ones."""
        if kept is None and self._chained is not None and isinstance(rows, PagedRows) and self._chained.takes(x, rows):
            self._chained(x, [rotations[rotary] for rotary in self._rotary_of], rows, caches, self._places)
            return None
        delta = None
        last = self._blocks[-1]
        shares_out = self._can_share_out and self._group.can_share_out(len(x))
        for place in self._places:
            block, rotation = self._blocks[place], rotations[self._rotary_of[place]]
            is_last = block is last  # which has the whole stream again, for those that it goes to
            among = shares_out and not is_last
            delta = block(x, delta, rotation, rows, caches[place], kept if is_last else None, shares_out=among)
        return delta

    def kinds(self, caches: Sequence[Tensor]) -> Sequence[int]:
        """Places of layers that launch every kernel that all of them launch; the same on all ranks of a stage, which
        call it together."""
        chains = [None] * len(self._blocks) if self._chained is None else self._chained.chains
        places = one_of_each(list(zip(self._blocks, self._rotary_of, chains, caches, strict=True)))
        return self._group.union(places, len(self._blocks), caches[0].device) if caches else places

    @contextmanager
    def running_only(self, places: Sequence[int]) -> Iterator[None]:
        """Inside the block other layers are left out, and what is computed is nothing."""
        self._places = places
        try:
            yield
        finally:
            self._places = range(len(self._blocks))

    def normed(self, rows: Tensor) -> Tensor:
        """Of chosen rows of the last stage's residual stream: what the head multiplies."""
        normed: Tensor = self._norm(rows)
        return normed

    @property
    def plain_head(self) -> Linear | None:
        """The product that makes logits of :meth:`normed` rows, where it is all that does."""
        return self._head.plain

    def logits(self, rows: Tensor, out: Tensor | None = None) -> Tensor | None:
        """Of chosen rows of the last stage's residual stream: ``[rows, vocab_size]`` float32, None off tp rank 0."""
        return self._head(self.normed(rows), out)


def _distinct(ropes: Sequence[RopeSpec]) -> list[RopeSpec]:
    return [rope for at, rope in enumerate(ropes) if rope not in ropes[:at]]
