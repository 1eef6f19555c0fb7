"""Vector loops over one block of the paged cache, for kernels that Numba compiles: q x K, and weights x V.

Numba turns a Python loop over numbers into vector code only where it finds the way itself, and it does not know
bfloat16; these loops are nearly all of decode attention on a CPU, so their instructions are written out here.
Addresses are integers, strides and counts are in elements. ``ahead`` is where a block begins that is read soon: it is
fetched from memory meanwhile. Blocks are too short and lie too far apart for the processor to guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from aphro_kernels.vector_blocks import (
    BFLOAT16,
    FLOAT32,
    element_bytes,
    load_floats,
    pointer,
    prefetch,
    round_to,
    spread_float,
    sum_of,
)
from aphro_kernels.vector_products import FLOATS, INTS, LINE_BYTES, UNIT, assembled, fetch, int64, load, store, times

_ADDRESS = types.intp
_FLOAT, _INT32 = ir.FloatType(), ir.IntType(32)
_PAIRS: Final = 32  # elements of bfloat16 in a vector
_HELD: Final = 16  # vectors of sums that block_values keeps in registers
# How lanes of two vectors are put together, step by step, until lane i holds the sum of vector i's 16 lanes
_FOLDS: Final[tuple[tuple[Sequence[int], Sequence[int]], ...]] = (
    ((0, 16, 1, 17), (2, 18, 3, 19)),
    ((0, 1, 16, 17), (2, 3, 18, 19)),
    ((*range(8), *range(16, 24)), (*range(8, 16), *range(24, 32))),
    ([at for at in range(32) if at % 8 < 4], [at for at in range(32) if at % 8 >= 4]),
)


def multiplies_pairs(kind: int, width: int) -> bool:
    """Whether :func:`block_pair_scores` takes a cache of this kind on this CPU."""
    features = llvmlite.binding.get_host_cpu_features()
    return kind == BFLOAT16 and width % _PAIRS == 0 and bool(features.get("avx512bf16"))


@intrinsic(prefer_literal=True)
def block_pair_scores(typingctx, group, width, queries, keys, scores, stride, count, scale, ahead):  # type: ignore[no-untyped-def]
    """``scores[g * stride + t] = queries[g] . keys[t] * scale`` for ``t < count``, by AVX512-BF16.

    ``queries`` [group, width] and ``keys`` [count, width] bfloat16; 16 keys at a time, then one by one.
    """
    group_, width_ = group.literal_value, width.literal_value
    lines = -(-UNIT * width_ * 2 // LINE_BYTES // group_)  # that a head fetches

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        queries, keys, scores, stride, count, scale, ahead = args[2:]

        def products(head: Any, key: Any, num_keys: int) -> list[Any]:
            """A vector for each key, whose lanes add up to its score; each head fetches its share of what is ahead."""
            query = [_pairs_at(builder, queries, head, part, width_) for part in range(width_ // _PAIRS)]
            share = times(builder, head, lines * LINE_BYTES)
            start = builder.add(ahead, builder.add(times(builder, key, width_ * 2), share))
            found = []
            for at in range(num_keys):
                for line in range(at, lines, UNIT):
                    fetch(builder, builder.add(start, int64(line * LINE_BYTES)))
                total: Any = ir.Constant(FLOATS, [0.0] * UNIT)
                for part, pairs in enumerate(query):
                    here = _pairs_at(builder, keys, builder.add(key, int64(at)), part, width_)
                    total = assembled(builder, "vdpbf16ps", FLOATS, total, pairs, here)
                found.append(total)
            return found

        def each_head() -> Any:
            return cgutils.for_range(builder, int64(group_))

        num_units = builder.udiv(count, int64(UNIT))
        with cgutils.for_range(builder, num_units) as unit:
            key = times(builder, unit.index, UNIT)
            with each_head() as head:
                totals = _lane_sums(builder, products(head.index, key, UNIT))
                scaled = builder.fmul(totals, spread_float(builder, scale, UNIT))
                at = builder.add(builder.mul(stride, head.index), key)
                store(builder, scaled, builder.add(scores, times(builder, at, 4)))
        done = times(builder, num_units, UNIT)
        with cgutils.for_range(builder, builder.sub(count, done)) as rest, each_head() as head:
            key = builder.add(done, rest.index)
            total = sum_of(builder, products(head.index, key, 1)[0], UNIT)
            at = builder.add(builder.mul(stride, head.index), key)
            builder.store(builder.fmul(total, scale), pointer(builder, scores, _FLOAT, 4, at))
        return context.get_dummy_value()

    return types.void(
        group, width, _ADDRESS, _ADDRESS, _ADDRESS, types.intp, types.intp, types.float32, _ADDRESS
    ), generate


@intrinsic(prefer_literal=True)
def block_scores(typingctx, kind, group, width, queries, keys, scores, stride, count, ahead):  # type: ignore[no-untyped-def]
    """``scores[g * stride + t] = queries[g] . keys[t]`` for ``t < count``, on any CPU.

    ``queries`` [group, width] float32, ``keys`` [count, width] of ``kind``.
    """
    kind_, group_, width_ = kind.literal_value, group.literal_value, width.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        queries, keys, scores, stride, count, ahead = args[3:]
        rows = [load_floats(builder, queries, FLOAT32, width_, head * width_) for head in range(group_)]
        with cgutils.for_range(builder, count) as loop:
            prefetch(builder, ahead, loop.index, width_ * element_bytes(kind_))
            key = load_floats(builder, keys, kind_, width_, times(builder, loop.index, width_))
            for head, row in enumerate(rows):
                total = sum_of(builder, builder.fmul(row, key, flags=("fast",)), width_)
                at = builder.add(builder.mul(stride, int64(head)), loop.index)
                builder.store(total, pointer(builder, scores, _FLOAT, 4, at))
        return context.get_dummy_value()

    return types.void(kind, group, width, _ADDRESS, _ADDRESS, _ADDRESS, types.intp, types.intp, _ADDRESS), generate


@intrinsic(prefer_literal=True)
def block_values(typingctx, kind, group, width, weights, values, sums, stride, count, ahead):  # type: ignore[no-untyped-def]
    """``sums[g] += weights[g * stride + t] * values[t]`` over ``t < count``.

    ``weights`` float32, ``values`` [count, width] of ``kind``, ``sums`` [group, width] float32 in the order of
    :func:`narrow_sums`. As many heads at a time as have room in the registers.
    """
    kind_, group_, width_ = kind.literal_value, group.literal_value, width.literal_value
    vector = ir.VectorType(_FLOAT, width_)
    at_once = max(1, _HELD // -(-width_ // UNIT))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        weights, values, sums, stride, count, ahead = args[3:]

        def add(heads: range) -> None:
            held = [cgutils.alloca_once(builder, vector) for _ in heads]
            for head, place in zip(heads, held, strict=True):
                builder.store(load_floats(builder, sums, FLOAT32, width_, head * width_), place)
            with cgutils.for_range(builder, count) as loop:
                if heads.start == 0:
                    prefetch(builder, ahead, loop.index, width_ * element_bytes(kind_))
                value = _values_at(builder, values, kind_, width_, times(builder, loop.index, width_))
                for head, place in zip(heads, held, strict=True):
                    at = builder.add(builder.mul(stride, int64(head)), loop.index)
                    weight = builder.load(pointer(builder, weights, _FLOAT, 4, at))
                    product = builder.fmul(spread_float(builder, weight, width_), value, flags=("fast",))
                    builder.store(builder.fadd(builder.load(place), product, flags=("fast",)), place)
            for head, place in zip(heads, held, strict=True):
                builder.store(builder.load(place), pointer(builder, sums, vector, 4, head * width_), align=4)

        for first in range(0, group_, at_once):
            add(range(first, min(first + at_once, group_)))
        return context.get_dummy_value()

    return types.void(kind, group, width, _ADDRESS, _ADDRESS, _ADDRESS, types.intp, types.intp, _ADDRESS), generate


@intrinsic(prefer_literal=True)
def clear(typingctx, width, sums):  # type: ignore[no-untyped-def]
    """``sums`` [width] float32 become 0."""
    vector = ir.VectorType(_FLOAT, width.literal_value)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(ir.Constant(vector, None), pointer(builder, args[1], vector, 4, 0), align=4)
        return context.get_dummy_value()

    return types.void(width, _ADDRESS), generate


@intrinsic(prefer_literal=True)
def narrow_sums(typingctx, kind, cache_kind, width, sums, target):  # type: ignore[no-untyped-def]
    """The sums of :func:`block_values` for one head, in their own order, rounded to ``kind``."""
    kind_, cache_kind_, width_ = kind.literal_value, cache_kind.literal_value, width.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = load_floats(builder, args[3], FLOAT32, width_, 0)
        if _is_split(cache_kind_, width_):
            order = [place for lane in range(width_ // 2) for place in (lane, width_ // 2 + lane)]
            found = _shuffled(builder, found, found, order)
        rounded = round_to(builder, found, kind_, width_)
        builder.store(rounded, pointer(builder, args[4], rounded.type, 1, 0), align=2)
        return context.get_dummy_value()

    return types.void(kind, cache_kind, width, _ADDRESS, _ADDRESS), generate


def _is_split(kind: int, width: int) -> bool:
    """Whether sums are kept as those of the even elements, then those of the odd ones: two of bfloat16 lie in 32 bits,
    and either is a float32 without being moved to another lane."""
    return kind == BFLOAT16 and width % 2 == 0


def _values_at(builder: Any, address: Any, kind: int, width: int, offset: Any) -> Any:
    """A row of V as float32, in the order of the sums."""
    if not _is_split(kind, width):
        return load_floats(builder, address, kind, width, offset)
    ints, floats = ir.VectorType(_INT32, width // 2), ir.VectorType(_FLOAT, width // 2)
    both = builder.load(pointer(builder, address, ints, 2, offset), align=2)
    even = builder.bitcast(builder.shl(both, ir.Constant(ints, [16] * (width // 2))), floats)
    odd = builder.bitcast(builder.and_(both, ir.Constant(ints, [0xFFFF0000 - 2**32] * (width // 2))), floats)
    return _shuffled(builder, even, odd, range(width))


def _pairs_at(builder: Any, matrix: Any, row: Any, part: int, width: int) -> Any:
    """32 bfloat16 of a row of a matrix."""
    return load(
        builder, builder.add(matrix, builder.add(times(builder, row, width * 2), int64(part * LINE_BYTES))), INTS
    )


def _lane_sums(builder: Any, vectors: list[Any]) -> Any:
    """16 vectors to one: lane i is the sum of vector i's lanes."""
    for low, high in _FOLDS:
        vectors = [
            builder.fadd(
                _shuffled(builder, first, second, _in_each_quarter(low)),
                _shuffled(builder, first, second, _in_each_quarter(high)),
            )
            for first, second in zip(vectors[0::2], vectors[1::2], strict=True)
        ]
    return vectors[0]


def _in_each_quarter(places: Sequence[int]) -> list[int]:
    """Places of 4 lanes, for each 4 of the 16."""
    return [place + start for start in range(0, UNIT, len(places)) for place in places]


def _shuffled(builder: Any, first: Any, second: Any, places: Any) -> Any:
    order = list(places)
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_INT32, len(order)), order))
