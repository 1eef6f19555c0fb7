"""What a CUDA graph holds of a step, from the numbers that were sent to the tokens that are told: all in fixed memory.

A step of rows of one token is whole in it. Of one with chunks the layers are: how many of its rows are drawn from is
known when it is launched, and a product with the head for as many as there may be would cost more than launches do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from aphro_kernels.peer_columns import PeerColumns
from torch import Tensor

from aphro_core.layers.decoder import Decoder
from aphro_core.models.spec import DecoderSpec
from aphro_core.parallel.shard import RankShard
from aphro_core.worker.cuda_graphs import CudaGraphs
from aphro_core.worker.device_sampler import DeviceSampler
from aphro_core.worker.shared_head import HeadOwner, SharedHead
from aphro_core.worker.step_memory import StepMemory
from aphro_core.worker.step_shapes import StepShape, StepShapes


class PaddedSteps:
    """``run`` a shape: a graph of it, once graphs are captured."""

    def __init__(
        self,
        spec: DecoderSpec,
        shard: RankShard,
        decoder: Decoder,
        caches: Sequence[Tensor],
        memory: StepMemory,
        shapes: StepShapes,
        *,
        dtype: torch.dtype,
        device: torch.device,
        place: PeerColumns | None = None,
        head: SharedHead | None = None,
    ) -> None:
        """``place``: where tp rank 0 gets logits, if that is told. ``head``: by which two stages make them together."""
        self.shapes, self.memory = shapes, memory
        self.has_head, self.samples = shard.has_head, shard.has_head and shard.tp_rank == 0
        self.has_embedding = shard.has_embedding
        self.keeps_draws = shard.has_head  # the last layer goes on with the rows that are drawn from
        self._is_alone = shard.tp_size == 1  # nobody else has to know the tokens
        self._decoder, self._caches, self._device = decoder, caches, device
        # the way in and out of the layers
        self.hidden = torch.zeros(shapes.max_tokens, spec.hidden_size, dtype=dtype, device=device)
        # whatever is done to logits is done in float32, else they stay as the product gives them
        logits_dtype = dtype if spec.has_plain_logits else torch.float32
        num_logits = memory.max_rows * self.samples
        self.head, self.peaks = head, None if place is None else place.peaks
        place = place if head is None else head.columns
        if place is None:
            self.logits = torch.zeros(num_logits, spec.vocab_size, dtype=logits_dtype, device=device)
        else:
            self.logits = place.rows[:num_logits]
        self.sampler = DeviceSampler(spec.vocab_size, memory.max_rows, device, place)
        self.run: Callable[[StepShape], None] = self.launch
        self._kinds: Sequence[int] | None = None  # of layers

    def launch(self, shape: StepShape) -> None:
        """Kernel by kernel, which gives what the graph gives. Of chunks, and on a stage without a head: ``hidden``."""
        hidden = self.hidden[: shape.num_tokens]
        batch = self.memory.padded_batch(shape)
        kept = batch.sampled_rows if shape.num_seqs and self.keeps_draws else None
        x = self._decoder(batch, None if self.has_embedding else hidden, self._caches, kept)
        if shape.num_seqs or not self.has_head:
            hidden[: len(x)].copy_(x)
            return
        logits, peaks = self.logits[: shape.num_tokens], self.peaks
        if isinstance(self.head, HeadOwner) and self.head.is_open:
            self.head.logits(self._decoder.normed(x))
            peaks = self.head.columns.peaks
        else:
            self._decoder.logits(x, out=logits)
        if self.samples:
            end = self.memory.end(len(logits)) if self._is_alone else None
            self.sampler.draw(logits, self.memory.positions(len(logits)), end, peaks=peaks)

    def launch_every_kind(self) -> None:
        """Enough shapes to launch every kernel that others do."""
        self.memory.clear()
        for shape in self.shapes.kinds:
            self.launch(shape)

    def rehearsing(self) -> AbstractContextManager[None]:
        """Inside the block few of the layers run, which launch every kernel that all of them do."""
        if self._kinds is None:
            self._kinds = self._decoder.kinds(self._caches)
        return self._decoder.running_only(self._kinds)

    def capture(self, on_progress: Callable[[int, int], None]) -> None:
        """From here on steps are replayed graphs."""
        self.memory.clear()
        self.run = CudaGraphs(self._rehearse, self.launch, self.shapes.padded, self._device, on_progress)

    def _rehearse(self, shape: StepShape) -> None:
        with self.rehearsing(), nullcontext() if self.head is None else self.head.closed():
            self.launch(shape)
        if self.head is not None and not shape.num_seqs:
            self.head.rehearse(shape.num_tokens)
