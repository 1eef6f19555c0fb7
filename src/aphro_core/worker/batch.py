"""StepPlan to tensors on a CPU: the rows of a step in the order that attention wants, and their places in the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aphro_core.layers.batch import Batch
from aphro_core.messages.steps import ScheduledSequence, StepPlan
from aphro_core.models.spec import DecoderSpec
from aphro_core.parallel.shard import RankShard
from aphro_core.worker.gathered_rows import GatheredRowsBuilder
from aphro_core.worker.sequences import SequenceState
from aphro_core.worker.span import Span


class BatchBuilder:
    """Makes batches for one rank."""

    def __init__(
        self,
        spec: DecoderSpec,
        shard: RankShard,
        block_size: int,
        dtype: torch.dtype,
        *,
        is_deterministic: bool = False,
    ) -> None:
        self._rows = GatheredRowsBuilder(
            num_heads=len(shard.heads),
            num_kv_heads=len(shard.kv_heads),
            head_dim=spec.head_dim,
            block_size=block_size,
            windows={spec.window_of(layer) for layer in shard.layers},
            dtype=dtype,
            is_deterministic=is_deterministic,
        )

    def build(self, plan: StepPlan, sequences: dict[int, SequenceState]) -> Batch:
        """The rows of a plan that was applied to ``sequences``: a chunk of one token is a decode row like any other."""
        decode = sorted((entry for entry in plan.scheduled if entry.num_tokens == 1), key=_start_of)
        chunks = sorted((entry for entry in plan.scheduled if entry.num_tokens > 1), key=_stop_of)
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
            token_ids=torch.tensor(token_ids, dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int64),
            cache_rows=self._rows.build(_spans(decode, sequences), _spans(chunks, sequences)),
            first_rows=first_rows,
            sampled_rows=torch.tensor(sampled, dtype=torch.int64),
        )


def _start_of(entry: ScheduledSequence) -> int:
    return entry.start


def _stop_of(entry: ScheduledSequence) -> int:
    return entry.start + entry.num_tokens


def _spans(entries: Sequence[ScheduledSequence], sequences: dict[int, SequenceState]) -> list[Span]:
    return [Span(e.start, e.start + e.num_tokens, sequences[e.seq_id].block_table) for e in entries]
