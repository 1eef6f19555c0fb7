"""Tiles of products for kernels that Numba compiles: bfloat16 pairs by AVX512-BF16.

A weight lies in *units* of 16 rows, whose columns come in turns of as many bytes as one lane takes, so that one load
feeds 16 sums and a value of ``x`` is spread over all lanes. A tile's sums stay in registers over all columns. The
instructions are written as assembler: LLVM changes the names and types of these intrinsics from version to version.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

llvmlite.binding.initialize_native_asmparser()

SOURCE_DIGEST = zlib.crc32(Path(__file__).read_bytes()) | 1  # for the keys of caches of compiled code
UNIT: Final = 16  # lanes of a vector: rows of a weight that are multiplied at once
TILE_ROWS: Final = 8  # rows of ``x`` at once: with two units 16 sums, enough to keep the multipliers busy

_ADDRESS = types.intp
_BYTE, _INT32, _INT64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS = ir.VectorType(ir.FloatType(), UNIT), ir.VectorType(_INT32, UNIT)
_LINE_BYTES = 64


@intrinsic
def bfloat16_tile(typingctx, rows, x, x_stride, first, second, pairs, sums, next_first, next_second):  # type: ignore[no-untyped-def]
    """``sums[r, u, c] = x[r] . row c of unit u`` for ``r < rows <= TILE_ROWS``, in float32, one pair after the other.

    ``x`` bfloat16, rows ``x_stride`` bytes apart; two units [pairs, UNIT, 2] bfloat16; ``sums`` [TILE_ROWS, 2, UNIT].
    What begins at ``next_first`` and ``next_second`` is fetched into the second-level cache meanwhile.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, x, x_stride, first, second, pairs, sums, next_first, next_second = args

        def tile(count: int) -> None:
            places = [[_zeroed(builder) for _ in range(2)] for _ in range(count)]
            with cgutils.for_range(builder, pairs) as loop:
                line, pair = _times(builder, loop.index, _LINE_BYTES), _times(builder, loop.index, 4)
                for ahead in (next_first, next_second):
                    _fetch(builder, builder.add(ahead, line))
                units = [_load(builder, builder.add(unit, line), _INTS) for unit in (first, second)]
                for row, held in enumerate(places):
                    value = _load(builder, builder.add(builder.add(x, _times(builder, x_stride, row)), pair), _INT32)
                    spread = _spread(builder, value)
                    for unit, place in zip(units, held, strict=True):
                        total = _assembled(builder, "vdpbf16ps", _FLOATS, builder.load(place), unit, spread)
                        builder.store(total, place)
            for at, place in enumerate(place for held in places for place in held):
                _store(builder, builder.load(place), builder.add(sums, _int64(at * _LINE_BYTES)))

        _switch(builder, rows, tile)
        return context.get_dummy_value()

    address = _ADDRESS
    return types.void(types.intp, *[address] * 4, types.intp, *[address] * 3), generate


def _switch(builder: Any, rows: Any, tile: Callable[[int], None]) -> None:
    """``tile`` for each number of rows, unrolled."""
    after = builder.append_basic_block()
    switch = builder.switch(rows, after)
    for count in range(1, TILE_ROWS + 1):
        block = builder.append_basic_block()
        switch.add_case(_int64(count), block)
        builder.position_at_end(block)
        tile(count)
        builder.branch(after)
    builder.position_at_end(after)


def _assembled(builder: Any, name: str, kind: Any, total: Any, a: Any, b: Any) -> Any:
    """``total`` and the products of ``a`` and ``b`` that the instruction adds to each lane."""
    function = ir.FunctionType(kind, [kind, _INTS, _INTS])
    return builder.asm(function, f"{name} $3, $2, $0", "=v,0,v,v", [total, a, b], side_effect=False)


def _zeroed(builder: Any) -> Any:
    place = cgutils.alloca_once(builder, _FLOATS)  # LLVM keeps it in a register
    builder.store(ir.Constant(_FLOATS, [0.0] * UNIT), place)
    return place


def _fetch(builder: Any, address: Any) -> None:
    """Into the second-level cache: a tile's own rows would fall out of the first."""
    kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT32, _INT32, _INT32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    at = builder.inttoptr(address, _BYTE.as_pointer())
    builder.call(function, [at, *(ir.Constant(_INT32, flag) for flag in (0, 2, 1))])


def _int64(value: int) -> Any:
    return ir.Constant(_INT64, value)


def _times(builder: Any, number: Any, factor: int) -> Any:
    return builder.mul(number, _int64(factor))


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _spread(builder: Any, number: Any) -> Any:
    empty = ir.Constant(_INTS, ir.Undefined)
    first = builder.insert_element(empty, number, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(_INT32, UNIT), [0] * UNIT))
