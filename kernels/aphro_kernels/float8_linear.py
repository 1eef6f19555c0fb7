"""Products of quantised weights with some rows on Hopper: rows split into float8 numbers, weights as they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import torch
from torch import Tensor

from aphro_kernels.float8_kernel import float8_kernel
from aphro_kernels.language import chain_options, next_power_of_2
from aphro_kernels.split_rows import GROUP, split_rows

# by the rows of x: fewer decode in registers, more share a dequantised copy
_ROWS: Final = {"fp8": range(9, 257), "int4": range(9, 129)}
_PROGRAMS: Final = {8: 264, 16: 264, 32: 264, 64: 132}  # by rows of a tile: those that fit the multiprocessors at once
_MANY_PROGRAMS: Final = 512


@dataclass(frozen=True, slots=True)
class Float8Config:
    rows: int  # of x in a tile: 8 to 64, of which each is two columns of the product
    columns: int  # outputs of a tile; of a gated layer half of them gate and half up
    splits: int  # stretches of the inputs
    num_warps: int
    num_stages: int = 4


def float8_config(kind: str, shape: tuple[int, int], x: Tensor, *, is_gated: bool) -> Float8Config | None:
    """For rows like ``x`` times a weight of this ``shape``, of "fp8" or in tiles (tile_linear.py), from measurements
    of Llama-3-8B's shapes on an H200 (docs/kernels.md); None: another kernel is faster, or this one not made for it."""
    n, k = shape
    num_rows = len(x)
    is_taken = num_rows in _ROWS.get(kind, ())
    if kind == "fp8" and is_gated:  # a wide one earns the split back sooner, where memory is fast for a single row
        is_taken |= 1 < num_rows <= 8 or (num_rows == 1 and x.is_cuda and _has_fast_memory(x.device.index))
    if not is_taken or k % GROUP or not is_split_exactly(x):
        return None
    rows = min(max(next_power_of_2(num_rows), 8), 64 if kind == "fp8" else 32)
    tiles = -(-n // 128) * -(-num_rows // rows)
    programs = _MANY_PROGRAMS if kind == "int4" and num_rows > rows else _PROGRAMS[rows]
    return Float8Config(rows, 128, max(min(programs // tiles, k // GROUP // 2, 16), 1), 8 if rows == 64 else 4)


def is_split_exactly(x: Tensor) -> bool:
    """Whether rows like these are two float8 numbers each, and the device has the tensor cores of float8_tiles.py."""
    return x.dtype == torch.bfloat16 and x.is_cuda and _is_hopper(x.device.index)


@cache
def _is_hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index)[0] == 9


@cache
def _has_fast_memory(index: int) -> bool:
    return "H200" in torch.cuda.get_device_name(index)


def launch_float8(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    kind: Literal["int4", "int8", "fp8"],
    group: int,
    config: Float8Config,
    parts: Tensor,
    arrivals: Tensor,
    is_gated: bool,
) -> None:
    """``out`` [rows, n] = x W^T (+ bias), or SiLU(gate) * up of codes with 2 n rows. ``group`` 0: a scale a row."""
    num_rows, k = x.shape
    n = out.shape[1]
    stripes = -(-n // (config.columns // 2 if is_gated else config.columns))
    tiles = stripes * -(-num_rows // config.rows)
    assert k % GROUP == 0
    assert group % GROUP == 0
    assert config.splits == 1 or tiles <= arrivals.numel()
    assert config.splits == 1 or tiles * config.splits * config.columns * config.rows <= parts.numel()
    split = split_rows(x)
    launch: Any = float8_kernel[(tiles * config.splits,)]
    launch(
        split.codes,
        split.scales,
        split.sums,
        codes,
        scales,
        x if bias is None else bias,
        out,
        parts,
        arrivals,
        num_rows,
        n,
        k,
        config.splits,
        ROWS=config.rows,
        BN=config.columns,
        STAGES=config.num_stages,
        IS_GATED=is_gated,
        HAS_BIAS=bias is not None,
        KIND=kind,
        GROUP=group,
        HAS_ASM=x.is_cuda,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **chain_options(x),
    )
