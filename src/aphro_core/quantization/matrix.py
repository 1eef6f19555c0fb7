"""A quantised matrix as it is kept in memory: codes, and a scale (and offset) for each group of a row's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from aphro_kernels.float8 import FLOAT8, widen_float8
from aphro_kernels.packed_linear import PackedWeight, dequantise, halve_groups, in_tiles
from torch import Tensor

from aphro_core.models.quantization import Kind
from aphro_core.quantization.packing import unpack_nibbles

FP8 = FLOAT8


@dataclass(frozen=True, slots=True)
class RoundedInputs:
    """Activations are rounded to codes of the weights' kind, too: by ``scale``, or (None) each row by its own."""

    scale: float | None


@dataclass(slots=True)
class PackedMatrix:
    """[rows, columns]: weight = code * scale (+ offset), with as many groups of equal size as ``scales`` has columns.

    ``codes``: two a byte for int4 [rows, columns / 2] uint8, else [rows, columns] int8 or float8_e4m3fn. ``scales`` and
    ``offsets`` (int4, and int8 with zero points of its own) [rows, groups]. Act-order: with ``order`` [columns] int32
    column j is input ``order[j]``; where a rank has part of the groups, with ``group_index`` [columns] int32 column j
    is of group ``group_index[j]``.
    """

    kind: Kind
    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    group_index: Tensor | None = None
    order: Tensor | None = None
    inputs: RoundedInputs | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * (2 if self.kind == "int4" else 1)

    @property
    def group_size(self) -> int:
        """Columns of a group; with ``group_index`` groups are not of one size."""
        return self.shape[1] // self.scales.shape[1]

    @property
    def tensors(self) -> list[Tensor]:
        found = (self.codes, self.scales, self.offsets, self.group_index, self.order)
        return [tensor for tensor in found if tensor is not None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def suits_kernels(self) -> bool:
        """Whether ``for_kernels`` has it: groups follow each other, and only int4 has offsets."""
        return self.group_index is None and (self.offsets is None or self.kind == "int4")

    def rows(self, start: int, stop: int) -> PackedMatrix:
        """Some rows, as views."""
        offsets = None if self.offsets is None else self.offsets[start:stop]
        return replace(self, codes=self.codes[start:stop], scales=self.scales[start:stop], offsets=offsets)

    def zeros(self, num_rows: int) -> PackedMatrix:
        """So many rows that stand for zeros, kept in the same way."""
        codes, scales = (each.new_zeros(num_rows, each.shape[1]) for each in (self.codes, self.scales))
        offsets = None if self.offsets is None else self.offsets.new_zeros(num_rows, self.offsets.shape[1])
        return replace(self, codes=codes, scales=scales, offsets=offsets)

    def rows_at(self, numbers: Tensor) -> PackedMatrix:
        """The rows of these numbers [num_rows], as a copy."""
        offsets = None if self.offsets is None else self.offsets[numbers]
        return replace(self, codes=self.codes[numbers], scales=self.scales[numbers], offsets=offsets)

    def to(self, device: torch.device) -> PackedMatrix:
        offsets, group_index, order = (
            None if x is None else x.to(device) for x in (self.offsets, self.group_index, self.order)
        )
        codes, scales = self.codes.to(device), self.scales.to(device)
        return PackedMatrix(self.kind, codes, scales, offsets, group_index, order, self.inputs)

    def for_kernels(self) -> PackedWeight:
        """As the kernels read it: int4 codes in another order, which is a copy, and in tiles where sizes allow."""
        assert self.suits_kernels
        codes = halve_groups(self.codes, self.group_size) if self.kind == "int4" else self.codes
        return in_tiles(PackedWeight(codes.contiguous(), self.scales.contiguous(), self.offsets))

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """``[rows, inputs]`` in ``dtype``; products in the dtype of the scales or float32, whichever is finer."""
        values = self._values(dtype)
        return values if self.order is None else values[:, self.order.argsort()]

    def _values(self, dtype: torch.dtype) -> Tensor:
        num_rows, num_columns = self.shape
        if self.codes.is_cuda and self.suits_kernels:
            return dequantise(self.for_kernels(), dtype)
        codes = unpack_nibbles(self.codes) if self.kind == "int4" else self.codes
        wide = _widened(codes, dtype if self.scales.dtype == dtype else torch.float32)
        if self.group_index is not None:
            index = self.group_index.long()
            values = wide * self.scales[:, index]
            return (values if self.offsets is None else values + self.offsets[:, index]).to(dtype)
        grouped = wide.view(num_rows, self.scales.shape[1], -1)
        values = grouped.mul_(self.scales[..., None])
        if self.offsets is not None:
            values = values.add_(self.offsets[..., None])
        return values.view(num_rows, num_columns).to(dtype)


Weights = dict[str, Tensor | list[PackedMatrix]]  # of a rank; matrices stand below each other


def below_each_other(parts: Sequence[PackedMatrix]) -> list[PackedMatrix]:
    """Matrices with the same columns as few as possible: neighbours of one kind and grouping become one."""
    merged: list[list[PackedMatrix]] = []
    for part in parts:
        if merged and _are_alike(merged[-1][0], part):
            merged[-1].append(part)
        else:
            merged.append([part])
    return [_joined(run) for run in merged]


def cut_rows(matrices: Sequence[PackedMatrix], num_parts: int) -> list[list[PackedMatrix]]:
    """Matrices below each other in parts of equally many rows, as views."""
    parts: list[list[PackedMatrix]] = [[] for _ in range(num_parts)]
    each, at = sum(matrix.shape[0] for matrix in matrices) // num_parts, 0
    for matrix in matrices:
        start = 0
        while start < matrix.shape[0]:
            part, inside = divmod(at, each)
            stop = min(matrix.shape[0], start + each - inside)
            parts[part].append(matrix.rows(start, stop))
            start, at = stop, at + stop - start
    return parts


def with_common_inputs(parts: Sequence[PackedMatrix]) -> list[PackedMatrix]:
    """Of a rank's experts, whose rows are rounded together: the largest stored scale, so that nothing is cut off."""
    scales = [part.inputs.scale for part in parts if part.inputs is not None and part.inputs.scale is not None]
    if len(scales) < len(parts) or not scales:
        return list(parts)
    return [replace(part, inputs=RoundedInputs(max(scales))) for part in parts]


def _are_alike(a: PackedMatrix, b: PackedMatrix) -> bool:
    if (a.order is None) != (b.order is None) or (
        a.order is not None and b.order is not None and not torch.equal(a.order, b.order)
    ):
        return False
    alike = a.kind == b.kind and a.scales.shape[1] == b.scales.shape[1] and a.scales.dtype == b.scales.dtype
    alike = alike and a.inputs == b.inputs and (a.offsets is None) == (b.offsets is None)
    if a.group_index is None or b.group_index is None:
        return alike and a.group_index is b.group_index
    return alike and torch.equal(a.group_index, b.group_index)


def _joined(run: Sequence[PackedMatrix]) -> PackedMatrix:
    if len(run) == 1:
        return run[0]
    offsets = [part.offsets for part in run if part.offsets is not None]
    return replace(
        run[0],
        codes=torch.cat([part.codes for part in run]),
        scales=torch.cat([part.scales for part in run]),
        offsets=torch.cat(offsets) if offsets else None,
    )


def _widened(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return widen_float8(codes, dtype) if codes.dtype == FP8 else codes.to(dtype)
