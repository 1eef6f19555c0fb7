"""Kernels compile for a GPU that is not here: the interpreter lets pass what a compiler does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from aphro_kernels.row_tiles import RowTiles

from tests.kernels.test_kernels import triton_version

pytestmark = pytest.mark.skipif(triton_version() < (3, 7), reason="tried with Triton 3.7")
HOPPER = 90
SHARED = {HOPPER: 227, 86: 99}  # KiB that a program may have; those of 86 also on 89 and 120


def compile_for(kernel: Any, constants: dict[str, Any], *, target: int = HOPPER, **types: str) -> Any:
    """``types`` of the arguments that are not constants, as Triton writes them; the others are 32-bit integers."""
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    built = build(source, target=GPUTarget("cuda", target, 32), options={"num_warps": 4, "num_stages": 4})
    assert built.metadata.shared <= SHARED[target] * 1024
    return built


@pytest.mark.parametrize(("kind", "codes"), [("int4", "*u8"), ("int8", "*i8"), ("fp8", "*u8")])
@pytest.mark.parametrize(
    ("rows", "columns", "group", "dtype"), [(1, 16, 0, "bf16"), (64, 64, 128, "bf16"), (8, 16, 32, "fp16")]
)
def test_packed_linear(kind: str, codes: str, rows: int, columns: int, group: int, dtype: str) -> None:
    from aphro_kernels.skinny_kernel import skinny_kernel

    constants = {
        "ROWS": 8 if kind == "int4" and rows == 1 else rows,
        "BN": columns,
        "BK": 4 * group or 256,
        "SPLIT": 4 if group else 1,
        "IS_EVEN": group == 0,
        "IS_EARLY": True,
        "STAGES": 4,
        "IS_GATED": rows == 64,
        "HAS_BIAS": True,
        "KIND": kind,
        "GROUP": 256 if kind == "int4" and not group else group,
        "IS_TILED": kind == "int4" and group == 128,
        "HAS_ASM": True,
        "CHAINED": True,
    }
    plain = dict.fromkeys(("x", "bias", "out"), f"*{dtype}")
    others = {"parts": "*fp32", "arrivals": "*i32", **dict.fromkeys(("scales", "offsets"), "*fp32")}
    compile_for(skinny_kernel, constants, weight=codes, **plain, **others)


@pytest.mark.parametrize(("kind", "codes", "group"), [("fp8", "*fp8e4nv", 0), ("int4", "*u8", 128)])
def test_split_rows_take_the_float8_tensor_cores(kind: str, codes: str, group: int) -> None:
    from aphro_kernels.float8_kernel import float8_kernel

    constants = {
        "ROWS": 32,
        "BN": 128,
        "STAGES": 4,
        "IS_GATED": group == 0,
        "HAS_BIAS": True,
        "KIND": kind,
    }
    floats = dict.fromkeys(("row_scales", "sums", "parts"), "*fp32")
    plain = dict.fromkeys(("bias", "out"), "*bf16")
    types = {"pieces": "*fp8e4nv", "codes": codes, "scales": "*bf16" if group else "*fp32", "arrivals": "*i32"}
    options = constants | {"KIND": kind, "GROUP": group, "HAS_ASM": True, "CHAINED": True}
    built = compile_for(float8_kernel, options, **types, **floats, **plain)
    assert "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3" in built.asm["ptx"]
    assert "cvt.rn.f16x2.e4m3x2" not in built.asm["ptx"], "no code is decoded"


@pytest.mark.parametrize(("is_gated", "dtype"), [(True, "bf16"), (False, "fp16")])
def test_tiles_are_decoded_where_they_are_loaded(is_gated: bool, dtype: str) -> None:
    """No value changes its thread before the sums of the warps: no shuffle and no shared memory but for these. (Triton
    3.9 moves the second matrix of a gated layer through shared memory, 3.6 does not.)"""
    from aphro_kernels.tile_kernel import tile_kernel

    constants = {"TILES": 32, "WARPS": 4, "AHEAD": 0, "IS_UNROLLED": False, "IS_GATED": is_gated, "HAS_BIAS": True}
    plain = dict.fromkeys(("x", "scales", "bias", "out"), f"*{dtype}")
    built = compile_for(tile_kernel, constants | {"HAS_ASM": True, "CHAINED": True}, codes="*u8", **plain)
    loop = built.asm["ptx"].split("mma.sync")
    assert len(loop) == 1 + 8 * (3 if is_gated else 2)
    alone = loop[1:16]  # products of the first matrix and of ones
    assert not any(word in between for between in alone for word in ("shfl", "st.shared", "bar.sync"))


@pytest.mark.parametrize(("rows", "is_even", "is_gated"), [(1, True, True), (16, False, True), (64, False, False)])
def test_grouped_linear(rows: int, is_even: bool, is_gated: bool) -> None:
    from aphro_kernels.grouped_gemm import _grouped_linear_kernel

    tile = {"ROWS": rows, "BLOCK_N": 8 if rows == 1 else 64, "BLOCK_K": 512 if rows == 1 else 128, "STAGES": 3}
    constants = {**tile, "IS_EVEN": is_even, "IS_GATED": is_gated, "PRECISION": "tf32", "CHAINED": True}
    plain = dict.fromkeys(("x", "weight", "out"), "*bf16")
    compile_for(_grouped_linear_kernel, constants, slots="*i32", experts="*i32", **plain)


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (32, torch.bfloat16)])
def test_grouped_linear_fits_smaller_gpus(rows: int, dtype: torch.dtype) -> None:
    from aphro_kernels.grouped_gemm import _config, _grouped_linear_kernel

    none = torch.empty(0, dtype=torch.int32)
    config = _config(torch.empty(1, 4096, dtype=dtype), RowTiles(none, none, none, none, rows, 0))
    tile = {"ROWS": rows, "BLOCK_N": config.columns, "BLOCK_K": config.inputs, "STAGES": config.num_stages}
    precision = "ieee" if dtype == torch.float32 else "tf32"
    constants = {**tile, "IS_EVEN": True, "IS_GATED": True, "PRECISION": precision, "CHAINED": False}
    plain = dict.fromkeys(("x", "weight", "out"), "*fp32" if dtype == torch.float32 else "*bf16")
    compile_for(_grouped_linear_kernel, constants, target=86, slots="*i32", experts="*i32", **plain)
