"""A step's rows for the kernels of a GPU: slots to write, block tables to read."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from aphro_kernels.decode_work import DecodeWork, plan_decode_
from torch import Tensor

from aphro_core.layers.batch import PagedPart, PagedRows
from aphro_core.worker.span import Span


class PagedRowsBuilder:
    def __init__(
        self, block_size: int, device: torch.device, num_kv_heads: int, works: Mapping[int | None, DecodeWork]
    ) -> None:
        """``works``: how decode attention is shared out, for each window among the layers."""
        self._block_size = block_size
        self._device = device
        self._num_kv_heads = num_kv_heads
        self._works = works

    def build(self, decode: Sequence[Span], chunks: Sequence[Span]) -> PagedRows:
        """Decode rows and chunks are a part each: the kernel has a way of its own for rows of one query."""
        size = self._block_size
        slots = [slot for span in (*decode, *chunks) for slot in span.slots(size, size)]
        parts = [self._part(spans) for spans in (decode, chunks) if spans]
        if decode:
            parts[0].works = self._works
            for work in self._works.values():
                plan_decode_(work, parts[0].seq_lens, self._num_kv_heads)
        if len(parts) == 2:
            parts[1].start, parts[1].stop = len(decode), len(slots)
        return PagedRows(torch.tensor(slots, dtype=torch.int64, device=self._device), parts)

    def _part(self, spans: Sequence[Span]) -> PagedPart:
        query_lens = [stop - start for start, stop, _ in spans]
        seq_lens = [stop for _, stop, _ in spans]
        num_blocks = -(-max(seq_lens) // self._block_size)
        tables = (blocks[:num_blocks] + array("q", [0]) * (num_blocks - len(blocks)) for _, _, blocks in spans)
        joined = torch.frombuffer(bytearray(b"".join(tables)), dtype=torch.int64)
        return PagedPart(
            start=0,
            stop=sum(query_lens),
            block_tables=joined.view(len(spans), num_blocks).to(self._device, torch.int32),
            seq_lens=self._int32(seq_lens),
            query_start_loc=self._int32([0, *accumulate(query_lens)]),
            max_query_len=max(query_lens),
            max_seq_len=max(seq_lens),
        )

    def _int32(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)
