"""Products of 4- and 8-bit weights on a CPU against the dequantised weight: every grouping, odd sizes, NaN before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from aphro_kernels.cpu_packed_linear import CpuPackedLinear, block_of, cpu_packed_linear_reference
from torch import Tensor

from aphro_core import host

pytestmark = pytest.mark.skipif(not host.has_product_kernels(), reason="this CPU has no AVX512-VNNI, or has AMX")
KINDS = [  # bits, columns of a group (None: all), dtype of the scales; each is compiled
    (4, 32, torch.float16),
    (4, 64, torch.bfloat16),
    (8, 16, torch.float16),
    (8, None, torch.float32),
]
kinds = pytest.mark.parametrize(("bits", "group", "dtype"), KINDS)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def build(bits: int, group: int | None, dtype: torch.dtype, rows: int, columns: int) -> tuple[CpuPackedLinear, Tensor]:
    """A product and its weight, dequantised."""
    generator = torch.Generator().manual_seed(rows + columns)
    shape = (rows, columns // (group or columns))
    scales = (torch.rand(shape, generator=generator) * 0.1 + 0.01).to(dtype)
    offsets = (torch.randn(shape, generator=generator) * 0.5).to(dtype) if bits == 4 else None
    low, high, kind = (0, 16, torch.uint8) if bits == 4 else (-128, 128, torch.int8)
    codes = torch.randint(low, high, (rows, columns), generator=generator, dtype=kind)
    weight = codes.float().view(*shape, -1) * scales.float()[..., None]
    weight = weight if offsets is None else weight + offsets.float()[..., None]
    return CpuPackedLinear(codes, scales, offsets), weight.view(rows, columns)


def inputs(rows: int, columns: int) -> Tensor:
    """Rows with NaN behind each; one block is all zeros."""
    x = torch.full((rows, columns + 6), float("nan")).bfloat16()
    x[:, :columns] = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    x[-1, :32] = 0
    return x[:, :columns]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@kinds
@pytest.mark.parametrize("num_rows", [1, 3, 4, 5, 97])
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (40, 192), (96, 320)])
def test_equals_its_reference(
    bits: int, group: int | None, dtype: torch.dtype, num_rows: int, rows: int, columns: int
) -> None:
    """Up to bfloat16's rounding of the answer and codes that lie between two."""
    product, weight = build(bits, group, dtype, rows, columns)
    x, block = inputs(num_rows, columns), block_of(columns, columns // (group or columns))
    assert block == (group or 32 if bits == 8 else 32)
    expected = cpu_packed_linear_reference(x.contiguous(), weight, block)
    assert error(product(x), expected) < 0.004
    if product.can_gate:
        gated = cpu_packed_linear_reference(x.contiguous(), weight, block, is_gated=True)
        assert error(product.gated(x), gated) < 0.01


@kinds
def test_quantising_the_activations_costs_less_than_a_percent(bits: int, group: int | None, dtype: torch.dtype) -> None:
    product, weight = build(bits, group, dtype, 96, 1536)
    x = inputs(30, 1536)
    centred = weight - weight.mean(dim=1, keepdim=True)  # a common summand of a row would hide the rest
    assert error(product(x).float() - x.float() @ (weight - centred).T, x.float() @ centred.T) < 0.01


@kinds
def test_a_row_has_the_same_bits_alone_and_among_others(bits: int, group: int | None, dtype: torch.dtype) -> None:
    product, _ = build(bits, group, dtype, 96, 192)
    x = inputs(101, 192)
    together = product(x)
    for row in range(0, len(x), 7):
        assert torch.equal(product(x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    product, _ = build(4, 32, torch.float16, 32, 64)
    x = inputs(2, 64)
    x[0, 40] = bad
    assert not product(x)[0].isfinite().any()
    assert product(x)[1].isfinite().all()


def test_blocks_for_groups() -> None:
    assert [block_of(192, groups) for groups in (1, 3, 6, 12, 24, 5)] == [32, 32, 32, 16, None, None]
    assert block_of(48, 1) == 16
