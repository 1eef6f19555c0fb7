"""The numbers of a step with chunks in one block, which one copy sends: where each stands, for the host and the device.

Sections begin at multiples of 16 numbers: Triton compiles a kernel again for a pointer that is not one of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from aphro_kernels.step_rows import ANSWER, DRAW_SLOT, ROW_FIELDS
from torch import Tensor

from aphro_core.messages.steps import ScheduledSequence, StepPlan
from aphro_core.worker.sequences import SequenceState
from aphro_core.worker.step_shapes import StepShape

_ALIGNED: Final = 16
_FIRST_NARROW: Final = 7  # section that holds int32


@dataclass(slots=True)
class ChunkNumbers:
    """Views of a block of int64, an array of the host or a tensor. Rows of one token stand before the chunks."""

    token_ids: Any  # [num_tokens]
    positions: Any  # [num_tokens]
    slot_mapping: Any  # [num_tokens]
    slots: Any  # [num_seqs] of the sequences; of the first, which has the rows before the chunks and no key, none
    draw_rows: Any  # [num_rows + num_seqs], as below: only the first of them count, one a draw; then zeros
    draw_positions: Any
    draws: Any  # [(num_rows + num_seqs) * ROW_FIELDS], as step_rows.py has them: where each token goes
    query_start_loc: Any  # [num_seqs + 1] int32
    seq_lens: Any  # [num_seqs] int32
    num_seqs: Any  # [1] int32: how many there are


def chunk_block_size(shape: StepShape) -> int:
    """Numbers of the whole block."""
    return sum(map(_padded, _lengths(shape)))


def chunk_numbers(shape: StepShape, block: np.ndarray | Tensor) -> ChunkNumbers:
    """The sections of ``block`` [chunk_block_size or more] int64; those of int32 take half of their room."""
    narrow: Any = block.view(np.int32) if isinstance(block, np.ndarray) else block.view(torch.int32)
    found, at = [], 0
    for index, length in enumerate(_lengths(shape)):
        found.append(narrow[2 * at : 2 * at + length] if index >= _FIRST_NARROW else block[at : at + length])
        at += _padded(length)
    return ChunkNumbers(*found)


def fill_chunk_numbers(
    numbers: ChunkNumbers,
    plan: StepPlan,
    sequences: Mapping[int, SequenceState],
    slots: Mapping[int, int],
    block_size: int,
    place: int,
) -> dict[int, int]:
    """All that is not zero of a plan's numbers, arrays of the host; the first draw is answered at ``place``. Returns
    each sequence's first row."""
    chunks = [entry for entry in plan.scheduled if entry.num_tokens > 1]
    rows = [entry.seq_id for entry in plan.scheduled if entry.num_tokens == 1]
    first_rows = {seq_id: row for row, seq_id in enumerate(rows)}
    row = len(rows)
    for index, entry in enumerate(chunks):
        first_rows[entry.seq_id] = row
        numbers.query_start_loc[index + 1] = row
        row = _fill_chunk(numbers, row, entry, sequences[entry.seq_id], block_size)
    numbers.query_start_loc[len(chunks) + 1 :] = row
    numbers.slot_mapping[row:] = -1
    numbers.num_seqs[0] = len(chunks) + 1
    numbers.seq_lens[1 : len(chunks) + 1] = [entry.start + entry.num_tokens for entry in chunks]
    numbers.slots[1 : len(chunks) + 1] = [slots[entry.seq_id] for entry in chunks]
    draws = [entry for entry in plan.scheduled if entry.samples]
    numbers.draw_rows[: len(draws)] = [first_rows[entry.seq_id] + entry.num_tokens - 1 for entry in draws]
    fields = numbers.draws.reshape(-1, ROW_FIELDS)[: len(draws)]
    fields[:, DRAW_SLOT] = [slots[entry.seq_id] for entry in draws]
    fields[:, ANSWER] = np.arange(place, place + len(draws))
    numbers.draw_positions[: len(draws)] = [entry.start + entry.num_tokens - 1 for entry in draws]
    return first_rows


def _fill_chunk(
    numbers: ChunkNumbers, row: int, entry: ScheduledSequence, state: SequenceState, block_size: int
) -> int:
    """Into the rows from ``row`` on; the row behind them."""
    end, stop = row + entry.num_tokens, entry.start + entry.num_tokens
    at = np.arange(entry.start, stop)
    blocks = np.frombuffer(state.block_table, dtype=np.int64)  # an array that is looked at cannot grow
    numbers.token_ids[row:end] = state.row.token_ids[entry.start : stop]
    numbers.positions[row:end] = at
    numbers.slot_mapping[row:end] = blocks[at // block_size] * block_size + at % block_size
    return end


def _lengths(shape: StepShape) -> tuple[int, ...]:
    tokens, seqs, draws = shape.num_tokens, shape.num_seqs, shape.num_rows + shape.num_seqs
    return tokens, tokens, tokens, seqs, draws, draws, draws * ROW_FIELDS, seqs + 1, seqs, 1


def _padded(length: int) -> int:
    return -(-length // _ALIGNED) * _ALIGNED
