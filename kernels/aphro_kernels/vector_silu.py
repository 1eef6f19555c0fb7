"""SiLU(gate) * up of a vector, for kernels that Numba compiles: LLVM makes no vectors of that loop by itself."""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from aphro_kernels.vector_products import FLOATS, INTS, UNIT, load, store

_LIMIT: Final = 88.0  # e ** 88 is a float32, and SiLU(-88) is 0 for any bfloat16's purposes
# e ** x by powers of 2: Cephes' exp2f, of the rest between -1/2 and 1/2
_POLYNOMIAL: Final = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
    1.0,
)


@intrinsic
def silu_and_mul_lanes(typingctx, gate, up):  # type: ignore[no-untyped-def]
    """``gate[i] = gate[i] / (1 + e ** -gate[i]) * up[i]`` for the 16 float32 at these addresses; NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        gate = load(builder, args[0], FLOATS)
        # comparisons that NaN fails, so that it goes through
        low = builder.select(builder.fcmp_ordered("<", gate, _all(-_LIMIT)), _all(-_LIMIT), gate)
        exponent = builder.select(builder.fcmp_ordered(">", low, _all(_LIMIT)), _all(_LIMIT), low)
        small = _exponential(builder, builder.fmul(exponent, _all(-1.0)))
        product = builder.fmul(low, load(builder, args[1], FLOATS))
        store(builder, builder.fdiv(product, builder.fadd(small, _all(1.0))), args[0])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


def _exponential(builder: Any, x: Any) -> Any:
    power = builder.fmul(x, _all(1.4426950408889634))
    whole = _called(builder, "roundeven", power)
    rest = builder.fsub(power, whole)
    value = _all(_POLYNOMIAL[0])
    for factor in _POLYNOMIAL[1:]:
        value = _called(builder, "fma", value, rest, _all(factor))
    bits = builder.shl(builder.add(builder.fptosi(whole, INTS), _ints(127)), _ints(23))
    return builder.fmul(value, builder.bitcast(bits, FLOATS))


def _called(builder: Any, name: str, *vectors: Any) -> Any:
    full = f"llvm.{name}.v{UNIT}f32"
    function = builder.module.globals.get(full)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(FLOATS, [FLOATS] * len(vectors)), name=full)
    return builder.call(function, vectors)


def _all(value: float) -> Any:
    return ir.Constant(FLOATS, [value] * UNIT)


def _ints(value: int) -> Any:
    return ir.Constant(INTS, [value] * UNIT)
