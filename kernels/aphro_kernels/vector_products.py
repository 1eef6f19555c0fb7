"""Tiles of products for kernels that Numba compiles: bfloat16 pairs by AVX512-BF16, and what all tiles are made of.

A weight lies in *units* of 16 rows, whose columns come in turns of as many bytes as one lane takes, so that one load
feeds 16 sums and a value of ``x`` is spread over all lanes. A tile's sums stay in registers over all columns. The
instructions are written as assembler: LLVM changes the names and types of these intrinsics from version to version.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

llvmlite.binding.initialize_native_asmparser()

UNIT: Final = 16  # lanes of a vector: rows of a weight that are multiplied at once
TILE_ROWS: Final = 8  # rows of ``x`` at once: with two units 16 sums, enough to keep the multipliers busy

_ADDRESS = types.intp
_BYTE, INT32 = ir.IntType(8), ir.IntType(32)
FLOATS, INTS = ir.VectorType(ir.FloatType(), UNIT), ir.VectorType(INT32, UNIT)
LINE_BYTES = 64


@intrinsic
def bfloat16_tile(typingctx, rows, x, x_stride, first, second, pairs, sums, next_first, next_second):  # type: ignore[no-untyped-def]
    """``sums[r, u, c] = x[r] . row c of unit u`` for ``r < rows <= TILE_ROWS``, in float32, one pair after the other.

    ``x`` bfloat16, rows ``x_stride`` bytes apart; two units [pairs, UNIT, 2] bfloat16; ``sums`` [TILE_ROWS, 2, UNIT].
    What begins at ``next_first`` and ``next_second`` is fetched into the second-level cache meanwhile.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, x, x_stride, first, second, pairs, sums, next_first, next_second = args

        def tile(count: int) -> None:
            places = [[zeroed(builder) for _ in range(2)] for _ in range(count)]
            with cgutils.for_range(builder, pairs) as loop:
                line, pair = times(builder, loop.index, LINE_BYTES), times(builder, loop.index, 4)
                for ahead in (next_first, next_second):
                    fetch(builder, builder.add(ahead, line))
                units = [load(builder, builder.add(unit, line), INTS) for unit in (first, second)]
                for row, held in enumerate(places):
                    value = load(builder, builder.add(builder.add(x, times(builder, x_stride, row)), pair), INT32)
                    values = spread(builder, value)
                    for unit, place in zip(units, held, strict=True):
                        total = assembled(builder, "vdpbf16ps", FLOATS, builder.load(place), unit, values)
                        builder.store(total, place)
            for at, place in enumerate(place for held in places for place in held):
                store(builder, builder.load(place), builder.add(sums, int64(at * LINE_BYTES)))

        switch(builder, rows, TILE_ROWS, tile)
        return context.get_dummy_value()

    address = _ADDRESS
    return types.void(types.intp, *[address] * 4, types.intp, *[address] * 3), generate


def switch(builder: Any, rows: Any, most: int, tile: Callable[[int], None]) -> None:
    """``tile`` for each number of rows up to ``most``, unrolled."""
    after = builder.append_basic_block()
    cases = builder.switch(rows, after)
    for count in range(1, most + 1):
        block = builder.append_basic_block()
        cases.add_case(int64(count), block)
        builder.position_at_end(block)
        tile(count)
        builder.branch(after)
    builder.position_at_end(after)


def assembled(builder: Any, name: str, kind: Any, total: Any, a: Any, b: Any) -> Any:
    """``total`` and the products of ``a`` and ``b`` that the instruction adds to each lane."""
    function = ir.FunctionType(kind, [kind, INTS, INTS])
    return builder.asm(function, f"{name} $3, $2, $0", "=v,0,v,v", [total, a, b], side_effect=False)


def zeroed(builder: Any) -> Any:
    place = cgutils.alloca_once(builder, FLOATS)  # LLVM keeps it in a register
    builder.store(ir.Constant(FLOATS, [0.0] * UNIT), place)
    return place


def fetch(builder: Any, address: Any) -> None:
    """Into the second-level cache: a tile's own rows would fall out of the first."""
    kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), INT32, INT32, INT32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    at = builder.inttoptr(address, _BYTE.as_pointer())
    builder.call(function, [at, *(ir.Constant(INT32, flag) for flag in (0, 2, 1))])


def int64(value: int) -> Any:
    return ir.Constant(ir.IntType(64), value)


def times(builder: Any, number: Any, factor: int) -> Any:
    return builder.mul(number, int64(factor))


def load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def spread(builder: Any, number: Any) -> Any:
    empty = ir.Constant(INTS, ir.Undefined)
    first = builder.insert_element(empty, number, ir.Constant(INT32, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(INT32, UNIT), [0] * UNIT))
