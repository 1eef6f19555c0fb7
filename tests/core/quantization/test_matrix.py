"""Matrices in memory: what they stand for, quantising while loading, and products against the dequantised reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from aphro_kernels.cpu_packed_linear import CpuPackedLinear
from aphro_kernels.quantise_rows import quantise_rows_reference
from torch import Tensor
from torch.nn.functional import linear

from aphro_core import host
from aphro_core.models.quantization import Kind
from aphro_core.quantization import kernel_linear
from aphro_core.quantization.linear import Int4Product, Int8Product, QuantizedLinear, build_product
from aphro_core.quantization.matrix import FP8, PackedMatrix, RoundedInputs, below_each_other, with_common_inputs
from aphro_core.quantization.online import quantise
from aphro_core.quantization.packing import pack_nibbles, unpack_nibbles, unpack_words

KINDS: tuple[tuple[Kind, int | None], ...] = (("int4", 32), ("int4", 6), ("int8", None), ("int8", 32), ("fp8", None))


def weights(rows: int = 48, columns: int = 192, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "group"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_errs_by_half_a_step_at_most(kind: Kind, group: int | None, dtype: torch.dtype) -> None:
    weight = weights()
    matrix = quantise(weight, kind, group, torch.float32)
    grouped = weight.view(len(weight), -1, group or weight.shape[1])
    largest = grouped.abs().amax(dim=-1, keepdim=True)
    span = grouped.amax(dim=-1, keepdim=True) - grouped.amin(dim=-1, keepdim=True)
    step = {"int4": span / 15 / 2, "int8": largest / 127 / 2, "fp8": grouped.abs() / 16 + largest / 448 / 512}[kind]
    rounding = 0.0 if dtype == torch.float32 else 2.0**-7
    error = (matrix.dequantise(dtype).float().view_as(grouped) - grouped).abs()
    assert bool((error <= step * 1.001 + largest * (rounding + 1e-6)).all())


def test_equal_weights_of_a_group_are_exact() -> None:
    weight = torch.full((2, 64), 0.7)
    weight[1, :32] = 0.0
    for kind in ("int4", "int8"):
        assert torch.allclose(quantise(weight, kind, 32, torch.float32).dequantise(torch.float32), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_float8_is_widened_exactly(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    finite = ~codes.view(FP8).float().isnan()
    matrix = PackedMatrix("fp8", codes.view(FP8), torch.ones(1, 1, dtype=dtype))
    assert torch.equal(matrix.dequantise(dtype)[finite], codes.view(FP8).to(dtype)[finite])


def test_nibbles_and_words_come_back() -> None:
    codes = torch.randint(0, 16, (5, 24), dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)
    word = torch.tensor([[-(2**31) + 0x07654321]], dtype=torch.int32)
    assert unpack_words(word, 4, 1).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert unpack_words(word, 8, 0)[:, 0].tolist() == [0x21, 0x43, 0x65, 0x87]


@pytest.mark.parametrize(("kind", "group"), KINDS)
@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_kernels", [False, True])
def test_a_product_is_that_of_the_dequantised_matrix(
    kind: Kind, group: int | None, num_rows: int, dtype: torch.dtype, has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_kernels = has_kernels and host.has_product_kernels()
    monkeypatch.setattr(host, "has_product_kernels", lambda: has_kernels)
    matrices = [quantise(weights(seed=seed), kind, group, dtype) for seed in range(2)]
    matrices.append(quantise(weights(40, seed=3), "int8", 16, dtype))
    bias = torch.randn(136).to(dtype)
    x = torch.randn(num_rows, 192).to(dtype)
    layer = QuantizedLinear(below_each_other(matrices), bias, dtype)
    whole = torch.cat([matrix.dequantise(torch.float32) for matrix in matrices])
    expected = linear(x.float(), whole, bias.float())
    error = (layer(x).float() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.015)  # bfloat16 may be kept in 8 bits a row


@pytest.mark.parametrize(("kind", "group"), [("int4", 128), ("int4", 32), ("int8", 16), ("fp8", None)])
def test_a_large_matrix_is_dequantised_part_by_part(
    kind: Kind, group: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU does with a head; int4 in groups of 128 is in tiles."""
    monkeypatch.setattr(kernel_linear, "DEQUANTISED_AT_ONCE", 40 * 256)
    matrix, x, bias = quantise(weights(112, 256), kind, group, torch.float32), torch.randn(3, 256), torch.randn(112)
    assert matrix.for_kernels().is_tiled == (group == 128)
    found = kernel_linear.KernelProduct(matrix, bias, None)(x)
    torch.testing.assert_close(found, linear(x, matrix.dequantise(torch.float32), bias), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arrangement", ["", "order", "groups"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bits_with_zero_points(arrangement: str, dtype: torch.dtype) -> None:
    """GPTQ and W8A16 without symmetry: products of codes and of offsets, also in act-order."""
    plain = quantise(weights(), "int8", 32, dtype)
    matrix = replace(plain, offsets=(torch.rand(48, 6) * plain.scales.float() * 30).to(dtype))
    if arrangement == "order":
        matrix = replace(matrix, order=torch.randperm(192).to(torch.int32))
    elif arrangement == "groups":
        matrix = replace(matrix, group_index=(torch.randperm(192) // 32).to(torch.int32))
    assert len(below_each_other([plain, matrix])) == 2
    x = torch.randn(5, 192).to(dtype)
    expected = linear(x.float(), matrix.dequantise(torch.float32))
    error = (QuantizedLinear([matrix], None, dtype)(x).float() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.015)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("scale", [None, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_activations(kind: Kind, scale: float | None, dtype: torch.dtype) -> None:
    """The product of rounded rows with the dequantised weights; one row is zeros, one beyond a stored scale."""
    matrices = [quantise(weights(seed=seed), kind, None, torch.float32) for seed in range(2)]
    matrices = [replace(matrix, inputs=RoundedInputs(scale)) for matrix in matrices]
    (matrix,) = below_each_other(matrices)
    x = torch.randn(9, 192).to(dtype)
    x[3], x[4] = 0.0, x[4] * 20
    codes, scales = quantise_rows_reference(x, kind, scale)
    assert codes.dtype == (torch.int8 if kind == "int8" else FP8)
    rounded = codes.float() * scales[:, None]
    if scale is None:
        assert bool(((rounded - x.float()).abs() <= x.float().abs().amax(-1, keepdim=True) / 25).all())
    else:
        assert float(rounded.abs().max()) <= scale * (127 if kind == "int8" else 448) + 1e-6
    expected = linear(rounded, matrix.dequantise(torch.float32))
    found = QuantizedLinear([matrix], None, dtype)(x)
    assert found.dtype == dtype
    error = (found.float() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.02)  # bfloat16 may keep float8 weights in 8 bits a row


def test_experts_share_the_largest_stored_scale() -> None:
    parts = [replace(quantise(weights(), "fp8", None, torch.float32), inputs=RoundedInputs(s)) for s in (0.1, 0.3)]
    assert len(below_each_other(parts)) == 2
    (whole,) = below_each_other(with_common_inputs(parts))
    assert whole.inputs == RoundedInputs(0.3)


def test_the_operation_goes_by_kind_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "has_product_kernels", lambda: False)
    int4, int8 = quantise(weights(), "int4", 32, torch.bfloat16), quantise(weights(), "int8", None, torch.bfloat16)
    assert isinstance(build_product(int4, torch.bfloat16), Int4Product)
    assert isinstance(build_product(int8, torch.bfloat16), Int8Product)
    assert not isinstance(build_product(int4, torch.float32), Int4Product)
    ungrouped = PackedMatrix("int4", int4.codes, int4.scales, int4.offsets, torch.zeros(192, dtype=torch.int32))
    assert isinstance(build_product(ungrouped, torch.bfloat16), Int8Product)
    grouped = build_product(quantise(weights(), "int8", 32, torch.bfloat16), torch.bfloat16)
    assert isinstance(grouped, Int8Product)
    assert grouped.nbytes < 1.03 * 48 * 192


@pytest.mark.skipif(not host.has_product_kernels(), reason="this CPU has no AVX512-VNNI")
def test_what_our_own_product_takes() -> None:
    """int4 and int8 in groups of 16 and more as they are, the rest in 8 bits a row."""
    for kind, group, bits in (("int4", 32, 4), ("int8", 16, 8), ("int8", None, 8), ("int4", 6, 8), ("fp8", None, 8)):
        product = build_product(quantise(weights(), kind, group, torch.float16), torch.bfloat16)
        assert isinstance(product, CpuPackedLinear)
        scales = {32: 2 * 2 * 48 * 6, 16: 2 * 48 * 12}.get(group or 0, 4 * 48)
        assert product.nbytes * 48 // 64 == 48 * 192 * bits // 8 + scales  # rows are padded to 64
    assert isinstance(
        build_product(quantise(weights(columns=24), "int8", None, torch.float32), torch.bfloat16), Int8Product
    )
    assert not isinstance(build_product(quantise(weights(), "int4", 32, torch.float32), torch.float32), CpuPackedLinear)


def test_neighbours_of_one_kind_become_one_matrix() -> None:
    alike = [quantise(weights(seed=seed), "int4", 32, torch.float32) for seed in (0, 1)]
    other = quantise(weights(seed=2), "int8", 16, torch.float32)
    found = below_each_other([*alike, other])
    assert [(matrix.kind, matrix.shape) for matrix in found] == [("int4", (96, 192)), ("int8", (48, 192))]
    whole = torch.cat([matrix.dequantise(torch.float32) for matrix in alike])
    assert torch.equal(found[0].dequantise(torch.float32), whole)
