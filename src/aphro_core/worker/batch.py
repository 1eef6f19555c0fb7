"""StepPlan to tensors: what a rank keeps of each sequence, and the index tensors that all layers of a step share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from aphro_core.layers.batch import Batch, Chunk, DecodeGroup
from aphro_core.messages.steps import ScheduledSequence, StepPlan
from aphro_core.worker.sampler import SamplingRow


@dataclass(slots=True)
class SequenceState:
    """A sequence as a rank knows it. ``row.token_ids`` is the prompt and every output token it was told of."""

    row: SamplingRow
    block_table: list[int] = field(default_factory=list)


class BatchBuilder:
    """Makes batches for one rank's cache geometry."""

    def __init__(self, num_kv_heads: int, block_size: int, device: torch.device) -> None:
        self._num_kv_heads = num_kv_heads
        self._block_size = block_size
        self._device = device
        self._heads = torch.arange(num_kv_heads, device=device)

    def build(self, plan: StepPlan, sequences: dict[int, SequenceState]) -> Batch:
        ordered = sorted(plan.scheduled, key=self._sort_key)
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        first_row: dict[int, int] = {}
        for entry in ordered:
            state = sequences[entry.seq_id]
            first_row[entry.seq_id] = len(token_ids)
            stop = entry.start + entry.num_tokens
            token_ids += state.row.token_ids[entry.start : stop]
            positions += range(entry.start, stop)
            slots += self._slots(state.block_table, entry.start, stop)
        is_decode = [entry for entry in ordered if entry.num_tokens == 1]
        return Batch(
            token_ids=torch.tensor(token_ids, device=self._device),
            positions=torch.tensor(positions, device=self._device),
            slot_rows=self._slot_rows(torch.tensor(slots, device=self._device)),
            decode=self._decode_groups(is_decode, sequences),
            chunks=self._chunks(ordered[len(is_decode) :], len(is_decode), sequences),
            first_rows=first_row,
            sampled_rows=[first_row[e.seq_id] + e.num_tokens - 1 for e in plan.scheduled if e.samples],
        )

    def _sort_key(self, entry: ScheduledSequence) -> tuple[bool, int]:
        return (entry.num_tokens > 1, entry.start if entry.num_tokens == 1 else 0)

    def _slots(self, block_table: Sequence[int], start: int, stop: int) -> Iterable[int]:
        size = self._block_size
        return (block_table[position // size] * size + position % size for position in range(start, stop))

    def _slot_rows(self, slots: Tensor) -> Tensor:
        """Token slots (block * block_size + offset) to one cache row for each KV head."""
        blocks, offsets = slots // self._block_size, slots % self._block_size
        rows = (blocks[:, None] * self._num_kv_heads + self._heads) * self._block_size + offsets[:, None]
        return rows.flatten()

    def _block_rows(self, tables: list[list[int]]) -> Tensor:
        """``[rows, kv_heads, blocks]`` flattened."""
        blocks = torch.tensor(tables, device=self._device)
        return (blocks[:, None, :] * self._num_kv_heads + self._heads[:, None]).flatten()

    def _decode_groups(
        self, entries: list[ScheduledSequence], sequences: dict[int, SequenceState]
    ) -> list[DecodeGroup]:
        groups, row = [], 0
        for _, members in groupby(entries, key=lambda entry: (entry.start // self._block_size + 1).bit_length()):
            rows = list(members)
            blocks = rows[-1].start // self._block_size + 1
            tables = [sequences[entry.seq_id].block_table[:blocks] for entry in rows]
            padded = [table + [0] * (blocks - len(table)) for table in tables]
            lens = torch.tensor([entry.start + 1 for entry in rows], device=self._device)
            groups.append(DecodeGroup(row, row + len(rows), self._block_rows(padded), lens, blocks * self._block_size))
            row += len(rows)
        return groups

    def _chunks(self, entries: list[ScheduledSequence], row: int, sequences: dict[int, SequenceState]) -> list[Chunk]:
        chunks = []
        for entry in entries:
            blocks = -(-(entry.start + entry.num_tokens) // self._block_size)
            table = sequences[entry.seq_id].block_table[:blocks]
            chunks.append(Chunk(row, row + entry.num_tokens, entry.start, self._block_rows([table])))
            row += entry.num_tokens
        return chunks
