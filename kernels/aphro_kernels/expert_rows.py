"""Rows to the places of their experts, and back: each token's results, weighed and added up."""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

from typing import Final

from torch import Tensor

from aphro_kernels.language import chain_options, jit, runs_kernels, start_in_chain, tl, triton
from aphro_kernels.row_tiles import RowTiles

_BLOCK: Final = 1024


def spread_rows_reference(x: Tensor, tiles: RowTiles) -> Tensor:
    out = x.new_zeros(len(tiles.slots), x.shape[1])
    is_slot = tiles.slots < tiles.num_slots
    out[is_slot] = x[tiles.slots[is_slot].long() // tiles.places.shape[1]]
    return out


def spread_rows(x: Tensor, tiles: RowTiles) -> Tensor:
    """``x`` [num_tokens, width] to [capacity, width]: each row at the places of its slots. What is padded is not
    written."""
    if not runs_kernels(x):
        return spread_rows_reference(x, tiles)
    return _launch_spread(x, tiles)


def _launch_spread(x: Tensor, tiles: RowTiles) -> Tensor:
    num_tokens, width = x.shape
    assert x.stride(1) == 1
    out = x.new_empty(len(tiles.slots), width)
    if num_tokens:
        _spread_kernel[(num_tokens, triton.cdiv(width, _BLOCK))](
            x, tiles.places, out, width, x.stride(0), TOP=tiles.places.shape[1], BLOCK=_BLOCK, num_warps=4,
            **chain_options(x),
        )  # fmt: skip
    return out


@jit()
def _spread_kernel(
    x: tl.tensor,
    places: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    start_in_chain(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + token * x_stride + column, mask=column < width, other=0.0)
    for choice in tl.static_range(TOP):
        place = tl.load(places + token * TOP + choice).to(tl.int64)
        tl.store(out + place * width + column, value, mask=column < tl.where(place >= 0, width, 0))


def weigh_rows_reference(y: Tensor, shares: Tensor, places: Tensor, *, is_spread: bool) -> Tensor:
    num_tokens, top = shares.shape
    each = y[places.long().clamp(min=0)] if is_spread else y.view(num_tokens, top, -1)
    each = each.float().masked_fill((places < 0)[..., None], 0.0)
    return (each * shares[..., None]).sum(dim=1).to(y.dtype)


def weigh_rows(y: Tensor, shares: Tensor, places: Tensor, *, is_spread: bool) -> Tensor:
    """The sum of a token's rows by ``shares`` [num_tokens, k] float32: [num_tokens, width], float32 inside. ``y`` has
    a row a slot, or (``is_spread``) a row a place. What is elsewhere (``places`` [num_tokens, k] of -1) counts as 0."""
    if not runs_kernels(y):
        return weigh_rows_reference(y, shares, places, is_spread=is_spread)
    return _launch_weigh(y, shares, places, is_spread=is_spread)


def _launch_weigh(y: Tensor, shares: Tensor, places: Tensor, *, is_spread: bool) -> Tensor:
    (num_tokens, top), width = shares.shape, y.shape[1]
    assert y.is_contiguous()
    assert shares.is_contiguous()
    out = y.new_empty(num_tokens, width)
    if num_tokens:
        _weigh_kernel[(num_tokens, triton.cdiv(width, _BLOCK))](
            y, shares, places, out, width, TOP=top, IS_SPREAD=is_spread, BLOCK=_BLOCK, num_warps=4, **chain_options(y)
        )
    return out


@jit()
def _weigh_kernel(
    y: tl.tensor,
    shares: tl.tensor,
    places: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    TOP: tl.constexpr,
    IS_SPREAD: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    start_in_chain(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOP):
        place = tl.load(places + token * TOP + choice).to(tl.int64)
        row = place if IS_SPREAD else token * TOP + choice
        value = tl.load(y + row * width + column, mask=column < tl.where(place >= 0, width, 0), other=0.0)
        total += tl.load(shares + token * TOP + choice) * value.to(tl.float32)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=column < width)
