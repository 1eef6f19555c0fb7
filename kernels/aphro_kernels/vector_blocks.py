"""What vector loops of kernels that Numba compiles are made of: elements of each kind as float32 and back, counters.

Addresses are integers.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_INT8, _INT16, _INT32, _INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_HALF, _FLOAT = ir.HalfType(), ir.FloatType()
_ADDRESS = types.intp
_LINE_BYTES = 64

FLOAT32, BFLOAT16, FLOAT16, FLOAT8 = 0, 1, 2, 3  # kinds: how an element of the cache is read
_SOURCES = [file for name in ("cpu_*.py", "vector_*.py") for file in sorted(Path(__file__).parent.glob(name))]
# for the keys of caches of compiled code, which Numba makes of one function's own source alone
SOURCE_DIGEST = zlib.crc32(b"".join(file.read_bytes() for file in _SOURCES)) | 1


@intrinsic(prefer_literal=True)
def widen(typingctx, kind, width, source, target, scale):  # type: ignore[no-untyped-def]
    """``target[i] = source[i] * scale``: ``width`` elements of ``kind`` to float32."""
    kind_, width_ = kind.literal_value, width.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target, scale = args[2:]
        scaled = builder.fmul(load_floats(builder, source, kind_, width_, 0), spread_float(builder, scale, width_))
        builder.store(scaled, pointer(builder, target, scaled.type, 4, 0), align=4)
        return context.get_dummy_value()

    return types.void(kind, width, _ADDRESS, _ADDRESS, types.float32), generate


@intrinsic(prefer_literal=True)
def narrow(typingctx, kind, width, source, target):  # type: ignore[no-untyped-def]
    """``target[i] = source[i]``: ``width`` float32 to ``kind``, to the nearest, ties to even."""
    kind_, width_ = kind.literal_value, width.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = args[2:]
        rounded = round_to(builder, load_floats(builder, source, FLOAT32, width_, 0), kind_, width_)
        builder.store(rounded, pointer(builder, target, rounded.type, 1, 0), align=2)
        return context.get_dummy_value()

    return types.void(kind, width, _ADDRESS, _ADDRESS), generate


@intrinsic
def pointer_to(typingctx, address):  # type: ignore[no-untyped-def]
    """An address as a pointer, for ``numba.carray``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(_ADDRESS), generate


@intrinsic
def take_number(typingctx, counter):  # type: ignore[no-untyped-def]
    """The int64 at ``counter``, counted up at the same time: no two threads get the same number."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", pointer(builder, args[0], _INT64, 8, 0), _int64(1), "monotonic")

    return types.int64(_ADDRESS), generate


@intrinsic
def add_to(typingctx, counter, number):  # type: ignore[no-untyped-def]
    """Add to the int64 at ``counter``: whoever reads that by ``read_counter`` sees what was written before, too."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.atomic_rmw("add", pointer(builder, args[0], _INT64, 8, 0), args[1], "release")
        return context.get_dummy_value()

    return types.void(_ADDRESS, types.int64), generate


@intrinsic
def read_counter(typingctx, counter):  # type: ignore[no-untyped-def]
    """The int64 at ``counter``, which other threads add to; a moment later than the processor would by itself."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.asm(ir.FunctionType(ir.VoidType(), []), "pause", "", [], side_effect=True)
        return builder.load_atomic(pointer(builder, args[0], _INT64, 8, 0), "acquire", 8)

    return types.int64(_ADDRESS), generate


@intrinsic
def float_of(typingctx, bits):  # type: ignore[no-untyped-def]
    """The float32 that has these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def bits_of(typingctx, number):  # type: ignore[no-untyped-def]
    """The 32 bits of a float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _INT32)

    return types.int32(types.float32), generate


def element_bytes(kind: int) -> int:
    return {FLOAT32: 4, FLOAT8: 1}.get(kind, 2)


def _int64(value: int) -> Any:
    return ir.Constant(_INT64, value)


def pointer(builder: Any, address: Any, element: Any, size: int, offset: Any) -> Any:
    """To ``element``, ``offset`` places of ``size`` bytes behind ``address``."""
    offset = _int64(offset) if isinstance(offset, int) else offset
    return builder.inttoptr(builder.add(address, builder.mul(offset, _int64(size))), element.as_pointer())


def load_floats(builder: Any, address: Any, kind: int, width: int, offset: Any) -> Any:
    """``width`` consecutive elements as float32."""
    wide = ir.VectorType(_FLOAT, width)
    if kind == FLOAT32:
        return builder.load(pointer(builder, address, wide, 4, offset), align=4)
    if kind == FLOAT16:
        loaded = builder.load(pointer(builder, address, ir.VectorType(_HALF, width), 2, offset), align=2)
        return builder.fpext(loaded, wide)
    ints = ir.VectorType(_INT32, width)
    if kind == FLOAT8:  # its bits in a float32, whose exponent counts from 127 instead of 7
        loaded = builder.load(pointer(builder, address, ir.VectorType(_INT8, width), 1, offset), align=1)
        bits = builder.shl(builder.sext(loaded, ints), ir.Constant(ints, [20] * width))
        bits = builder.and_(bits, ir.Constant(ints, [0x87F00000 - 2**32] * width))
        return builder.fmul(builder.bitcast(bits, wide), ir.Constant(wide, [2.0**120] * width))
    loaded = builder.load(pointer(builder, address, ir.VectorType(_INT16, width), 2, offset), align=2)
    return builder.bitcast(builder.shl(builder.zext(loaded, ints), ir.Constant(ints, [16] * width)), wide)


def prefetch(builder: Any, address: Any, row: Any, row_bytes: int) -> None:
    """Ask for the lines of a row, for reading and to be kept in all caches."""
    byte, flag = ir.IntType(8), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), flag, flag, flag])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    start = builder.mul(row, _int64(row_bytes))
    for line in range(0, row_bytes, _LINE_BYTES):
        at = pointer(builder, address, byte, 1, builder.add(start, _int64(line)))
        builder.call(function, [at, ir.Constant(flag, 0), ir.Constant(flag, 3), ir.Constant(flag, 1)])


def round_to(builder: Any, vector: Any, kind: int, width: int) -> Any:
    if kind == FLOAT32:
        return vector
    if kind == FLOAT16:
        return builder.fptrunc(vector, ir.VectorType(_HALF, width))
    ints, shorts = ir.VectorType(_INT32, width), ir.VectorType(_INT16, width)
    bits = builder.bitcast(vector, ints)
    odd = builder.and_(builder.lshr(bits, ir.Constant(ints, [16] * width)), ir.Constant(ints, [1] * width))
    half = builder.add(odd, ir.Constant(ints, [0x7FFF] * width))
    return builder.trunc(builder.lshr(builder.add(bits, half), ir.Constant(ints, [16] * width)), shorts)


def sum_of(builder: Any, vector: Any, width: int) -> Any:
    name = f"llvm.vector.reduce.fadd.v{width}f32"
    function = builder.module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(_FLOAT, [_FLOAT, ir.VectorType(_FLOAT, width)])
        function = ir.Function(builder.module, kind, name=name)
    return builder.call(function, [ir.Constant(_FLOAT, 0.0), vector], fastmath=("fast",))


def spread_float(builder: Any, number: Any, width: int) -> Any:
    vector = ir.VectorType(_FLOAT, width)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.Constant(_INT32, 0))
    zeros = ir.Constant(ir.VectorType(_INT32, width), [0] * width)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)
