"""4-bit weights in tiles times one to eight rows: the order in memory, and which sizes have it (tile_kernel.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from aphro_kernels.language import chain_options
from aphro_kernels.tile_kernel import tile_kernel

MAX_ROWS: Final = 8  # of x: the short side of a product of the tensor core
GROUP: Final = 128  # inputs that share a scale: those of a tile
_STRIPE: Final = 16  # outputs of a tile
_TILE_BYTES: Final = 64  # of one output
_LONG: Final = 8192  # inputs: warps have many turns


@dataclass(frozen=True, slots=True)
class TileConfig:
    num_warps: int
    ahead: int  # turns that are asked for before the kernel before has ended
    is_unrolled: bool  # afterwards as many are always ahead; else a loop asks for one and waits, in fewer registers
    registers: int | None = None  # at most, of a thread: for all programs to be on the multiprocessors at once


def tile_config(shape: tuple[int, int], *, is_gated: bool) -> TileConfig | None:
    """For 16-bit rows times a tiled weight of this ``shape`` (docs/kernels.md); None: outputs are cut inside a tile."""
    if is_gated:
        return TileConfig(4, 1, is_unrolled=False, registers=72) if shape[0] % (2 * _STRIPE) == 0 else None
    return TileConfig(8, 3 if shape[1] > _LONG else 2, is_unrolled=True)


def suits_tiles(shape: tuple[int, int], group: int) -> bool:
    return group == GROUP and shape[0] % _STRIPE == 0 and shape[1] % GROUP == 0


def tile_rows(x: Tensor, size: int) -> Tensor:
    """The elements of ``x`` [rows, n * size], those of 16 rows and ``size`` columns one after the other."""
    return x.view(len(x) // _STRIPE, _STRIPE, -1, size).transpose(1, 2).contiguous().view(x.shape)


def untile_rows(x: Tensor, size: int) -> Tensor:
    return x.view(len(x) // _STRIPE, -1, _STRIPE, size).transpose(1, 2).contiguous().view(x.shape)


def tile_codes(codes: Tensor, scales: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in halves of groups (packed_linear.py), scales and offsets [out, groups], to the order of tiles.

    A tile's 16 scales are followed by its 16 offsets: the scales come as [2 out, groups], the offsets as a view of
    them that begins with the first offset.
    """
    pairs = torch.stack((tile_rows(scales, 1), tile_rows(offsets, 1))).view(2, -1, _STRIPE).transpose(0, 1)
    pairs = pairs.contiguous().view(2 * len(scales), -1)
    return tile_rows(codes, _TILE_BYTES), pairs, pairs.view(-1)[_STRIPE:]


def untile_codes(codes: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales, offsets = pairs.view(-1, 2, _STRIPE).transpose(0, 1).contiguous().view(2, len(codes), -1)
    return untile_rows(codes, _TILE_BYTES), untile_rows(scales, 1), untile_rows(offsets, 1)


def launch_tiles(
    x: Tensor,
    codes: Tensor,
    pairs: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    config: TileConfig,
    is_gated: bool,
) -> None:
    """``out`` [rows, n] = x W^T (+ bias), or SiLU(gate) * up of codes with 2 n rows."""
    num_rows, k = x.shape
    n = out.shape[1]
    assert 0 < num_rows <= MAX_ROWS
    assert x.stride(1) == 1
    assert x.dtype in (torch.float16, torch.bfloat16)
    assert n % _STRIPE == 0
    launch: Any = tile_kernel[(n // _STRIPE,)]
    launch(
        x,
        codes,
        pairs,
        x if bias is None else bias,
        out,
        num_rows,
        n,
        x.stride(0),
        TILES=k // GROUP,
        WARPS=config.num_warps,
        AHEAD=min(config.ahead, -(-k // GROUP // config.num_warps)),
        IS_UNROLLED=config.is_unrolled,
        IS_GATED=is_gated,
        HAS_BIAS=bias is not None,
        HAS_ASM=x.is_cuda,
        num_warps=config.num_warps,
        **({} if config.registers is None else {"maxnreg": config.registers}),
        **chain_options(x),
    )
