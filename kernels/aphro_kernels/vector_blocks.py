"""Vector loops over one block of the paged cache, for kernels that Numba compiles: q x K, and weights x V.

Numba turns a Python loop over numbers into vector code only where it finds the way itself, and it does not know
bfloat16; these loops are nearly all of decode attention on a CPU, so their instructions are written out here.
Registers hold the queries, or the sums, over all tokens of a block. Addresses are integers, strides and counts are in
elements.
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
def block_scores(typingctx, kind, group, width, queries, keys, scores, stride, count, ahead):  # type: ignore[no-untyped-def]
    """``scores[g * stride + t] = queries[g] . keys[t]`` for ``t < count``.

    ``queries`` [group, width] float32, ``keys`` [count, width] of ``kind``. ``ahead`` is where the next block of them
    begins: it is fetched from memory meanwhile. Blocks are too short and lie too far apart for the processor to guess,
    and half the time went into waiting for the first lines of each.
    """
    kind_, group_, width_ = kind.literal_value, group.literal_value, width.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        queries, keys, scores, stride, count, ahead = args[3:]
        rows = [load_floats(builder, queries, FLOAT32, width_, head * width_) for head in range(group_)]
        with cgutils.for_range(builder, count) as loop:
            _prefetch(builder, ahead, loop.index, width_ * element_bytes(kind_))
            key = load_floats(builder, keys, kind_, width_, builder.mul(loop.index, _int64(width_)))
            for head, row in enumerate(rows):
                total = _sum(builder, builder.fmul(row, key, flags=("fast",)), width_)
                at = builder.add(builder.mul(stride, _int64(head)), loop.index)
                builder.store(total, _pointer(builder, scores, _FLOAT, 4, at))
        return context.get_dummy_value()

    return types.void(kind, group, width, _ADDRESS, _ADDRESS, _ADDRESS, types.intp, types.intp, _ADDRESS), generate


@intrinsic(prefer_literal=True)
def block_values(typingctx, kind, group, width, weights, values, sums, stride, count, ahead):  # type: ignore[no-untyped-def]
    """``sums[g] += weights[g * stride + t] * values[t]`` over ``t < count``.

    ``weights`` float32, ``values`` [count, width] of ``kind``, ``sums`` [group, width] float32; ``ahead`` as above.
    """
    kind_, group_, width_ = kind.literal_value, group.literal_value, width.literal_value
    vector = ir.VectorType(_FLOAT, width_)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        weights, values, sums, stride, count, ahead = args[3:]
        held = [cgutils.alloca_once(builder, vector) for _ in range(group_)]  # LLVM keeps them in registers
        for head, place in enumerate(held):
            builder.store(load_floats(builder, sums, FLOAT32, width_, head * width_), place)
        with cgutils.for_range(builder, count) as loop:
            _prefetch(builder, ahead, loop.index, width_ * element_bytes(kind_))
            value = load_floats(builder, values, kind_, width_, builder.mul(loop.index, _int64(width_)))
            for head, place in enumerate(held):
                at = builder.add(builder.mul(stride, _int64(head)), loop.index)
                weight = builder.load(_pointer(builder, weights, _FLOAT, 4, at))
                product = builder.fmul(_spread(builder, weight, width_), value, flags=("fast",))
                builder.store(builder.fadd(builder.load(place), product, flags=("fast",)), place)
        for head, place in enumerate(held):
            builder.store(builder.load(place), _pointer(builder, sums, vector, 4, head * width_), align=4)
        return context.get_dummy_value()

    return types.void(kind, group, width, _ADDRESS, _ADDRESS, _ADDRESS, types.intp, types.intp, _ADDRESS), generate


@intrinsic(prefer_literal=True)
def widen(typingctx, kind, width, source, target, scale):  # type: ignore[no-untyped-def]
    """``target[i] = source[i] * scale``: ``width`` elements of ``kind`` to float32."""
    kind_, width_ = kind.literal_value, width.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target, scale = args[2:]
        scaled = builder.fmul(load_floats(builder, source, kind_, width_, 0), _spread(builder, scale, width_))
        builder.store(scaled, _pointer(builder, target, scaled.type, 4, 0), align=4)
        return context.get_dummy_value()

    return types.void(kind, width, _ADDRESS, _ADDRESS, types.float32), generate


@intrinsic(prefer_literal=True)
def narrow(typingctx, kind, width, source, target):  # type: ignore[no-untyped-def]
    """``target[i] = source[i]``: ``width`` float32 to ``kind``, to the nearest, ties to even."""
    kind_, width_ = kind.literal_value, width.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = args[2:]
        rounded = _rounded(builder, load_floats(builder, source, FLOAT32, width_, 0), kind_, width_)
        builder.store(rounded, _pointer(builder, target, rounded.type, 1, 0), align=2)
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
        return builder.atomic_rmw("add", _pointer(builder, args[0], _INT64, 8, 0), _int64(1), "monotonic")

    return types.int64(_ADDRESS), generate


@intrinsic
def add_to(typingctx, counter, number):  # type: ignore[no-untyped-def]
    """Add to the int64 at ``counter``: whoever reads that by ``read_counter`` sees what was written before, too."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.atomic_rmw("add", _pointer(builder, args[0], _INT64, 8, 0), args[1], "release")
        return context.get_dummy_value()

    return types.void(_ADDRESS, types.int64), generate


@intrinsic
def read_counter(typingctx, counter):  # type: ignore[no-untyped-def]
    """The int64 at ``counter``, which other threads add to; a moment later than the processor would by itself."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.asm(ir.FunctionType(ir.VoidType(), []), "pause", "", [], side_effect=True)
        return builder.load_atomic(_pointer(builder, args[0], _INT64, 8, 0), "acquire", 8)

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


def _pointer(builder: Any, address: Any, element: Any, size: int, offset: Any) -> Any:
    """To ``element``, ``offset`` places of ``size`` bytes behind ``address``."""
    offset = _int64(offset) if isinstance(offset, int) else offset
    return builder.inttoptr(builder.add(address, builder.mul(offset, _int64(size))), element.as_pointer())


def load_floats(builder: Any, address: Any, kind: int, width: int, offset: Any) -> Any:
    """``width`` consecutive elements as float32."""
    wide = ir.VectorType(_FLOAT, width)
    if kind == FLOAT32:
        return builder.load(_pointer(builder, address, wide, 4, offset), align=4)
    if kind == FLOAT16:
        loaded = builder.load(_pointer(builder, address, ir.VectorType(_HALF, width), 2, offset), align=2)
        return builder.fpext(loaded, wide)
    ints = ir.VectorType(_INT32, width)
    if kind == FLOAT8:  # its bits in a float32, whose exponent counts from 127 instead of 7
        loaded = builder.load(_pointer(builder, address, ir.VectorType(_INT8, width), 1, offset), align=1)
        bits = builder.shl(builder.sext(loaded, ints), ir.Constant(ints, [20] * width))
        bits = builder.and_(bits, ir.Constant(ints, [0x87F00000 - 2**32] * width))
        return builder.fmul(builder.bitcast(bits, wide), ir.Constant(wide, [2.0**120] * width))
    loaded = builder.load(_pointer(builder, address, ir.VectorType(_INT16, width), 2, offset), align=2)
    return builder.bitcast(builder.shl(builder.zext(loaded, ints), ir.Constant(ints, [16] * width)), wide)


def _prefetch(builder: Any, address: Any, row: Any, row_bytes: int) -> None:
    """Ask for the lines of a row, for reading and to be kept in all caches."""
    byte, flag = ir.IntType(8), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), flag, flag, flag])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    start = builder.mul(row, _int64(row_bytes))
    for line in range(0, row_bytes, _LINE_BYTES):
        at = _pointer(builder, address, byte, 1, builder.add(start, _int64(line)))
        builder.call(function, [at, ir.Constant(flag, 0), ir.Constant(flag, 3), ir.Constant(flag, 1)])


def _rounded(builder: Any, vector: Any, kind: int, width: int) -> Any:
    if kind == FLOAT32:
        return vector
    if kind == FLOAT16:
        return builder.fptrunc(vector, ir.VectorType(_HALF, width))
    ints, shorts = ir.VectorType(_INT32, width), ir.VectorType(_INT16, width)
    bits = builder.bitcast(vector, ints)
    odd = builder.and_(builder.lshr(bits, ir.Constant(ints, [16] * width)), ir.Constant(ints, [1] * width))
    half = builder.add(odd, ir.Constant(ints, [0x7FFF] * width))
    return builder.trunc(builder.lshr(builder.add(bits, half), ir.Constant(ints, [16] * width)), shorts)


def _sum(builder: Any, vector: Any, width: int) -> Any:
    name = f"llvm.vector.reduce.fadd.v{width}f32"
    function = builder.module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(_FLOAT, [_FLOAT, ir.VectorType(_FLOAT, width)])
        function = ir.Function(builder.module, kind, name=name)
    return builder.call(function, [ir.Constant(_FLOAT, 0.0), vector], fastmath=("fast",))


def _spread(builder: Any, number: Any, width: int) -> Any:
    vector = ir.VectorType(_FLOAT, width)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.Constant(_INT32, 0))
    zeros = ir.Constant(ir.VectorType(_INT32, width), [0] * width)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)
