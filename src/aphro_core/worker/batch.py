"""StepPlan to tensors: what a rank keeps of each sequence, and the indices that all layers of a step share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import torch
from torch import Tensor

from aphro_core.layers.batch import Batch, Chunk, DecodeGroup, GatheredRows, PagedPart, PagedRows
from aphro_core.messages.steps import ScheduledSequence, StepPlan
from aphro_core.worker.sampler import SamplingRow


@dataclass(slots=True)
class SequenceState:
    """A sequence as a rank knows it. ``row.token_ids`` is the prompt and every output token it was told of."""

    row: SamplingRow
    block_table: list[int] = field(default_factory=list)


Sequences = dict[int, SequenceState]


class BatchBuilder:
    """Makes batches for one rank's cache geometry: gathered rows on a CPU, block tables on a GPU."""

    def __init__(self, num_kv_heads: int, block_size: int, device: torch.device) -> None:
        self._planes = 2 * num_kv_heads  # K heads, then V heads
        self._block_size = block_size
        self._device = device
        self._plane_offsets = torch.arange(self._planes)

    def build(self, plan: StepPlan, sequences: Sequences) -> Batch:
        decode = sorted((entry for entry in plan.scheduled if entry.num_tokens == 1), key=lambda entry: entry.start)
        chunks = [entry for entry in plan.scheduled if entry.num_tokens > 1]
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        first_rows: dict[int, int] = {}
        for entry in (*decode, *chunks):
            state = sequences[entry.seq_id]
            stop = entry.start + entry.num_tokens
            first_rows[entry.seq_id] = len(token_ids)
            token_ids += state.row.token_ids[entry.start : stop]
            positions += range(entry.start, stop)
            slots += self._slots(state.block_table, entry.start, stop)
        is_cpu = self._device.type == "cpu"
        slot_mapping = torch.tensor(slots)
        return Batch(
            token_ids=torch.tensor(token_ids, device=self._device),
            positions=torch.tensor(positions, device=self._device),
            cache_rows=self._gathered(slot_mapping, decode, chunks, sequences)
            if is_cpu
            else PagedRows(slot_mapping.to(self._device), self._paged_parts(decode, chunks, sequences)),
            first_rows=first_rows,
            sampled_rows=[first_rows[e.seq_id] + e.num_tokens - 1 for e in plan.scheduled if e.samples],
        )

    def _slots(self, block_table: Sequence[int], start: int, stop: int) -> list[int]:
        size = self._block_size
        return [block_table[position // size] * size + position % size for position in range(start, stop)]

    # ---------------------------------------------------------------- CPU

    def _gathered(
        self,
        slot_mapping: Tensor,
        decode: list[ScheduledSequence],
        chunks: list[ScheduledSequence],
        sequences: Sequences,
    ) -> GatheredRows:
        size = self._block_size
        blocks, offsets = slot_mapping // size, slot_mapping % size
        slot_rows = (blocks[:, None] * self._planes + self._plane_offsets) * size + offsets[:, None]
        groups, row = [], 0
        for _, members in groupby(decode, key=lambda entry: (entry.start // size + 1).bit_length()):
            entries = list(members)
            num_blocks = entries[-1].start // size + 1
            lens = torch.tensor([entry.start + 1 for entry in entries])
            block_rows = self._block_rows(entries, num_blocks, sequences)
            groups.append(DecodeGroup(row, row + len(entries), block_rows, lens, num_blocks * size))
            row += len(entries)
        parts = []
        for entry in chunks:
            num_blocks = -(-(entry.start + entry.num_tokens) // size)
            block_rows = self._block_rows([entry], num_blocks, sequences)
            parts.append(Chunk(row, row + entry.num_tokens, entry.start, block_rows))
            row += entry.num_tokens
        return GatheredRows(slot_rows.flatten(), groups, parts)

    def _block_rows(self, entries: list[ScheduledSequence], num_blocks: int, sequences: Sequences) -> Tensor:
        """``[2, rows, num_kv_heads, num_blocks]`` flattened: all K, then all V; short tables are padded by block 0."""
        tables = torch.tensor(self._tables(entries, num_blocks, sequences))
        heads = self._plane_offsets.view(2, 1, -1, 1)
        return (tables[None, :, None, :] * self._planes + heads).flatten()

    # ---------------------------------------------------------------- GPU

    def _paged_parts(
        self, decode: list[ScheduledSequence], chunks: list[ScheduledSequence], sequences: Sequences
    ) -> list[PagedPart]:
        parts, row = [], 0
        for entries in (decode, chunks):
            if entries:
                parts.append(self._paged_part(row, entries, sequences))
                row = parts[-1].stop
        return parts

    def _paged_part(self, row: int, entries: list[ScheduledSequence], sequences: Sequences) -> PagedPart:
        lens = [entry.start + entry.num_tokens for entry in entries]
        starts = [0, *accumulate(entry.num_tokens for entry in entries)]
        num_blocks = -(-max(lens) // self._block_size)
        return PagedPart(
            start=row,
            stop=row + starts[-1],
            block_tables=self._int32(self._tables(entries, num_blocks, sequences)),
            seq_lens=self._int32(lens),
            query_start_loc=self._int32(starts),
            max_query_len=max(entry.num_tokens for entry in entries),
            max_seq_len=max(lens),
        )

    def _tables(self, entries: list[ScheduledSequence], num_blocks: int, sequences: Sequences) -> list[list[int]]:
        """The block tables, each cut or padded by block 0 to ``num_blocks``."""
        tables = [sequences[entry.seq_id].block_table[:num_blocks] for entry in entries]
        return [table + [0] * (num_blocks - len(table)) for table in tables]

    def _int32(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)
