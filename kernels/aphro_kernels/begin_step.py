"""The first launch of a step with rows of one token: their numbers, the plan of their attention, and what a decoder
makes of a row before its layers: its token's embedding and the angles of its position.

Each is a few hundred bytes, and a launch of its own would take as long as all of them.
"""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from aphro_kernels import decode_work
from aphro_kernels.decode_work import DecodeWork, places_of, programs_of, share_out
from aphro_kernels.language import chain_options, jit, make_seen, next_power_of_2, runs_kernels, tl
from aphro_kernels.rotary_angles import rotary_angles_reference
from aphro_kernels.step_rows import ROW_FIELDS, StepRows, begin_row, step_rows_reference

_BLOCKS_AT_ONCE: Final = 256
_COLUMNS_AT_ONCE: Final = 1024


@dataclass(frozen=True, slots=True)
class RowStart:
    """Of a decoder that begins with these and nothing else."""

    embedding: Tensor  # [vocab_size, hidden_size]
    frequencies: Tensor  # [half] float32, of all its layers
    scale: float  # of cos and sin


@dataclass(frozen=True, slots=True)
class BegunRows:
    x: Tensor  # [rows, hidden_size]
    cos: Tensor  # [rows, half] float32
    sin: Tensor


def begin_step(
    rows: Tensor,
    last_token_ids: Tensor,
    block_tables: Tensor,
    *,
    block_size: int,
    out: StepRows,
    work: DecodeWork | None = None,
    num_kv_heads: int = 1,
    start: RowStart | None = None,
) -> tuple[StepRows, BegunRows | None]:
    """``rows`` [n, ROW_FIELDS] int64 to the first ``n`` rows of ``out``; notes begun blocks in ``block_tables``; shares
    out the attention of ``work`` as :func:`aphro_kernels.decode_work.plan_decode_` does; the rows behind ``start``.

    Fit for CUDA graphs.
    """
    begun = None if start is None else new_rows(len(rows), start)
    if runs_kernels(rows):
        launch(rows, last_token_ids, block_tables, block_size, out, work, num_kv_heads, start, begun)
        return out.first(len(rows)), begun
    assert work is None, "plans are for kernels"
    made = step_rows_reference(rows, last_token_ids, block_tables, block_size=block_size, out=out)
    if start is not None and begun is not None:
        begin_rows_reference(made, start, begun)
    return made, begun


def new_rows(num_rows: int, start: RowStart) -> BegunRows:
    cos, sin = start.frequencies.new_empty(2, num_rows, len(start.frequencies))
    return BegunRows(start.embedding.new_empty(num_rows, start.embedding.shape[1]), cos, sin)


def begin_rows_reference(rows: StepRows, start: RowStart, begun: BegunRows) -> None:
    torch.index_select(start.embedding, 0, rows.token_ids, out=begun.x)
    cos, sin = rotary_angles_reference(rows.positions, start.frequencies, start.scale)
    begun.cos.copy_(cos)
    begun.sin.copy_(sin)


def launch(
    rows: Tensor,
    last_token_ids: Tensor,
    block_tables: Tensor,
    block_size: int,
    out: StepRows,
    work: DecodeWork | None,
    num_kv_heads: int,
    start: RowStart | None,
    begun: BegunRows | None,
) -> None:
    num_rows = len(rows)
    assert rows.is_contiguous()
    assert rows.shape[1] == ROW_FIELDS
    assert block_tables.stride() == out.block_tables.stride()
    assert work is None or num_rows * num_kv_heads <= work.arrivals.shape[0], "more rows than buffers were built for"
    num_programs = 0 if work is None else programs_of(work, num_rows)
    num_plans = -(-num_programs // decode_work.AT_ONCE)
    if not num_rows:
        return
    width, half = (0, 0) if start is None else (start.embedding.shape[1], len(start.frequencies))
    _begin_step_kernel[(num_plans + num_rows,)](
        rows,
        last_token_ids,
        block_tables,
        out.token_ids,
        out.positions,
        out.slot_mapping,
        out.seq_lens,
        out.block_tables,
        None if start is None else start.embedding,
        None if begun is None else begun.x,
        None if start is None else start.frequencies,
        None if begun is None else begun.cos,
        None if begun is None else begun.sin,
        None if work is None else work.stretches,
        None if work is None else work.totals,
        num_rows,
        num_plans,
        block_tables.stride(0),
        1.0 if start is None else start.scale,
        num_programs,
        BLOCK_SIZE=block_size,
        BLOCKS=_BLOCKS_AT_ONCE,
        WIDTH=width,
        COLUMNS=min(next_power_of_2(max(width, 1)), _COLUMNS_AT_ONCE),
        HALF=half,
        DIMS=next_power_of_2(max(half, 1)),
        NUM_KV_HEADS=num_kv_heads,
        KEYS=1 if work is None else work.keys,
        WINDOW=0 if work is None else work.window,
        ROWS=places_of(num_rows),
        AT_ONCE=decode_work.AT_ONCE,
        FIELDS=decode_work.FIELDS,
        CHAINED=chain_options(rows)["CHAINED"],
        num_warps=4,  # not chained: attention and rotation read what it writes before they wait for others
    )


@jit(do_not_specialize=["num_rows", "num_plans", "table_stride", "scale", "num_programs"])
def _begin_step_kernel(
    rows: tl.tensor,
    last_token_ids: tl.tensor,
    block_tables: tl.tensor,
    token_ids: tl.tensor,
    positions: tl.tensor,
    slot_mapping: tl.tensor,
    seq_lens: tl.tensor,
    row_tables: tl.tensor,
    embedding: tl.tensor | None,
    x: tl.tensor | None,
    frequencies: tl.tensor | None,
    cos: tl.tensor | None,
    sin: tl.tensor | None,
    stretches: tl.tensor | None,
    totals: tl.tensor,
    num_rows: tl.tensor,
    num_plans: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    num_programs: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALF: tl.constexpr,
    DIMS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    FIELDS: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    if program < num_plans:
        if stretches is not None:
            all_rows = tl.arange(0, ROWS)
            their = rows + all_rows * 7
            last = tl.load(their + 1, mask=all_rows < num_rows, other=-1)  # the position that each of them reads
            seq_len = (tl.maximum(last, -2) + 1).to(tl.int32)
            share_out(
                program, seq_len, stretches, totals, num_rows, num_programs,
                NUM_KV_HEADS, KEYS, WINDOW, ROWS, AT_ONCE, FIELDS,
            )  # fmt: skip
            if program == 0:
                news = tl.load(their + 5, mask=all_rows < num_rows, other=0)
                tl.store(totals + 2, tl.max((news != 0).to(tl.int32), axis=0))
    else:
        row = (program - num_plans).to(tl.int64)
        token, position = begin_row(
            rows, row, last_token_ids, block_tables, token_ids, positions, slot_mapping, seq_lens, row_tables,
            table_stride, BLOCK_SIZE, BLOCKS,
        )  # fmt: skip
        if embedding is not None:
            dims = tl.arange(0, DIMS)
            frequency = tl.load(frequencies + dims, mask=dims < HALF, other=0.0)
            angles = tl.maximum(position, 0).to(tl.float32) * frequency
            tl.store(cos + row * HALF + dims, tl.cos(angles) * scale, mask=dims < HALF)
            tl.store(sin + row * HALF + dims, tl.sin(angles) * scale, mask=dims < HALF)
            for start in tl.static_range(0, WIDTH, COLUMNS):
                columns = start + tl.arange(0, COLUMNS)
                values = tl.load(embedding + tl.maximum(token, 0) * WIDTH + columns, mask=columns < WIDTH, other=0.0)
                tl.store(x + row * WIDTH + columns, values, mask=columns < WIDTH)
    make_seen(CHAINED)
