"""A layer behind its attention, and the next layer's QKV, in one launch of one row over quantised weights (Hopper).

    layer = PackedChainLayer(out, gain, gate_up, down, NextPackedLayer(next_gain, qkv, bias), eps, workspace)
    qkv = layer(x, attended)      # x [1, hidden], the residual stream, in place

packed_chain_kernel.py has the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from aphro_kernels.chain_plan import ChainShape
from aphro_kernels.float8 import float8_as_bytes
from aphro_kernels.hopper import TensorDescriptor, gl, is_hopper, num_multiprocessors
from aphro_kernels.language import chain_options
from aphro_kernels.packed_chain_kernel import packed_chain_kernel
from aphro_kernels.packed_linear import PackedWeight, packed_linear_reference

_SHARED_BYTES: Final = 225 * 1024  # of a program on Hopper, less barriers and what sums need
_SLOT_BYTES: Final = {"int4": 17 * 1024, "fp8": 16 * 1024}
_MOST_INPUTS: Final = 2**15  # of a row in shared memory, with room for some slots
_TILE_BYTES: Final = {"int4": 276, "fp8": 260}  # of 128 inputs of the row
_IN_FLIGHT: Final = 2  # slots on their way to a multiprocessor, at most: more queue before what it waits for


@dataclass(frozen=True, slots=True)
class PackedChainWorkspace:
    """What the launches of one stream share."""

    inner: Tensor  # [inner]
    arrivals: Tensor  # int64: only grows, by whole launches
    programs: int

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes + self.arrivals.nbytes


def build_packed_chain_workspace(shape: ChainShape, device: torch.device) -> PackedChainWorkspace:
    arrivals = torch.zeros(1, dtype=torch.int64, device=device)
    inner = torch.zeros(shape.inner, dtype=torch.bfloat16, device=device)
    return PackedChainWorkspace(inner, arrivals, num_multiprocessors(arrivals.device.index))


def packed_chain_rows(shape: ChainShape, weights: Sequence[PackedWeight], gain: Tensor) -> range:
    """Numbers of rows for which a chain of layers of such ``weights`` and norms is made and is the faster way, measured
    on an H100 (docs/kernels.md): none on other devices, in other groups, sizes or dtypes, or where kinds differ."""
    sizes = (shape.attended, shape.hidden, shape.inner)
    if any(size % 128 for size in sizes) or shape.qkv % 16 or not all(_is_taken(one) for one in weights):
        return range(0)
    is_alike = len({weight.kind for weight in weights}) == 1 and gain.dtype == torch.bfloat16
    return range(1, 2) if is_alike and max(sizes) <= _MOST_INPUTS else range(0)


def _is_taken(weight: PackedWeight) -> bool:
    if not is_hopper(weight.codes.device, torch.bfloat16) or not weight.codes.is_contiguous():
        return False
    if weight.kind == "int4":
        return weight.is_tiled and weight.scales.dtype == torch.bfloat16
    return weight.kind == "fp8" and weight.tile_group % 128 == 0


@dataclass(frozen=True, slots=True)
class NextPackedLayer:
    """What a chain ends with: the norm and the QKV of the layer behind it."""

    gain: Tensor
    qkv: PackedWeight
    bias: Tensor | None


class PackedChainLayer:
    """``x += attended Wo^T; x += (SiLU(g) * u) Wd^T, (g, u) = norm(x) Wgu^T; norm(x) Wqkv^T + b``."""

    def __init__(
        self,
        out: PackedWeight,
        gain: Tensor,
        gate_up: PackedWeight,
        down: PackedWeight,
        following: NextPackedLayer | None,
        eps: float,
        workspace: PackedChainWorkspace,
    ) -> None:
        hidden, attended = out.shape
        self._shape = ChainShape(attended, hidden, down.shape[1], 0 if following is None else following.qkv.shape[0])
        self._weights = (out, gate_up, down, following.qkv if following is not None else out)
        self._gain, self._following, self._eps = gain, following, eps
        self._workspace = workspace

    def reference_(self, x: Tensor, attended: Tensor) -> Tensor | None:
        out, gate_up, down, qkv = self._weights
        wide = x.float() + packed_linear_reference(attended.float(), out)
        inner = packed_linear_reference(self._normed(wide, self._gain), gate_up, is_gated=True)
        wide += packed_linear_reference(inner, down)
        x.copy_(wide)
        if self._following is None:
            return None
        following = self._following
        bias = None if following.bias is None else following.bias.float()
        return packed_linear_reference(self._normed(wide, following.gain), qkv, bias).to(x.dtype)

    def _normed(self, wide: Tensor, gain: Tensor) -> Tensor:
        return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self._eps) * gain.float()

    def __call__(self, x: Tensor, attended: Tensor, out: Tensor | None = None) -> Tensor | None:
        """``x`` [1, hidden] in place, ``attended`` [1, inputs], both contiguous; the next layer's [1, outputs], None
        behind the last layer."""
        shape, workspace, following = self._shape, self._workspace, self._following
        assert len(x) == 1
        assert x.is_contiguous()
        assert attended.is_contiguous()
        kind = self._weights[0].kind
        stripes = stripes_of(shape.hidden, workspace.programs)
        qkv_stripes = stripes_of(shape.qkv, workspace.programs) if shape.qkv else 1
        tiles = -(-max(shape.attended, shape.hidden, shape.inner) // 4096) * 32
        slots = (_SHARED_BYTES - tiles * _TILE_BYTES[kind]) // _SLOT_BYTES[kind]
        bias = None if following is None else following.bias
        qkv = None
        if following is not None:
            qkv = x.new_empty(1, shape.qkv) if out is None else out
        named = ("OUT", "GATE_UP", "DOWN", "QKV")
        each = (stripes, 2, stripes, qkv_stripes)
        launch: Any = packed_chain_kernel[(workspace.programs,)]
        launch(
            attended,
            x,
            self._gain,
            self._gain if following is None else following.gain,
            x if bias is None else bias,
            workspace.inner,
            x if qkv is None else qkv,
            workspace.arrivals,
            self._eps,
            *(_codes(weight, count) for weight, count in zip(self._weights, each, strict=True)),
            *(_scales(weight, count) for weight, count in zip(self._weights, each, strict=True)),
            ATTENDED=shape.attended,
            HIDDEN=shape.hidden,
            INNER=shape.inner,
            QKV=shape.qkv,
            STRIPES=stripes,
            QKV_STRIPES=qkv_stripes,
            **{f"{name}_GROUP": weight.tile_group for name, weight in zip(named, self._weights, strict=True)},
            KIND=kind,
            SLOTS=slots,
            IN_FLIGHT=_IN_FLIGHT,
            TILES=tiles,
            HAS_BIAS=bias is not None,
            num_warps=8,
            **chain_options(x),
        )
        return qkv


def stripes_of(n: int, programs: int) -> int:
    """Stripes of 16 outputs that a program takes at once, one or two: two read the row half as often, one may be dealt
    out more evenly."""
    stripes = n // 16
    turns, pairs = -(-stripes // programs), -(-stripes // 2 // programs)
    return 2 if stripes % 2 == 0 and 2 * pairs <= turns else 1


def _codes(weight: PackedWeight, stripes: int) -> Any:
    if weight.kind == "int4":
        words = weight.codes.view(torch.int32).view(-1, 16)
        layout = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=32, rank=2)
        return TensorDescriptor(words, list(words.shape), [16, 1], [256 // stripes, 16], layout)
    codes = float8_as_bytes(weight.codes)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    return TensorDescriptor(codes, list(codes.shape), list(codes.stride()), [16, 128], layout)


def _scales(weight: PackedWeight, stripes: int) -> Any:
    if weight.kind == "int4":
        pairs = weight.scales.view(-1, 32)
        layout = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
        return TensorDescriptor(pairs, list(pairs.shape), [32, 1], [16 // stripes, 32], layout)
    return weight.scales
