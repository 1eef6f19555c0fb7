"""A decode step's inputs from what a rank keeps of each row, made and advanced on the device: one kernel.

State, one entry a row, kept by the worker for as long as the row lives and never reallocated (graphs keep pointers):

- ``next_token_ids`` [max_rows] int64: the token that the next step reads; the sampler writes it.
- ``next_positions`` [max_rows] int64: its position in the sequence; negative marks a row without a sequence.
- ``block_tables`` [max_rows, max_blocks] int32: the host appends a block before the step that first writes into it.

A step over the first ``n`` rows takes its inputs from the answer and leaves every position one higher, so that the
same graph may be replayed again without the host. The host changes rows (a sequence that comes, leaves or moves)
between replays, on the same stream. Rows without a sequence read token 0 at position 0, have no slot and no key.
"""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aphro_kernels.language import jit, runs_kernels, tl


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """What a step over ``n`` rows reads, ``[n]`` each."""

    token_ids: Tensor  # int64
    positions: Tensor  # int64, of token_ids
    slot_mapping: Tensor  # int64 = block * block_size + offset, -1 without a sequence
    seq_lens: Tensor  # int32, this step's token included, 0 without a sequence


def build_decode_inputs(max_rows: int, device: torch.device) -> DecodeInputs:
    """Buffers for steps of up to ``max_rows`` rows; a step of fewer writes and reads their first entries."""

    def buffer(dtype: torch.dtype) -> Tensor:
        return torch.zeros(max_rows, dtype=dtype, device=device)

    return DecodeInputs(buffer(torch.int64), buffer(torch.int64), buffer(torch.int64), buffer(torch.int32))


def decode_inputs_reference(
    next_token_ids: Tensor,
    next_positions: Tensor,
    block_tables: Tensor,
    *,
    num_rows: int,
    block_size: int,
    out: DecodeInputs,
) -> DecodeInputs:
    inputs = first_rows(out, num_rows)
    is_row = next_positions[:num_rows] >= 0
    positions = next_positions[:num_rows].clamp(min=0)
    blocks = block_tables[:num_rows].gather(1, (positions // block_size).unsqueeze(1)).squeeze(1).long()
    inputs.token_ids.copy_(torch.where(is_row, next_token_ids[:num_rows], 0))
    inputs.positions.copy_(positions)
    inputs.slot_mapping.copy_(torch.where(is_row, blocks * block_size + positions % block_size, -1))
    inputs.seq_lens.copy_(torch.where(is_row, positions + 1, 0))
    next_positions[:num_rows] += is_row
    return inputs


def decode_inputs(
    next_token_ids: Tensor,
    next_positions: Tensor,
    block_tables: Tensor,
    *,
    num_rows: int,
    block_size: int,
    out: DecodeInputs,
) -> DecodeInputs:
    """The inputs of the first ``num_rows`` rows, views of ``out``; adds 1 to ``next_positions`` of those in use.

    Shapes and dtypes in the head of this file. No allocation and no visit to the host: safe in a CUDA graph, whose
    ``num_rows`` is then fixed.
    """
    if not runs_kernels(next_token_ids):
        return decode_inputs_reference(
            next_token_ids, next_positions, block_tables, num_rows=num_rows, block_size=block_size, out=out
        )
    _launch(next_token_ids, next_positions, block_tables, num_rows, block_size, out)
    return first_rows(out, num_rows)


def first_rows(inputs: DecodeInputs, num_rows: int) -> DecodeInputs:
    return DecodeInputs(
        inputs.token_ids[:num_rows],
        inputs.positions[:num_rows],
        inputs.slot_mapping[:num_rows],
        inputs.seq_lens[:num_rows],
    )


def _launch(
    next_token_ids: Tensor,
    next_positions: Tensor,
    block_tables: Tensor,
    num_rows: int,
    block_size: int,
    out: DecodeInputs,
) -> None:
    assert block_tables.stride(1) == 1
    if num_rows:
        block = 32
        _decode_inputs_kernel[(-(-num_rows // block),)](
            next_token_ids,
            next_positions,
            block_tables,
            out.token_ids,
            out.positions,
            out.slot_mapping,
            out.seq_lens,
            num_rows,
            block_tables.stride(0),
            BLOCK_SIZE=block_size,
            BLOCK=block,
            num_warps=1,
        )


@jit(do_not_specialize=["num_rows", "table_stride"])
def _decode_inputs_kernel(
    next_token_ids: tl.tensor,
    next_positions: tl.tensor,
    block_tables: tl.tensor,
    token_ids: tl.tensor,
    positions: tl.tensor,
    slot_mapping: tl.tensor,
    seq_lens: tl.tensor,
    num_rows: tl.tensor,
    table_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_inside = rows < num_rows
    position = tl.load(next_positions + rows, mask=is_inside, other=-1)
    is_row = position >= 0
    token = tl.load(next_token_ids + rows, mask=is_row, other=0)
    at = rows.to(tl.int64) * table_stride + position // BLOCK_SIZE
    block = tl.load(block_tables + at, mask=is_row, other=0).to(tl.int64)
    tl.store(token_ids + rows, token, mask=is_inside)
    tl.store(positions + rows, tl.where(is_row, position, 0), mask=is_inside)
    tl.store(slot_mapping + rows, tl.where(is_row, block * BLOCK_SIZE + position % BLOCK_SIZE, -1), mask=is_inside)
    tl.store(seq_lens + rows, tl.where(is_row, position + 1, 0).to(tl.int32), mask=is_inside)
    tl.store(next_positions + rows, position + 1, mask=is_row)
