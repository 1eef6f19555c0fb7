"""Linear layers over quantised weights: few rows dequantise in registers, many take a dequantised copy to cuBLAS."""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from aphro_kernels.float8 import float8_as_bytes
from aphro_kernels.float8_linear import Float8Config, float8_config, launch_float8
from aphro_kernels.language import jit, runs_kernels, tl, triton
from aphro_kernels.skinny_linear import SkinnyConfig, SkinnyWorkspace, launch_skinny, rows_bucket
from aphro_kernels.tile_linear import MAX_ROWS as MAX_TILE_ROWS
from aphro_kernels.tile_linear import TileConfig, launch_tiles, suits_tiles, tile_codes, tile_config, untile_codes

Kind = Literal["int4", "int8", "fp8"]
MAX_ROWS: Final = 32  # of the kernel; above, dequantising is shared by enough rows
_LEAST_GROUP: Final = 32  # inputs that share a scale, for tiles to lie within one
_LEAST_INPUTS: Final = 16  # that a tensor core's product adds up; of int4 two halves of a group do
_WIDE: Final = 8192  # outputs: enough stripes of many columns for all multiprocessors


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """``[out, in]``: weight = code * scale (+ offset).

    ``codes`` [out, in] int8 or float8_e4m3fn, or with ``offsets`` [out, in / 2] uint8: two 4-bit codes a byte, the low
    one of the input as far into the first half of its group as the high one's is into the second. ``scales``,
    ``offsets`` [out, groups]. ``is_tiled``: all three as :func:`tile_codes` gives them.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    is_tiled: bool = False

    def rows(self, start: int, stop: int) -> PackedWeight:
        """Some rows, as views; of tiles whole stripes of 16."""
        codes = self.codes[start:stop]
        if not self.is_tiled:
            return PackedWeight(
                codes, self.scales[start:stop], None if self.offsets is None else self.offsets[start:stop]
            )
        pairs = self.scales[2 * start : 2 * stop]
        return PackedWeight(codes, pairs, pairs.view(-1)[16:], is_tiled=True)

    @property
    def kind(self) -> Kind:
        return "int4" if self.offsets is not None else "int8" if self.codes.dtype == torch.int8 else "fp8"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * (2 if self.offsets is not None else 1)

    @property
    def group(self) -> int:
        return self.shape[1] // self.scales.shape[1]

    @property
    def tile_group(self) -> int:
        """GROUP of packed_tiles.py: 0 where the scale of a row can wait until its sum is made."""
        return 0 if self.scales.shape[1] == 1 and self.offsets is None else self.group

    @property
    def suits_kernel(self) -> bool:
        """Other groups are dequantised for each product."""
        whole, least = self.scales.shape[1] == 1, 2 * _LEAST_INPUTS if self.offsets is not None else _LEAST_INPUTS
        is_group = widest_tile(self.group, 2**20) == self.group >= least
        return self.shape[1] % _LEAST_GROUP == 0 and (whole or is_group)


def halve_groups(codes: Tensor, group: int) -> Tensor:
    """``[out, in / 2]`` uint8 with the even input low and the odd one high, in the order of :class:`PackedWeight`."""
    nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).view(len(codes), -1, 2, group // 2)
    return (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).flatten(1)


def in_tiles(weight: PackedWeight) -> PackedWeight:
    """The same weight in the order that one to eight rows are fastest with, where its sizes have it."""
    if weight.offsets is None or weight.is_tiled or not suits_tiles(weight.shape, weight.group):
        return weight
    return PackedWeight(*tile_codes(weight.codes, weight.scales, weight.offsets), is_tiled=True)


def dequantise_reference(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    codes, scales, offsets, (rows, _) = weight.codes, weight.scales, weight.offsets, weight.shape
    if offsets is not None and weight.is_tiled:
        codes, scales, offsets = untile_codes(codes, scales)
    grouped = codes.float().view(rows, scales.shape[1], -1)
    if offsets is not None:
        halves = codes.view(rows, scales.shape[1], 1, -1)
        grouped = torch.cat((halves & 15, halves >> 4), dim=2).flatten(2).float()
    grouped = grouped * scales.float()[..., None]
    if offsets is not None:
        grouped = grouped + offsets.float()[..., None]
    return grouped.flatten(1).to(dtype)


def packed_linear_reference(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, is_gated: bool = False
) -> Tensor:
    y = linear(x.float(), dequantise_reference(weight, torch.float32), None if bias is None else bias.float())
    if is_gated:
        gate, up = y.chunk(2, dim=-1)
        y = silu(gate) * up
    return y.to(x.dtype)


PackedConfig = SkinnyConfig | TileConfig | Float8Config


def packed_config(weight: PackedWeight, x: Tensor, *, is_gated: bool = False) -> PackedConfig | None:
    """How a kernel runs this product with rows like ``x``; None: the weight is dequantised instead.

    Rules that hold for every shape, from measurements of those of Llama-3-8B on a Hopper GPU (docs/kernels.md).
    """
    num_rows, is_tiled = len(x), weight.is_tiled
    is_float8 = is_tiled or (weight.kind == "fp8" and weight.tile_group % 128 == 0)
    if is_float8 and (found := float8_config(weight.kind, weight.shape, x, is_gated=is_gated)):
        return found
    if not weight.suits_kernel or not 0 < num_rows <= MAX_ROWS:
        return None
    if is_tiled and num_rows <= MAX_TILE_ROWS and (tiles := tile_config(weight.shape, is_gated=is_gated)):
        return tiles
    n = weight.shape[0] // 2 if is_gated else weight.shape[0]
    group, is_early = weight.tile_group, num_rows == 1
    if num_rows == 1 and weight.kind != "int4":
        inputs = widest_tile(weight.shape[1], 512)
        columns, warps, stages = (8, 2, 4) if is_gated or group else (16, 4, 3)
        return SkinnyConfig(1, columns, inputs, _programs(n, columns), warps, stages, 4, is_early)
    rows, is_wide = max(rows_bucket(num_rows), 8), n >= _WIDE
    columns, splits, stages = (64, 4, 3) if is_wide else (32 if weight.kind == "fp8" else 16, 8, 3)
    if rows > 16:
        columns, splits, stages = (32, 2, 4) if is_wide else (32, 4, 4)
    inputs = widest_tile(group or weight.shape[1], 128) * splits
    return SkinnyConfig(rows, columns, inputs, -(-n // columns), splits, stages, 2, is_early, splits)


def _programs(n: int, columns: int) -> int:
    """As many programs as stripes, or a whole fraction of them: then no stripe is cut."""
    stripes = -(-n // columns)
    return -(-stripes // -(-stripes // 512))


def widest_tile(group: int, most: int) -> int:
    """The largest power of two that divides a group."""
    return min(group & -group, most)


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    config: PackedConfig,
    workspace: SkinnyWorkspace,
    is_gated: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """``x W^T + bias`` of few rows, [rows, out], float32 inside. For 16-bit CUDA tensors.

    ``is_gated``: weight and bias hold gate, then up; SiLU(gate) * up, [rows, out / 2]. Calls that share a workspace
    must follow each other on one stream.
    """
    num_rows, (n, k) = x.shape[0], weight.shape
    n = n // 2 if is_gated else n
    assert x.stride(1) == 1
    assert weight.codes.is_contiguous()
    assert weight.scales.is_contiguous()
    out = x.new_empty(num_rows, n) if out is None else out
    if isinstance(config, TileConfig):
        launch_tiles(x, weight.codes, weight.scales, bias, out, config=config, is_gated=is_gated)
        return out
    if isinstance(config, Float8Config):
        launch_float8(
            x,
            weight.codes,
            weight.scales,
            bias,
            out,
            kind=weight.kind,
            group=weight.tile_group,
            config=config,
            parts=workspace.parts,
            arrivals=workspace.arrivals,
            is_gated=is_gated,
        )
        return out
    assert num_rows <= config.rows
    stripes = -(-n // config.columns)
    programs = min(config.programs, stripes * -(-k // config.inputs))
    if programs != stripes:  # some may be cut
        assert stripes <= workspace.arrivals.numel()
        assert 2 * (1 + is_gated) * programs * config.columns * config.rows <= workspace.parts.numel()
    launch_skinny(
        x,
        float8_as_bytes(weight.codes),
        bias,
        out,
        config=config,
        workspace=workspace,
        programs=programs,
        is_gated=is_gated,
        scales=weight.scales,
        offsets=weight.offsets,
        kind=weight.kind,
        group=weight.tile_group,
        is_tiled=weight.is_tiled,
    )
    return out


def dequantise(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """``[out, in]`` of the same matrix in ``dtype``."""
    if not runs_kernels(weight.codes) or not can_convert(weight.codes):
        return dequantise_reference(weight, dtype)
    return _launch_dequantise(weight, torch.empty(weight.shape, dtype=dtype, device=weight.codes.device))


def can_convert(codes: Tensor) -> bool:
    """Before compute capability 8.9 a GPU has no instruction for float8."""
    is_float8 = codes.dtype == torch.float8_e4m3fn
    return not is_float8 or not codes.is_cuda or torch.cuda.get_device_capability(codes.device) >= (8, 9)


def _launch_dequantise(weight: PackedWeight, out: Tensor) -> Tensor:
    codes, scales = weight.codes, weight.scales
    block = 1024
    _dequantise_kernel[(len(codes), triton.cdiv(codes.shape[1], block))](
        float8_as_bytes(codes),
        scales,
        scales if weight.offsets is None else weight.offsets,
        out,
        codes.shape[1],
        KIND=weight.kind,
        GROUP=weight.group,
        NUM_GROUPS=scales.shape[1],
        IS_TILED=weight.is_tiled,
        BLOCK=block,
        num_warps=4,
    )
    return out


@jit()
def _dequantise_kernel(
    codes: tl.tensor,
    scales: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    row_bytes: tl.tensor,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    IS_TILED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    ks = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ks < row_bytes
    per: tl.constexpr = 2 if KIND == "int4" else 1
    group = ks * per // GROUP
    at, scale_at = row * row_bytes + ks, row * NUM_GROUPS + group
    if IS_TILED:
        at = (row // 16 * NUM_GROUPS + group) * 1024 + row % 16 * 64 + ks % 64
        scale_at = (row // 16 * NUM_GROUPS + group) * 32 + row % 16
    q = tl.load(codes + at, mask=inside, other=0)
    s = tl.load(scales + scale_at, mask=inside, other=0.0).to(tl.float32)
    if KIND == "int4":
        o = tl.load(offsets + scale_at, mask=inside, other=0.0).to(tl.float32)
        to = out + row * row_bytes * 2 + group * (GROUP // 2) + ks
        tl.store(to, ((q & 15).to(tl.float32) * s + o).to(out.dtype.element_ty), mask=inside)
        tl.store(to + GROUP // 2, ((q >> 4).to(tl.float32) * s + o).to(out.dtype.element_ty), mask=inside)
    else:
        if KIND == "fp8":
            q = q.to(tl.float8e4nv, bitcast=True)
        tl.store(out + row * row_bytes + ks, (q.to(tl.float32) * s).to(out.dtype.element_ty), mask=inside)
