"""Everything of a layer behind its attention, and the next layer's QKV, in one launch of a few rows (Hopper).

    layer = ChainLayer(out, gain, gate_up, down, NextLayer(next_gain, qkv, bias), eps, workspace)
    qkv = layer(x, attended)      # x, the residual stream, in place

chain_kernel.py has the kernel, chain_plan.py how its work is shared out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from aphro_kernels.chain_kernel import chain_kernel
from aphro_kernels.chain_plan import MAX_ROWS, ChainShape, can_chain, chain_plan, fewest_rows
from aphro_kernels.hopper import TensorDescriptor, gl, num_multiprocessors, suits_hopper
from aphro_kernels.language import chain_options, next_power_of_2

_PARTS: Final = 256  # programs that add squares, at most


@dataclass(frozen=True, slots=True)
class ChainWorkspace:
    """What the launches of one stream share."""

    scaled: Tensor  # [MAX_ROWS, hidden]: x times the gain of a norm
    inner: Tensor  # [MAX_ROWS, inner]
    parts: Tensor  # [MAX_ROWS, programs] float32: squares of a row
    arrivals: Tensor  # int64: only grows, by whole launches of as many programs each:
    programs: int

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.scaled, self.inner, self.parts, self.arrivals))


def build_chain_workspace(shape: ChainShape, device: torch.device) -> ChainWorkspace:
    """For layers of this ``shape``, with or without one behind them."""
    arrivals = torch.zeros(1, dtype=torch.int64, device=device)
    return ChainWorkspace(
        torch.zeros(MAX_ROWS, shape.hidden, dtype=torch.bfloat16, device=device),
        torch.zeros(MAX_ROWS, shape.inner, dtype=torch.bfloat16, device=device),
        torch.zeros(MAX_ROWS, _PARTS, dtype=torch.float32, device=device),
        arrivals,
        chain_plan(shape, 1, num_multiprocessors(arrivals.device.index)).programs,
    )


def chain_rows(shape: ChainShape, sample: Tensor) -> range:
    """Numbers of rows for which a chain of such layers is made and is the faster way, as measured
    (docs/kernels.md): none on other devices, or where the weights, of which ``sample`` is one, have another dtype.

    bfloat16 alone: what is written times a norm's gain, before its scale, may leave the range of float16.
    """
    if sample.dtype != torch.bfloat16 or not suits_hopper(sample):
        return range(0)
    if not can_chain(shape, num_multiprocessors(sample.device.index)):
        return range(0)
    return range(fewest_rows(shape), MAX_ROWS + 1)


@dataclass(frozen=True, slots=True)
class NextLayer:
    """What a chain ends with: the norm and the QKV of the layer behind it."""

    gain: Tensor
    qkv: Tensor  # [outputs, hidden]
    bias: Tensor | None


class ChainLayer:
    """``x += attended Wo^T; x += (SiLU(g) * u) Wd^T, (g, u) = norm(x) Wgu^T; norm(x) Wqkv^T + b``."""

    def __init__(
        self,
        out: Tensor,
        gain: Tensor,
        gate_up: Tensor,
        down: Tensor,
        following: NextLayer | None,
        eps: float,
        workspace: ChainWorkspace,
    ) -> None:
        """Weights [outputs, inputs], contiguous, 16-bit; ``gate_up`` gate rows, then up rows. Layers that share a
        ``workspace`` must follow each other on one stream."""
        hidden, attended = out.shape
        self._shape = ChainShape(attended, hidden, down.shape[1], 0 if following is None else following.qkv.shape[0])
        self._weights = (out, gate_up, down, following.qkv if following is not None else out)
        self._gain, self._following, self._eps = gain, following, eps
        self._workspace = workspace

    def reference_(self, x: Tensor, attended: Tensor) -> Tensor | None:
        out, gate_up, down, qkv = self._weights
        wide = x.float() + linear(attended.float(), out.float())
        gate, up = linear(self._normed(wide, self._gain), gate_up.float()).chunk(2, dim=-1)
        wide += linear(silu(gate) * up, down.float())
        x.copy_(wide)
        if self._following is None:
            return None
        y = linear(self._normed(wide, self._following.gain), qkv.float())
        return (y if self._following.bias is None else y + self._following.bias.float()).to(x.dtype)

    def _normed(self, wide: Tensor, gain: Tensor) -> Tensor:
        return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self._eps) * gain.float()

    def __call__(self, x: Tensor, attended: Tensor, out: Tensor | None = None) -> Tensor | None:
        """``x`` [rows, hidden] in place, ``attended`` [rows, inputs], both contiguous; the next layer's
        [rows, outputs], None behind the last layer. 1 to 64 rows."""
        num_rows, shape = x.shape[0], self._shape
        assert x.is_contiguous()
        assert attended.is_contiguous()
        plan = chain_plan(shape, num_rows, num_multiprocessors(x.device.index))
        assert plan.programs <= self._workspace.programs <= _PARTS
        following, workspace = self._following, self._workspace
        bias = None if following is None else following.bias
        qkv = None
        if following is not None:
            qkv = x.new_empty(num_rows, shape.qkv) if out is None else out
        launch: Any = chain_kernel[(workspace.programs,)]
        boxes = (plan.hidden.box, plan.inner.box, plan.hidden.box, plan.qkv.box)
        launch(
            *(_descriptor(rows, plan.rows) for rows in (attended, workspace.scaled, workspace.inner)),
            *(_descriptor(weight, box) for weight, box in zip(self._weights, boxes, strict=True)),
            x,
            self._gain,
            self._gain if following is None else following.gain,
            x if bias is None else bias,
            workspace.scaled,
            workspace.inner,
            x if qkv is None else qkv,
            workspace.parts,
            workspace.arrivals,
            num_rows,
            self._eps,
            ATTENDED=shape.attended,
            HIDDEN=shape.hidden,
            INNER=shape.inner,
            QKV=shape.qkv,
            COLUMNS=plan.hidden.columns,
            INNER_COLUMNS=plan.inner.columns,
            QKV_COLUMNS=plan.qkv.columns,
            PAD=plan.hidden.pad,
            INNER_PAD=plan.inner.pad,
            QKV_PAD=plan.qkv.pad,
            ROWS=plan.rows,
            CHUNKS=plan.chunks,
            STAGES=plan.stages,
            SLOTS=plan.slots,
            SLOT_ROWS=plan.slot_rows,
            PARTS=max(next_power_of_2(plan.hidden.count), 32),
            HAS_BIAS=bias is not None,
            num_warps=4,
            **chain_options(x),
        )
        return qkv


def _descriptor(matrix: Tensor, rows: int) -> Any:
    """Boxes of ``rows`` rows and 64 columns, which are 128 bytes of swizzled shared memory."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, 64], layout)
