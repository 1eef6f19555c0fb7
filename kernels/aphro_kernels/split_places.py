"""Rows at the places of their experts, split into float8 numbers on the way (split_rows.py)."""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aphro_kernels.expert_rows import spread_rows_reference
from aphro_kernels.float8 import FLOAT8
from aphro_kernels.language import chain_options, jit, next_power_of_2, start_in_chain, tl
from aphro_kernels.row_tiles import RowTiles
from aphro_kernels.silu_and_mul import silu_and_mul_reference
from aphro_kernels.split_rows import split, split_rows_reference


def split_places_reference(x: Tensor, tiles: RowTiles, *, is_gated: bool) -> tuple[Tensor, Tensor]:
    found = split_rows_reference(silu_and_mul_reference(x) if is_gated else spread_rows_reference(x, tiles))
    return found.codes, found.scales


def split_places(x: Tensor, tiles: RowTiles, *, is_gated: bool) -> tuple[Tensor, Tensor]:
    """Codes [2, capacity, k] and scales [capacity] of ``x`` [num_tokens, k], each row at the places of its slots;
    ``is_gated``: of SiLU(gate) * up of ``x`` [capacity, 2 * k], whose rows are there. Padding is not written."""
    (num_tokens, top), capacity = tiles.places.shape, len(tiles.slots)
    k = x.shape[1] // (1 + is_gated)
    assert x.stride(1) == 1
    codes = torch.empty(2, capacity, k, dtype=FLOAT8, device=x.device)
    scales = torch.empty(capacity, dtype=torch.float32, device=x.device)
    launch: Any = _split_places_kernel[(num_tokens * top if is_gated else num_tokens,)]
    launch(
        x,
        tiles.places,
        codes.view(torch.uint8),
        scales,
        capacity,
        k,
        x.stride(0),
        TOP=1 if is_gated else top,
        IS_GATED=is_gated,
        BLOCK=next_power_of_2(k),
        num_warps=16 if k > 8192 else 8 if k > 2048 else 4,
        **chain_options(x),
    )
    return codes, scales


@jit(do_not_specialize=["capacity"])
def _split_places_kernel(
    x: tl.tensor,
    places: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    capacity: tl.tensor,
    k: tl.tensor,
    x_stride: tl.tensor,
    TOP: tl.constexpr,
    IS_GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """One row, which is a token's or stands at its place."""
    start_in_chain(CHAINED)
    program = tl.program_id(0).to(tl.int64)
    row = tl.maximum(tl.load(places + program), 0).to(tl.int64) if IS_GATED else program
    ks = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + ks, mask=ks < k, other=0.0).to(tl.float32)
    if IS_GATED:
        up = tl.load(x + row * x_stride + k + ks, mask=ks < k, other=0.0).to(tl.float32)
        value = (value / (1.0 + tl.exp(-value)) * up).to(x.dtype.element_ty).to(tl.float32)
    high, low, value, scale = split(value)
    for choice in tl.static_range(TOP):
        place = tl.load(places + program * TOP + choice).to(tl.int64)
        inside = ks < tl.where(place >= 0, k, 0)
        at = codes + place * k + ks
        tl.store(at, high.to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=inside)
        tl.store(at + tl.cast(capacity, tl.int64) * k, low.to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=inside)
        tl.store(scales + place, scale, mask=place >= 0)
