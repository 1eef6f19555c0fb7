"""StepPlan to tensors: what a rank keeps of each sequence, and the rows of a step in the order that attention wants."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from aphro_kernels.decode_work import build_decode_work

from aphro_core.layers.batch import Batch
from aphro_core.messages.steps import ScheduledSequence, StepPlan
from aphro_core.models.spec import DecoderSpec
from aphro_core.parallel.shard import RankShard
from aphro_core.worker.gathered_rows import GatheredRowsBuilder
from aphro_core.worker.paged_rows import PagedRowsBuilder
from aphro_core.worker.sampler import SamplingRow
from aphro_core.worker.span import Span

_MAX_DECODE_ROWS: Final = 4096  # of one step: a counter for each and its KV heads


@dataclass(slots=True)
class SequenceState:
    """A sequence as a rank knows it. ``row.token_ids`` is the prompt and every output token it was told of."""

    row: SamplingRow
    block_table: array[int] = field(default_factory=lambda: array("q"))


class BatchBuilder:
    """Makes batches for one rank: gathered rows on a CPU, block tables for the kernels on a GPU."""

    def __init__(
        self, spec: DecoderSpec, shard: RankShard, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._device = device
        self._rows: GatheredRowsBuilder | PagedRowsBuilder
        if device.type == "cpu":
            self._rows = GatheredRowsBuilder(
                num_heads=len(shard.heads),
                num_kv_heads=len(shard.kv_heads),
                head_dim=spec.head_dim,
                block_size=block_size,
                windows={spec.window_of(layer) for layer in shard.layers},
                dtype=dtype,
            )
        else:
            heads = {"num_heads": len(shard.heads), "num_kv_heads": len(shard.kv_heads), "head_dim": spec.head_dim}
            works = {
                window: build_decode_work(_MAX_DECODE_ROWS, **heads, dtype=dtype, device=device, window=window)
                for window in {spec.window_of(layer) for layer in shard.layers}
            }
            self._rows = PagedRowsBuilder(block_size, device, len(shard.kv_heads), works)

    def build(self, plan: StepPlan, sequences: dict[int, SequenceState]) -> Batch:
        """The rows of a plan that was applied to ``sequences``: a chunk of one token is a decode row like any other."""
        decode = sorted((entry for entry in plan.scheduled if entry.num_tokens == 1), key=_start_of)
        chunks = [entry for entry in plan.scheduled if entry.num_tokens > 1]
        token_ids: list[int] = []
        positions: list[int] = []
        first_rows: dict[int, int] = {}
        for entry in (*decode, *chunks):
            first_rows[entry.seq_id] = len(token_ids)
            stop = entry.start + entry.num_tokens
            token_ids += sequences[entry.seq_id].row.token_ids[entry.start : stop]
            positions += range(entry.start, stop)
        sampled = [first_rows[entry.seq_id] + entry.num_tokens - 1 for entry in plan.scheduled if entry.samples]
        return Batch(
            token_ids=torch.tensor(token_ids, dtype=torch.int64, device=self._device),
            positions=torch.tensor(positions, dtype=torch.int64, device=self._device),
            cache_rows=self._rows.build(_spans(decode, sequences), _spans(chunks, sequences)),
            first_rows=first_rows,
            sampled_rows=torch.tensor(sampled, dtype=torch.int64, device=self._device),
        )


def _start_of(entry: ScheduledSequence) -> int:
    return entry.start


def _spans(entries: Sequence[ScheduledSequence], sequences: dict[int, SequenceState]) -> list[Span]:
    return [Span(e.start, e.start + e.num_tokens, sequences[e.seq_id].block_table) for e in entries]
