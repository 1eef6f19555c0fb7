"""Which rows go to which expert: slots (row * k + choice) sorted by expert, each expert's padded to whole tiles."""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from aphro_kernels.language import chain_options, jit, next_power_of_2, runs_kernels, start_in_chain, tl

_BLOCK: Final = 8192  # tokens times experts that one program keeps in registers
_MOST_TOKENS: Final = 256  # of them
_MANY_EXPERTS: Final = 128
_MOST_SLOTS: Final = {16: 10, 32: 40}  # rows of a tile -> slots an expert, on average


@dataclass(slots=True)
class RowTiles:
    """``slots`` [capacity] int32: the slot that stands there, the number of slots where a tile is padded; ``experts``
    [capacity / rows] int32 count from the first local expert, their number where a tile is not used; ``places``
    [num_tokens, k] int32: where in ``slots`` a slot stands, -1 if its expert is elsewhere; ``used`` [1] int32 tiles.
    """

    slots: Tensor
    experts: Tensor
    places: Tensor
    used: Tensor
    rows: int  # of a tile
    num_slots: int


def plan_tiles(chosen: Tensor, first: int, num_experts: int, rows: int) -> RowTiles:
    """``chosen`` [num_tokens, k] int64 numbers of experts, of a token all different, of which ``first`` to ``first +
    num_experts`` are here; ``rows`` of a tile, a power of two.

    Shapes follow from the shape of ``chosen`` alone and nothing is copied to the host: a CUDA graph may hold it.
    """
    if not runs_kernels(chosen) or not chosen.numel():
        return plan_tiles_reference(chosen, first, num_experts, rows)
    return _launch(chosen, first, num_experts, rows)


def tile_rows(num_slots: int, num_experts: int) -> int:
    """So that most experts' rows fit one tile, whose matrix is read once (measured on an H100, docs/kernels.md)."""
    return next((rows for rows, most in _MOST_SLOTS.items() if num_slots <= most * num_experts), 64)


def _capacity(num_slots: int, num_experts: int, rows: int) -> int:
    return -(-(num_slots + min(num_experts, num_slots) * (rows - 1)) // rows) * rows


def plan_tiles_reference(chosen: Tensor, first: int, num_experts: int, rows: int) -> RowTiles:
    num_slots = chosen.numel()
    capacity = _capacity(num_slots, num_experts, rows)
    local = chosen.flatten() - first
    local = torch.where((local >= 0) & (local < num_experts), local, num_experts)
    sorted_experts, order = torch.sort(local, stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=chosen.device)
    counts.scatter_add_(0, local, torch.ones_like(local))
    padded = (counts + rows - 1) // rows * rows
    padded[num_experts].zero_()
    starts, padded_ends = counts.cumsum(0) - counts, padded.cumsum(0)
    shift = padded_ends - padded - starts
    place = torch.arange(num_slots, device=chosen.device) + shift[sorted_experts]
    is_here = sorted_experts < num_experts
    places = torch.empty(num_slots, dtype=torch.int32, device=chosen.device)
    places[order] = torch.where(is_here, place, -1).to(torch.int32)
    slots = torch.full((capacity + 1,), num_slots, dtype=torch.int32, device=chosen.device)
    # foreign slots go behind the end
    slots.scatter_(0, torch.where(is_here, place, capacity), order.to(torch.int32))
    tile_starts = torch.arange(0, capacity, rows, device=chosen.device)
    experts = torch.searchsorted(padded_ends[:num_experts].contiguous(), tile_starts, right=True).to(torch.int32)
    used = (padded_ends[num_experts:] // rows).to(torch.int32)
    return RowTiles(slots[:capacity], experts, places.view(chosen.shape), used, rows, num_slots)


def _launch(chosen: Tensor, first: int, num_experts: int, rows: int) -> RowTiles:
    (num_tokens, top), width = chosen.shape, next_power_of_2(max(num_experts, 1))
    assert chosen.is_contiguous()
    capacity = _capacity(num_tokens * top, num_experts, rows)
    tokens = 16 if num_tokens <= 16 else min(_MOST_TOKENS, max(_BLOCK // width, 16))
    blocks = -(-num_tokens // tokens)
    sizes = (capacity, capacity // rows, num_tokens * top, 1, blocks * width)
    slots, experts, places, used, counts = (torch.empty(n, dtype=torch.int32, device=chosen.device) for n in sizes)
    options: dict[str, Any] = {"TOP": top, "TOKENS": tokens, "EXPERTS": width, "num_warps": _warps(width)}
    options |= chain_options(chosen)
    if blocks > 1:
        _count_kernel[(blocks,)](chosen, counts, first, num_tokens, num_experts, **options)
    _place_kernel[(blocks,)](
        chosen, counts, slots, experts, places, used, first, num_tokens, num_experts, capacity, ROWS=rows,
        PADS=min(rows, max(_BLOCK // width, 1)), IS_ALONE=blocks == 1, **options,
    )  # fmt: skip
    return RowTiles(slots, experts, places.view(chosen.shape), used, rows, num_tokens * top)


def _warps(width: int) -> int:
    """Of a program that holds several tensors of a row of experts a token: beside many of them four have too few
    registers (measured on an H100, docs/kernels.md)."""
    return 4 if width < _MANY_EXPERTS else 16


@jit()
def _taken(
    chosen: tl.tensor,
    token: tl.tensor,
    first: tl.tensor,
    num_tokens: tl.tensor,
    num_experts: tl.tensor,
    TOP: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> tl.tensor:
    """``[TOKENS, EXPERTS]`` int32: 1 where a token takes an expert that is here."""
    expert = tl.arange(0, EXPERTS)
    taken = tl.zeros([TOKENS, EXPERTS], tl.int32)
    for choice in tl.static_range(TOP):
        local = tl.load(chosen + token * TOP + choice, mask=token < num_tokens, other=-1).to(tl.int32) - first
        taken |= (local[:, None] == expert[None, :]).to(tl.int32)
    is_inside = (token < num_tokens)[:, None] & (expert < num_experts)[None, :]
    return tl.where(is_inside, taken, 0)


@jit(do_not_specialize=["first", "num_tokens"])
def _count_kernel(
    chosen: tl.tensor,
    counts: tl.tensor,
    first: tl.tensor,
    num_tokens: tl.tensor,
    num_experts: tl.tensor,
    TOP: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """How often the tokens of a block take each expert: ``counts`` [blocks, EXPERTS]."""
    start_in_chain(CHAINED)
    block = tl.program_id(0)
    token = block * TOKENS + tl.arange(0, TOKENS)
    taken = _taken(chosen, token, first, num_tokens, num_experts, TOP, TOKENS, EXPERTS)
    tl.store(counts + block * EXPERTS + tl.arange(0, EXPERTS), tl.sum(taken, axis=0))


@jit(do_not_specialize=["first", "num_tokens", "capacity"])
def _place_kernel(
    chosen: tl.tensor,
    counts: tl.tensor,
    slots: tl.tensor,
    experts: tl.tensor,
    places: tl.tensor,
    used: tl.tensor,
    first: tl.tensor,
    num_tokens: tl.tensor,
    num_experts: tl.tensor,
    capacity: tl.tensor,
    TOP: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    PADS: tl.constexpr,
    IS_ALONE: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """A slot's place is where its expert begins, and how many tokens before its own take the same one.

    The first program also says which expert a tile is of, and fills what is padded.
    """
    start_in_chain(CHAINED)
    block = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    token = block * TOKENS + tl.arange(0, TOKENS)
    taken = _taken(chosen, token, first, num_tokens, num_experts, TOP, TOKENS, EXPERTS)
    before = tl.cumsum(taken, axis=0) - taken
    if IS_ALONE:
        total = tl.sum(taken, axis=0)
    else:
        total = tl.zeros([EXPERTS], tl.int32)
        earlier = tl.zeros([EXPERTS], tl.int32)
        for other in range(0, tl.num_programs(0)):
            count = tl.load(counts + other * EXPERTS + expert)
            total += count
            earlier += tl.where(other < block, count, 0)
        before += earlier[None, :]
    padded = (total + ROWS - 1) // ROWS * ROWS
    ends = tl.cumsum(padded, axis=0)
    starts = ends - padded
    at = starts[None, :] + before
    for choice in tl.static_range(TOP):
        slot = token * TOP + choice
        local = tl.load(chosen + slot, mask=token < num_tokens, other=-1).to(tl.int32) - first
        is_here = (token < num_tokens) & (local >= 0) & (local < num_experts)
        place = tl.sum(tl.where(local[:, None] == expert[None, :], at, 0), axis=1)
        tl.store(places + slot, tl.where(is_here, place, -1), mask=token < num_tokens)
        tl.store(slots + place, slot, mask=is_here)
    if block == 0:
        num_slots = num_tokens * TOP
        row = tl.arange(0, PADS)
        for begin in tl.static_range(0, ROWS, PADS):
            pad = (starts + total + begin)[:, None] + row[None, :]
            tl.store(slots + pad, num_slots, mask=pad < ends[:, None])
        last = tl.max(ends, axis=0)
        rest = tl.arange(0, 1024)
        for start in range(last, capacity, 1024):
            tl.store(slots + start + rest, num_slots, mask=start + rest < capacity)
        tile = tl.arange(0, 64)
        for start in range(0, capacity // ROWS, 64):
            passed = (ends[:, None] <= ((start + tile) * ROWS)[None, :]) & (expert < num_experts)[:, None]
            tl.store(experts + start + tile, tl.sum(passed.to(tl.int32), axis=0), mask=start + tile < capacity // ROWS)
        tl.store(used, last // ROWS)
