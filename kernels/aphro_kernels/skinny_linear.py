"""Linear layers of 1 to 64 rows: bound by the bytes of the weight, which a kernel of our own reads faster than cuBLAS.

Bias and SiLU(gate) * up are part of the same launch. Which configuration a shape takes on a device, or that cuBLAS is
faster there, says tuned.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from aphro_kernels.language import chain_options, next_power_of_2
from aphro_kernels.skinny_kernel import skinny_kernel

MAX_ROWS: Final = 64
_PART_ELEMENTS: Final = 2**22  # float32, of the parts of cut stripes
_MAX_STRIPES: Final = 2**15


@dataclass(frozen=True, slots=True)
class SkinnyConfig:
    """How the kernel runs one shape for one bucket of rows."""

    rows: int  # of the kernel's tile: 1 multiplies and sums, from 8 on the tensor cores do
    columns: int  # of the output in a tile; of the gate and as many of up in a gated layer
    inputs: int  # in a tile
    programs: int
    num_warps: int
    num_stages: int
    ahead: int  # tiles asked for before the kernel before has ended
    is_early: bool  # the next kernel may come at once, not only when a program has read its first stripe
    splits: int = 1  # quantised weights: stretches of a tile's inputs that warps share out


@dataclass(frozen=True, slots=True)
class SkinnyWorkspace:
    """What the launches of one stream share. Between them ``parts`` hold anything, ``arrivals`` zeros."""

    parts: Tensor  # float32
    arrivals: Tensor  # int32


def build_skinny_workspace(device: torch.device) -> SkinnyWorkspace:
    return SkinnyWorkspace(
        torch.zeros(_PART_ELEMENTS, dtype=torch.float32, device=device),
        torch.zeros(_MAX_STRIPES, dtype=torch.int32, device=device),
    )


def rows_bucket(num_rows: int) -> int:
    """The largest number of rows that shares a configuration with ``num_rows``: 1, 8, 16, 32 or 64."""
    return 1 if num_rows == 1 else max(next_power_of_2(num_rows), 8)


def skinny_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    is_gated: bool = False,
) -> Tensor:
    y = linear(x.float(), weight.float(), None if bias is None else bias.float())
    if is_gated:
        gate, up = y.chunk(2, dim=-1)
        y = silu(gate) * up
    return y.to(x.dtype)


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    config: SkinnyConfig,
    workspace: SkinnyWorkspace,
    is_gated: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """``x W^T + bias`` of 1 to 64 rows: ``x`` [rows, K], ``weight`` [N, K] -> [rows, N]. For 16-bit CUDA tensors.

    ``is_gated``: ``weight`` and ``bias`` hold gate, then up; SiLU(gate) * up, [rows, N / 2]. Sums are float32 and in a
    fixed order. Calls that share a workspace must follow each other on one stream.
    """
    num_rows, k = x.shape
    n = weight.shape[0] // 2 if is_gated else weight.shape[0]
    assert 0 < num_rows <= MAX_ROWS
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    out = x.new_empty(num_rows, n) if out is None else out
    tiles = -(-n // config.columns) * -(-k // config.inputs)
    assert num_rows <= config.rows
    programs = min(config.programs, tiles)
    assert -(-n // config.columns) <= workspace.arrivals.numel()
    assert 2 * (1 + is_gated) * programs * config.columns * config.rows <= workspace.parts.numel()
    launch_skinny(x, weight, bias, out, config=config, workspace=workspace, programs=programs, is_gated=is_gated)
    return out


def launch_skinny(
    x: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    config: SkinnyConfig,
    workspace: SkinnyWorkspace,
    programs: int,
    is_gated: bool,
    scales: Tensor | None = None,
    offsets: Tensor | None = None,
    kind: Literal["plain", "int4", "int8", "fp8"] = "plain",
    group: int = 0,
    is_tiled: bool = False,
) -> None:
    """The kernel over a plain weight or over codes; what is not there is an address that it does not read."""
    num_rows, k = x.shape
    n = out.shape[1]
    launch: Any = skinny_kernel[(programs,)]
    launch(
        x,
        codes,
        x if bias is None else bias,
        out,
        workspace.parts,
        workspace.arrivals,
        x if scales is None else scales,
        x if offsets is None else offsets,
        num_rows,
        n,
        k,
        x.stride(0),
        config.ahead,
        ROWS=config.rows,
        BN=config.columns,
        BK=config.inputs,
        IS_EVEN=n % config.columns == 0 and k % config.inputs == 0,
        IS_EARLY=config.is_early,
        STAGES=config.num_stages,
        IS_GATED=is_gated,
        HAS_BIAS=bias is not None,
        KIND=kind,
        GROUP=group,
        SPLIT=config.splits,
        IS_TILED=is_tiled,
        HAS_ASM=kind != "plain" and x.is_cuda,
        num_warps=config.num_warps,
        **chain_options(x),
    )
