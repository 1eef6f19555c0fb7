"""Tiles of products with 4- and 8-bit weights for kernels that Numba compiles, by AVX512-VNNI."""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from aphro_kernels.vector_blocks import load_floats
from aphro_kernels.vector_products import (
    FLOATS,
    INT32,
    INTS,
    LINE_BYTES,
    UNIT,
    assembled,
    fetch,
    int64,
    load,
    spread,
    store,
    switch,
    times,
    zeroed,
)

INT4, INT8 = 0, 1  # kinds: how a code of a quantised weight is stored
PACKED_ROWS: Final = 4  # rows of ``x`` at once: with two units 8 sums of integers, and 8 in float32
_SIGN = 128  # what is added to signed codes, since one side of the product must be unsigned


@intrinsic(prefer_literal=True)
def packed_tile(  # type: ignore[no-untyped-def]
    typingctx,
    kind,
    scale_kind,
    block,
    rows,
    x,
    x_scales,
    codes,
    second_codes,
    scales,
    second_scales,
    groups,
    per_group,
    sums,
    ahead,
):
    """``sums[r, u, c] = x[r] . row c of unit u``, ``r < rows <= PACKED_ROWS``: integers within a block, then float32.

    ``x`` [rows, blocks, block] signed 8-bit codes; ``x_scales`` [rows, blocks, 2] float32: the scale of a block, and it
    times the sum of the block's codes. ``codes`` of a unit, a line for each 4 columns (INT4: 8, of which the first 4
    are low halves; INT8: plus 128), ``scales`` [groups, UNIT] of ``scale_kind`` (INT4: [groups, 2, UNIT], then
    offsets), ``per_group`` blocks each. ``sums`` [PACKED_ROWS, 2, UNIT]. What lies ``ahead`` bytes behind the codes is
    fetched into the second-level cache meanwhile.
    """
    kind_, scale_kind_, block_ = kind.literal_value, scale_kind.literal_value, block.literal_value
    per_line = 2 if kind_ == INT4 else 1  # vectors of 4 columns

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, x, x_scales, codes, second_codes, scales, second_scales, groups, per_group, sums, ahead = args[3:]
        num_blocks = builder.mul(groups, per_group)

        def quads(line: Any) -> list[Any]:
            """The codes of a line as vectors of 4 columns."""
            if kind_ == INT8:
                return [line]
            mask = ir.Constant(INTS, [0x0F0F0F0F] * UNIT)
            return [builder.and_(line, mask), builder.and_(builder.lshr(line, ir.Constant(INTS, [4] * UNIT)), mask)]

        def scale_and_offset(unit: Any, group: Any) -> tuple[Any, Any]:
            if kind_ == INT8:
                scale = load_floats(builder, unit, scale_kind_, UNIT, times(builder, group, UNIT))
                return scale, builder.fmul(scale, ir.Constant(FLOATS, [-float(_SIGN)] * UNIT))
            at = times(builder, group, 2 * UNIT)
            scale = load_floats(builder, unit, scale_kind_, UNIT, at)
            return scale, load_floats(builder, unit, scale_kind_, UNIT, builder.add(at, int64(UNIT)))

        def dot_block(count: int, at: Any) -> list[list[Any]]:
            """[row][unit] integers."""
            totals = [[ir.Constant(INTS, [0] * UNIT)] * 2 for _ in range(count)]
            for line in range(block_ // 4 // per_line):
                here = builder.add(times(builder, at, block_ // 4 // per_line * LINE_BYTES), int64(line * LINE_BYTES))
                lines = [builder.add(unit, here) for unit in (codes, second_codes)]
                for place in lines:
                    fetch(builder, builder.add(place, ahead))
                weights = [quads(load(builder, place, INTS)) for place in lines]
                for row in range(count):
                    first = builder.add(builder.mul(num_blocks, int64(row)), at)
                    for part in range(per_line):
                        place = builder.add(times(builder, first, block_), int64(4 * (line * per_line + part)))
                        values = spread(builder, load(builder, builder.add(x, place), INT32))
                        for unit in range(2):
                            totals[row][unit] = assembled(
                                builder, "vpdpbusd", INTS, totals[row][unit], weights[unit][part], values
                            )
            return totals

        def tile(count: int) -> None:
            places = [[zeroed(builder) for _ in range(2)] for _ in range(count)]
            with cgutils.for_range(builder, groups) as group:
                factors = [scale_and_offset(unit, group.index) for unit in (scales, second_scales)]
                first = builder.mul(group.index, per_group)
                with cgutils.for_range(builder, per_group) as inner:
                    at = builder.add(first, inner.index)
                    for row, totals in enumerate(dot_block(count, at)):
                        cell = times(builder, builder.add(builder.mul(num_blocks, int64(row)), at), 8)
                        x_scale = _float_at(builder, builder.add(x_scales, cell))
                        x_sum = _float_at(builder, builder.add(x_scales, builder.add(cell, int64(4))))
                        for place, total, (scale, offset) in zip(places[row], totals, factors, strict=True):
                            found = _multiply_add(builder, offset, x_sum, builder.load(place))
                            scaled = builder.fmul(builder.sitofp(total, FLOATS), x_scale)
                            builder.store(_multiply_add(builder, scaled, scale, found), place)
            for at, place in enumerate(place for held in places for place in held):
                store(builder, builder.load(place), builder.add(sums, int64(at * LINE_BYTES)))

        switch(builder, rows, PACKED_ROWS, tile)
        return context.get_dummy_value()

    return types.void(kind, scale_kind, block, *[types.intp] * 11), generate


def _float_at(builder: Any, address: Any) -> Any:
    """A float32 in all lanes."""
    return builder.bitcast(spread(builder, load(builder, address, INT32)), FLOATS)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))
