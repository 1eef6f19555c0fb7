"""Every kernel takes a 1 for each integer of a launch: Triton makes a constant of it, and constants are no tensors."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any, Final

import aphro_kernels
import pytest

from tests.kernels.test_kernels import KERNELS, triton_version

pytestmark = pytest.mark.skipif(triton_version() < (3, 6), reason="tried with Triton 3.6 and 3.9")

_WORDS: Final = ("plain", "int4", "int8", "fp8", "tf32", "ieee")  # values of constants, not types
_GLUON: Final = (3, 6)
# but the number of rows, which is never made a constant
_NO_INTEGERS: Final = {"chain_kernel.chain_kernel", "packed_chain_kernel.packed_chain_kernel"}


def _descriptor(dtype: str, rows: int, columns: int) -> str:
    from aphro_kernels.hopper import gl

    bits = 8 if dtype == "fp8e4nv" else 16
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2)
    return f"tensordesc<{dtype}[{rows}, {columns}],{layout!r}>"


_ROWS = {
    **dict.fromkeys(["x", "weight", "bias", "out", "scales", "offsets"], "*bf16"),
    **{"codes": "*u8", "pieces": "*fp8e4nv", "arrivals": "*i32", "slots": "*i32", "experts": "*i32"},
    **dict.fromkeys(["row_scales", "sums", "parts"], "*fp32"),
    **dict.fromkeys(["num_rows", "n", "k", "x_stride", "ahead", "splits"], "i32"),
    **dict.fromkeys(["num_experts", "num_slots", "width", "depth", "slots_per_row", "row_bytes"], "i32"),
    **{"ROWS": 16, "BN": 64, "BK": 128, "STAGES": 3, "HAS_BIAS": True, "HAS_ASM": True, "IS_EARLY": True},
    **{"KIND": "int4", "GROUP": 32, "SPLIT": 4, "IS_EVEN": False, "IS_TILED": False, "IS_GATED": False},
}
_PLAN = {
    **{"chosen": "*i64", "shares": "*fp32", "x": "*bf16", "out": "*bf16"},
    **dict.fromkeys(["counts", "slots", "experts", "places", "used"], "*i32"),
    **dict.fromkeys(["first", "num_tokens", "num_experts", "capacity", "width", "x_stride"], "i32"),
    **{"TOP": 2, "TOKENS": 64, "EXPERTS": 8, "ROWS": 16, "PADS": 16, "IS_ALONE": False, "BLOCK": 1024},
}
_ATTENTION = {
    **dict.fromkeys(["q", "k_cache", "v_cache", "out"], "*bf16"),
    **dict.fromkeys(["block_tables", "tiles", "seq_lens", "stretches", "totals", "arrivals"], "*i32"),
    **dict.fromkeys(["q_stride", "block_rows", "table_stride"], "i32"),
    **{"scale": "fp32", "value_scale": "fp32", "parts": "*fp32", "part_weights": "*fp32"},
    **{"NUM_KV_HEADS": 8, "GROUP": 4, "HEADS": 8, "HEAD_DIM": 128, "BLOCK_SIZE": 16, "FIELDS": 8},
}
_SPLIT = {"KIND": "fp8", "GROUP": 0, "codes": "*fp8e4nv", "scales": "*fp32", "ROWS": 32, "BN": 128}
_TILES = {"GROUP": 128, "IS_TILED": True}
_PACKED: Final[dict[str, dict[str, Any]]] = {
    **{
        f"skinny_kernel.skinny_kernel {kind}": _ROWS | {"KIND": kind, "weight": codes, "IS_GATED": True}
        for kind, codes in (("int4", "*u8"), ("int8", "*i8"), ("fp8", "*u8"))
    },
    "skinny_kernel.skinny_kernel a row": _ROWS | {"KIND": "int8", "weight": "*i8", "ROWS": 1, "SPLIT": 1},
    "skinny_kernel.skinny_kernel tiles": _ROWS | _TILES | {"weight": "*u8", "BK": 512},
    "tile_kernel.tile_kernel": _ROWS | {"TILES": 32, "WARPS": 4, "AHEAD": 1, "IS_UNROLLED": True, "IS_GATED": True},
    "float8_kernel.float8_kernel": _ROWS | _SPLIT | {"IS_GATED": True},
    "float8_kernel.float8_kernel tiles": _ROWS | _TILES | {"ROWS": 32, "BN": 128},
    "grouped_gemm._grouped_linear_kernel": _ROWS
    | {"BLOCK_N": 64, "BLOCK_K": 128, "IS_GATED": True, "PRECISION": "ieee"},
    "grouped_packed._grouped_packed_kernel": _ROWS,
    "grouped_packed._grouped_packed_kernel fp8": _ROWS | {"KIND": "fp8", "GROUP": 0, "SPLIT": 1},
    "grouped_float8._grouped_float8_kernel": _ROWS | _SPLIT,
    "packed_linear._dequantise_kernel": _ROWS | {"NUM_GROUPS": 4, "BLOCK": 1024},
    "split_rows._split_rows_kernel": _ROWS | {"codes": "*u8", "scales": "*fp32", "BLOCK": 1024},
}
_EXPERTS: Final[dict[str, dict[str, Any]]] = {
    "row_tiles._count_kernel": _PLAN,
    "row_tiles._place_kernel": _PLAN,
    "route._route_kernel": _PLAN | {"logits": "*bf16", "stride": "i32", "RENORMALIZE": True, "BLOCK": 8},
    "expert_rows._spread_kernel": _PLAN,
    "expert_rows._weigh_kernel": _PLAN | {"y": "*bf16", "IS_SPREAD": True},
    "split_places._split_places_kernel": _PLAN | {"codes": "*u8", "scales": "*fp32", "k": "i32", "IS_GATED": True},
}
_WIDE = {
    **{"x": ("bf16", 64, 64), "weight": ("bf16", 128, 64), "out": ("bf16", 64, 64)},
    **{"experts": "*i32", "slots": "*i32", "used": "*i32", "row_scales": "*fp32", "scales": "*fp32"},
    **dict.fromkeys(["num_rows", "n", "k", "capacity", "num_slots"], "i32"),
    **{"ROWS": 128, "COLUMNS": 128, "INPUTS": 64, "GROUP": 16, "STAGES": 4, "IS_GATED": True, "SCALED": 128},
}
_FLOAT8 = {"x": ("fp8e4nv", 64, 128), "weight": ("fp8e4nv", 128, 128), "INPUTS": 128}
_CACHE = {"keys": ("bf16", 16, 64), "values": ("bf16", 16, 64)}
_HOPPER: Final[dict[str, dict[str, Any]]] = {  # of a descriptor its dtype and its box
    "gated_gemm.gated_kernel": _WIDE,
    "grouped_hopper.grouped_wide_kernel": _WIDE,
    "grouped_hopper_float8.grouped_float8_wide_kernel": _WIDE | _FLOAT8,
    "hopper_attention.hopper_attention_kernel": _ATTENTION | _CACHE | {"KEYS": 128, "STAGES": 2},
    "hopper_decode.hopper_decode_kernel": _ATTENTION | _CACHE | {"KEYS": 64, "STAGES": 4},
}


@pytest.mark.parametrize("name", [*KERNELS, *_PACKED, *_EXPERTS])
def test_a_kernel_takes_ones(name: str) -> None:
    _check(name, {**KERNELS, **_PACKED, **_EXPERTS}[name])


@pytest.mark.skipif(triton_version() != _GLUON, reason="Gluon changes from version to version")
@pytest.mark.parametrize("name", _HOPPER)
def test_a_kernel_in_gluon_takes_ones(name: str) -> None:
    _check(name, {key: _descriptor(*one) if isinstance(one, tuple) else one for key, one in _HOPPER[name].items()})


def test_all_kernels_are_looked_at() -> None:
    """By their names: what a launch names ends in "kernel". A new one is added to a table above."""
    found = set()
    for module in pkgutil.iter_modules(aphro_kernels.__path__):
        members = vars(importlib.import_module(f"aphro_kernels.{module.name}"))
        found |= {
            f"{module.name}.{name}"
            for name, one in members.items()
            if name.endswith("kernel") and hasattr(one, "arg_names") and one.fn.__module__.endswith(module.name)
        }
    assert found == {name.split()[0] for name in (*KERNELS, *_PACKED, *_EXPERTS, *_HOPPER)} | _NO_INTEGERS


def _check(name: str, given: dict[str, Any]) -> None:
    module, kernel_name = name.split(maxsplit=1)[0].split(".")
    kernel = getattr(importlib.import_module(f"aphro_kernels.{module}"), kernel_name)
    given = {"CHAINED": True, **given}
    integers = {one.name for one in kernel.params if given[one.name] == "i32" and not one.do_not_specialize}
    for ones in _ones(integers):
        _to_ir(kernel, given | dict.fromkeys(ones, 1))


def _ones(integers: set[str]) -> Iterator[set[str]]:
    """Each alone: constants leave out branches; and all together."""
    yield from ({integer} for integer in sorted(integers))
    if len(integers) > 1:
        yield integers


def _to_ir(kernel: Any, given: dict[str, Any]) -> None:
    """The first pass of the compiler, which runs the kernel's Python; what follows knows no 1 from another constant."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    is_type = {name: isinstance(given[name], str) and given[name] not in _WORDS for name in kernel.arg_names}
    signature = {name: given[name] if is_type[name] else "constexpr" for name in kernel.arg_names}
    constants = {(at,): given[name] for at, name in enumerate(kernel.arg_names) if not is_type[name]}
    source = (GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource)(kernel, signature, constants)
    target = GPUTarget("cuda", 90, 32)
    backend: Any = make_backend(target)
    options = backend.parse_options({"num_warps": 4})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
