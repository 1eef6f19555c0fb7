"""Products whose activations are rounded to 8 bits, as the checkpoint was made for (W8A8).

One arithmetic everywhere: codes of x and of W are multiplied exactly and summed in float32, then both scales. A scale
that is found for each row is that of the rank's part of the row: of the columns of o_proj and down_proj, tensor
parallel ranks round their own, so these differ between sizes by a rounding.
"""

from __future__ import annotations

from typing import Final, Protocol

import torch
from aphro_kernels.packed_linear import can_convert
from aphro_kernels.quantise_rows import RowKind, quantise_rows, round_rows
from torch import Tensor

from aphro_core.quantization.matrix import PackedMatrix, RoundedInputs

_SCALED_ROWS: Final = 64  # from here on a product of two float8 matrices takes the tensor cores' float8


class Product(Protocol):
    nbytes: int

    def __call__(self, x: Tensor) -> Tensor: ...


def row_kind(matrix: PackedMatrix) -> RowKind:
    assert matrix.kind != "int4", "int4 weights keep their activations"
    return "fp8" if matrix.kind == "fp8" else "int8"


class RoundedProduct:
    """``product`` over rounded rows, which floats of 16 bits hold exactly."""

    def __init__(self, matrix: PackedMatrix, inputs: RoundedInputs, product: Product) -> None:
        self._kind, self._scale, self._product = row_kind(matrix), inputs.scale, product
        self._float8 = matrix if _takes_float8(matrix) else None
        self.nbytes = product.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if self._float8 is not None and x.shape[0] >= _SCALED_ROWS and x.dtype == torch.bfloat16:
            return self._multiply_float8(x, self._float8)
        codes, scales = round_rows(x, self._kind, self._scale)
        return self._product(codes).mul_(scales[:, None])

    def _multiply_float8(self, x: Tensor, matrix: PackedMatrix) -> Tensor:
        codes, scales = quantise_rows(x, "fp8", self._scale)
        y: Tensor = torch._scaled_mm(
            codes, matrix.codes.t(), scale_a=scales[:, None], scale_b=matrix.scales.view(1, -1), out_dtype=x.dtype
        )
        return y


def _takes_float8(matrix: PackedMatrix) -> bool:
    """A scale a row, and sizes that the library's kernel takes."""
    is_whole = matrix.scales.shape[1] == 1 and matrix.scales.dtype == torch.float32
    fits = matrix.kind == "fp8" and matrix.shape[0] % 16 == 0 and matrix.shape[1] % 16 == 0
    return is_whole and fits and matrix.codes.is_cuda and can_convert(matrix.codes)
