"""The row of a phase, as packed_chain_kernel.py multiplies it: read by every program, kept in its shared memory.

For 4-bit codes it becomes two bytes an input, in units of a power of two for each 128 inputs: 16 bits of the largest,
of which a bfloat16 has 8. Products with codes are then integers, exactly.
"""
# mypy: disable-error-code="assignment"
# ruff: noqa: N803, N806, RUF005  (constants in capitals; of kernels; tuples are sums)

from __future__ import annotations

from aphro_kernels.hopper import barrier, gl, jit
from aphro_kernels.language import tl


@jit()
def load_gain(gain: tl.tensor, K: gl.constexpr) -> tl.tensor:
    """A norm's weight in the layout of :func:`read_row`, a tuple of blocks: before the row is there."""
    return _load(gain, K, False)


@jit()
def read_row(
    source: tl.tensor,
    gains: tl.tensor,
    row: tl.tensor,
    units: tl.tensor,
    sums: tl.tensor,
    K: gl.constexpr,
    HAS_GAIN: gl.constexpr,
    KIND: gl.constexpr,
) -> tl.tensor:
    """``source`` [K] (times ``gains``) into shared memory, zeros behind it; returns the sum of its squares."""
    TILES: gl.constexpr = row.shape[0]
    FLAT_ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    values = _load(source, K, True)
    squares = gl.zeros_like(values[0]).to(gl.float32)
    for block in gl.static_range((K + 4095) // 4096):
        value = values[block].to(gl.float32)
        if HAS_GAIN:
            squares += value * value
            value *= gains[block].to(gl.float32)
        if KIND == "int4":
            _keep_as_bytes(value, row, units, sums, block, 32, TILES)
        else:
            inverse = _keep_units(value, units, block, 32, TILES)
            blocks = row._reinterpret(gl.float16, [TILES // 32, 32, 2, 64], FLAT_ROW)
            blocks.index(block).store((value * inverse).to(gl.float16))
    barrier()
    return gl.sum(gl.reshape(squares, [4096]), axis=0) if HAS_GAIN else 0.0


@jit()
def _load(source: tl.tensor, K: gl.constexpr, IS_NEW: gl.constexpr) -> tl.tensor:
    """Blocks of 32 times 128 inputs, ``[32, 2, 64]``. IS_NEW: past the first-level cache, which others' stores do not
    reach."""
    FLAT: gl.constexpr = gl.BlockedLayout([1, 2, 8], [4, 1, 8], [8, 1, 1], [2, 1, 0])
    tile = gl.arange(0, 32, gl.SliceLayout(1, gl.SliceLayout(2, FLAT)))[:, None, None]
    half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, FLAT)))[None, :, None]
    inside = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, FLAT)))[None, None, :]
    blocks = ()
    for block in gl.static_range((K + 4095) // 4096):
        at = (block * 32 + tile) * 128 + half * 64 + inside
        if IS_NEW:
            blocks = blocks + (gl.load(source + at, mask=at < K, other=0.0, cache_modifier=".cg"),)
        else:
            blocks = blocks + (gl.load(source + at, mask=at < K, other=0.0),)
    return blocks


@jit()
def _keep_as_bytes(
    value: tl.tensor,
    row: tl.tensor,
    units: tl.tensor,
    sums: tl.tensor,
    block: gl.constexpr,
    BLOCK: gl.constexpr,
    TILES: gl.constexpr,
) -> None:
    inverse = _keep_units(value, units, block, BLOCK, TILES)
    # an integer in the low bits of a float: 1.5 * 2**23 has the unit 1
    scaled = gl.minimum(value * inverse, 32767.0) + 12582912.0
    low, high = gl.inline_asm_elementwise(
        "{ .reg .b32 a, b; prmt.b32 a, $2, $3, 0x5410; prmt.b32 b, $4, $5, 0x5410;"
        " prmt.b32 $0, a, b, 0x6420; prmt.b32 $1, a, b, 0x7531; }",
        "=r,=r,r,r,r,r",
        [scaled.to(gl.int32, bitcast=True)],
        dtype=(gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )
    both = gl.permute(gl.join(high, low), (0, 1, 3, 2))  # [BLOCK, half, high or low, 64]
    BLOCKS: gl.constexpr = TILES // BLOCK
    FLAT_ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    FLAT_SUMS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    row._reinterpret(gl.int8, [BLOCKS, BLOCK, 2, 2, 64], FLAT_ROW).index(block).store(both)
    quarters = gl.sum(gl.sum(gl.reshape(value, [BLOCK, 2, 4, 16]), axis=3), axis=1)
    sums._reinterpret(gl.float32, [BLOCKS, BLOCK, 4], FLAT_SUMS).index(block).store(quarters)


@jit()
def _keep_units(
    value: tl.tensor, units: tl.tensor, block: gl.constexpr, BLOCK: gl.constexpr, TILES: gl.constexpr
) -> tl.tensor:
    """The unit of each 128 inputs: the largest is between 2**14 and 2**15 of it. Returns the inverse [BLOCK, 1, 1]."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    peak = gl.max(gl.max(gl.abs(value), axis=2), axis=1)
    exponent = gl.minimum(gl.maximum(peak.to(gl.int32, bitcast=True) >> 23, 16), 254)
    unit = ((exponent - 14) << 23).to(gl.float32, bitcast=True)
    unit = gl.where(peak < float("inf"), unit, float("nan"))
    units._reinterpret(gl.float32, [TILES // BLOCK, BLOCK], FLAT).index(block).store(unit)
    inverse = ((268 - exponent) << 23).to(gl.float32, bitcast=True)
    return gl.expand_dims(gl.expand_dims(inverse, 1), 2)
