"""Kernels compile for a GPU that is not here: the interpreter lets pass what a compiler does not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.test_kernels import triton_version

pytestmark = pytest.mark.skipif(triton_version() < (3, 7), reason="tried with Triton 3.7")
HOPPER = 90


def compile_for_hopper(kernel: Any, constants: dict[str, Any], **types: str) -> None:
    """``types`` of the arguments that are not constants, as Triton writes them; the others are 32-bit integers."""
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    built = build(source, target=GPUTarget("cuda", HOPPER, 32), options={"num_warps": 4, "num_stages": 4})
    assert built.metadata.shared <= 227 * 1024


@pytest.mark.parametrize(("kind", "codes"), [("int4", "*u8"), ("int8", "*i8"), ("fp8", "*u8")])
@pytest.mark.parametrize(("group", "inputs", "dtype"), [(4096, 256, "bf16"), (30, 64, "fp32")])
def test_packed_linear(kind: str, codes: str, group: int, inputs: int, dtype: str) -> None:
    from aphro_kernels.packed_linear import _packed_linear_kernel

    constants = {
        "IS_INT4": kind == "int4",
        "IS_FP8": kind == "fp8",
        "GROUP": group,
        "NUM_GROUPS": 1 if group == 4096 else 4,
        "IS_WHOLE": group == 4096,
        "ROWS": 64,
        "COLUMNS": 32,
        "INPUTS": inputs,
        "PRECISION": "ieee",
    }
    plain = dict.fromkeys(("x", "scales", "offsets", "out"), f"*{dtype}")
    compile_for_hopper(_packed_linear_kernel, constants, codes=codes, **plain)


def test_grouped_linear() -> None:
    from aphro_kernels.grouped_gemm import _grouped_linear_kernel

    constants = {"ROWS": 16, "BLOCK_N": 64, "BLOCK_K": 128, "IS_WHOLE": False, "PRECISION": "ieee"}
    plain = dict.fromkeys(("x", "weight", "out"), "*bf16")
    compile_for_hopper(_grouped_linear_kernel, constants, slots="*i32", experts="*i32", **plain)
