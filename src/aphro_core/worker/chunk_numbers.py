"""The numbers of a step with chunks in one block, which one copy sends: where each stands, for the host and the device.

Sections begin at multiples of 16 numbers: Triton compiles a kernel again for a pointer that is not one of 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

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
    draw_rows: Any  # [num_rows + num_seqs] and the two below: only the first of them count, one a draw; then zeros
    draw_slots: Any
    draw_positions: Any
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


def _lengths(shape: StepShape) -> tuple[int, ...]:
    tokens, seqs, draws = shape.num_tokens, shape.num_seqs, shape.num_rows + shape.num_seqs
    return tokens, tokens, tokens, seqs, draws, draws, draws, seqs + 1, seqs, 1


def _padded(length: int) -> int:
    return -(-length // _ALIGNED) * _ALIGNED
