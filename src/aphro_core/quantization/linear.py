"""``y = x W^T + b`` over quantised weights, by the operation that the device has for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from aphro_kernels.cpu_packed_linear import CpuPackedLinear, block_of
from aphro_kernels.packed_linear import PackedWeight
from aphro_kernels.silu_and_mul import silu_and_mul
from aphro_kernels.skinny_linear import SkinnyWorkspace
from torch import Tensor
from torch.nn.functional import linear

from aphro_core import host
from aphro_core.quantization.kernel_linear import KernelProduct
from aphro_core.quantization.matrix import PackedMatrix
from aphro_core.quantization.online import quantise
from aphro_core.quantization.packing import unpack_nibbles
from aphro_core.quantization.rounded import Product, RoundedProduct

_TILE: Final = 2**20  # weights that are dequantised at once on a CPU: what is multiplied next is still in its cache
_INT4_GROUPS: Final = (32, 64, 128, 256)  # that torch's int4 product takes
_INT4_ROWS: Final = 32  # up to here it beats dequantising; above, dequantising is shared by more rows
_INT8_ROWS: Final = 8


class QuantizedLinear:
    """A shard of a linear layer, called as ``layers.linear.Linear``. ``matrices`` are below each other."""

    def __init__(
        self,
        matrices: Sequence[PackedMatrix],
        bias: Tensor | None,
        dtype: torch.dtype,
        workspace: SkinnyWorkspace | None = None,
    ) -> None:
        """``workspace``: on GPUs, of the stream that the calls follow each other on."""
        self._kernel: KernelProduct | None = None
        if len(matrices) == 1 and _takes_kernel(matrices[0]):
            self._kernel, self._products, self._bias = KernelProduct(matrices[0], bias, workspace), [], None
            return
        self._products = [build_product(matrix, dtype, workspace) for matrix in matrices]
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """``[rows, in_features]`` to ``[rows, out_features]``, the dtype of ``x``."""
        if self._kernel is not None:
            return self._kernel(x)
        parts = [product(x) for product in self._products]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y if self._bias is None else y.add_(self._bias)

    def gated(self, x: Tensor) -> Tensor:
        """SiLU(gate) * up of weights that hold the rows of the gate, then those of up."""
        if self._kernel is not None:
            return self._kernel.gated(x)
        only = self._products[0]
        if isinstance(only, CpuPackedLinear) and len(self._products) == 1 and self._bias is None and only.can_gate:
            return only.gated(x)
        return silu_and_mul(self(x))

    @property
    def packed(self) -> tuple[PackedWeight, Tensor | None] | None:
        """Weight and bias of a layer on a GPU that is one matrix for the kernels."""
        return None if self._kernel is None else self._kernel.parts

    @property
    def packed_bytes(self) -> int:
        if self._kernel is not None:
            return self._kernel.nbytes
        return sum(product.nbytes for product in self._products)


def _takes_kernel(matrix: PackedMatrix) -> bool:
    return matrix.inputs is None and matrix.codes.is_cuda and matrix.suits_kernels and matrix.order is None


def build_product(matrix: PackedMatrix, dtype: torch.dtype, workspace: SkinnyWorkspace | None = None) -> Product:
    if matrix.inputs is not None:
        plain = build_product(replace(matrix, inputs=None), dtype, workspace)
        return RoundedProduct(matrix, matrix.inputs, plain)
    if matrix.order is not None:
        return OrderedProduct(matrix, dtype, workspace)
    if matrix.kind == "int8" and matrix.offsets is not None and matrix.group_index is None:
        return OffsetProduct(replace(matrix, offsets=None), matrix.offsets, dtype, workspace)
    if matrix.codes.device.type == "cpu" and dtype == torch.bfloat16:
        return _build_bfloat16_product(matrix)
    return KernelProduct(matrix, None, workspace) if _takes_kernel(matrix) else DequantisedProduct(matrix)


def _build_bfloat16_product(matrix: PackedMatrix) -> Product:
    """On CPUs."""
    if host.has_product_kernels() and (product := build_cpu_product(matrix)) is not None:
        return product
    return Int4Product(matrix) if _suits_int4(matrix) else Int8Product(in_rows(matrix))


def scale_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What scales of groups are kept in, in a run of ``dtype``: 16 bits where that has as many."""
    is_ours = device.type == "cpu" and dtype == torch.bfloat16 and host.has_product_kernels()
    return torch.float16 if is_ours else dtype  # most files have them in it; bfloat16 would cut off three bits


def build_cpu_product(matrix: PackedMatrix) -> CpuPackedLinear | None:
    """Our own product for bfloat16 activations, which it quantises; what it cannot take is put into 8 bits a row
    first. None where not even that has blocks of a size it takes."""
    if matrix.kind == "fp8" or matrix.group_index is not None or block_of(*_sizes(matrix)) is None:
        matrix = in_rows(matrix)
    if block_of(*_sizes(matrix)) is None:
        return None
    codes = unpack_nibbles(matrix.codes) if matrix.kind == "int4" else matrix.codes
    return CpuPackedLinear(codes, matrix.scales, matrix.offsets)


def _sizes(matrix: PackedMatrix) -> tuple[int, int]:
    """(columns, groups of them)."""
    return matrix.shape[1], matrix.scales.shape[1]


class OrderedProduct:
    """Act-order: the inputs are put into the order of the columns first."""

    def __init__(self, matrix: PackedMatrix, dtype: torch.dtype, workspace: SkinnyWorkspace | None) -> None:
        assert matrix.order is not None
        self._order = matrix.order
        self._product = build_product(replace(matrix, order=None), dtype, workspace)
        self.nbytes = self._product.nbytes + matrix.order.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x.index_select(1, self._order))


class OffsetProduct:
    """8 bits with zero points: the codes' product, and that of the offsets with the sums of each group's inputs."""

    def __init__(
        self, matrix: PackedMatrix, offsets: Tensor, dtype: torch.dtype, workspace: SkinnyWorkspace | None
    ) -> None:
        self._product, self._offsets = build_product(matrix, dtype, workspace), offsets.to(dtype)
        self.nbytes = self._product.nbytes + self._offsets.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        sums = x.reshape(len(x), self._offsets.shape[1], -1).sum(dim=-1, dtype=torch.float32)
        return self._product(x).add_(linear(sums.to(x.dtype), self._offsets))


class DequantisedProduct:
    """Dequantises a tile of rows at a time into 16 or 32 bits and multiplies: any kind, any device."""

    def __init__(self, matrix: PackedMatrix) -> None:
        self._matrix = matrix
        self.nbytes = matrix.nbytes
        num_rows, num_columns = matrix.shape
        is_cpu = matrix.codes.device.type == "cpu"
        self._step = max(_TILE // num_columns, 1) if is_cpu else num_rows

    def __call__(self, x: Tensor) -> Tensor:
        num_rows = self._matrix.shape[0]
        if self._step >= num_rows:
            return linear(x, self._matrix.dequantise(x.dtype))
        y = x.new_empty(x.shape[0], num_rows)
        for start in range(0, num_rows, self._step):
            tile = self._matrix.rows(start, min(start + self._step, num_rows))
            y[:, start : start + self._step] = linear(x, tile.dequantise(x.dtype))
        return y


class Int4Product:
    """torch's int4 product for CPUs, for few rows; it wants weight = (code - 8) * scale + zero, in bfloat16."""

    def __init__(self, matrix: PackedMatrix) -> None:
        assert matrix.offsets is not None
        self._group = matrix.group_size
        codes = unpack_nibbles(matrix.codes).to(torch.int32)
        self._codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        zeros = matrix.offsets.float() + 8.0 * matrix.scales.float()
        pairs = torch.stack((matrix.scales.float(), zeros), dim=-1)
        self._scales = pairs.transpose(0, 1).to(torch.bfloat16).contiguous()  # [groups, rows, 2]
        self._many = DequantisedProduct(matrix)
        self.nbytes = self._codes.nbytes + self._scales.nbytes + self._many.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] > _INT4_ROWS:
            return self._many(x)
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), self._codes, self._group, self._scales)
        return y


class Int8Product:
    """torch's product of bfloat16 with int8 rows, for few rows; many multiply the codes, then scale the outcome."""

    def __init__(self, matrix: PackedMatrix) -> None:
        self._codes, self._scales = matrix.codes, matrix.scales[:, 0].to(torch.bfloat16)
        self._step = max(_TILE // self._codes.shape[1], 1)
        self.nbytes = self._codes.nbytes + self._scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] <= _INT8_ROWS:
            y: Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), self._codes, self._scales)
            return y
        y = x.new_empty(x.shape[0], len(self._codes))
        for start in range(0, len(self._codes), self._step):
            rows = slice(start, start + self._step)
            y[:, rows] = linear(x, self._codes[rows].to(x.dtype)).mul_(self._scales[rows])
        return y


def _suits_int4(matrix: PackedMatrix) -> bool:
    is_grouped = matrix.group_index is None and matrix.group_size in _INT4_GROUPS
    return matrix.kind == "int4" and is_grouped and matrix.shape[0] % 16 == 0


def in_rows(matrix: PackedMatrix) -> PackedMatrix:
    """8 bits and a scale a row: what torch multiplies on CPUs. A CPU has no product for the other groupings, and
    dequantising for each step would read the weights several times."""
    if matrix.kind == "int8" and matrix.scales.shape[1] == 1:
        return matrix
    return quantise(matrix.dequantise(torch.float32), "int8", None, torch.float32)
