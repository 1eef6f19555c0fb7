"""How chain_kernel.py shares out a layer: the columns of each program, and what its shared memory holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from aphro_kernels.language import next_power_of_2

MAX_ROWS: Final = 64  # the tile of the tensor core
SLOT_ROWS: Final = 128  # of a slot of the ring, 64 inputs each, at most
_FEWEST_SLOT_ROWS: Final = 64
_CHUNK: Final = 64  # inputs: 128 bytes, the widest row that shared memory swizzles
_SHARED_BYTES: Final = 227 * 1024  # of a program on Hopper
_OTHER_BYTES: Final = 1024  # barriers and scales
GROUPS: Final = 2  # of four multiplying warps
_WIDE: Final = 32  # columns of a stripe
_FEW_WEIGHTS: Final = 2**25  # of a layer: below, one row waits for launches more than for memory
_BLOCK: Final = 1024  # inputs that a product of one row reads at once


@dataclass(frozen=True, slots=True)
class Stripes:
    """``count`` stripes of ``columns`` outputs each, of which the last may be narrower."""

    columns: int  # a multiple of 8
    count: int

    @property
    def pad(self) -> int:
        """Columns of the product: a power of two."""
        return next_power_of_2(self.columns)

    @property
    def box(self) -> int:
        """Rows of the weight that one copy brings: the largest power of two that divides a stripe."""
        return self.columns & -self.columns


@dataclass(frozen=True, slots=True)
class ChainShape:
    """Sizes of a layer: inputs of the output projection, hidden size, inputs of the down projection, outputs of QKV."""

    attended: int
    hidden: int
    inner: int
    qkv: int  # 0: no layer follows

    @property
    def num_weights(self) -> int:
        """Of the layer, QKV of the next one instead of its own."""
        return self.hidden * (self.attended + 3 * self.inner + self.qkv)


@dataclass(frozen=True, slots=True)
class ChainPlan:
    hidden: Stripes
    inner: Stripes  # one for each group of warps
    qkv: Stripes
    programs: int
    rows: int  # of a copy: 8, 16, 32 or 64
    chunks: int  # of 64 inputs in a stage of rows
    stages: int
    slots: int
    slot_rows: int


def stripes(n: int, programs: int, widest: int = SLOT_ROWS) -> Stripes:
    """Of ``n`` outputs, as even as multiples of 8 allow: one stripe a program, or the fewest of at most ``widest`` with
    which no program has more outputs than it must."""
    fewest = -(-n // (programs * widest))
    eighths = -(-n // (programs * 8))
    turns = min(range(fewest, fewest + 3), key=lambda turns: turns * -(-eighths // turns))
    columns = -(-eighths // turns) * 8
    return Stripes(columns, -(-n // columns))


def can_chain(shape: ChainShape, multiprocessors: int) -> bool:
    """Whether a program has at most one stripe of the hidden size and of QKV, and rows suit the copies: aligned, and no
    narrower than what one brings."""
    is_aligned = all(size % 8 == 0 for size in (shape.attended, shape.hidden, shape.inner, shape.qkv))
    is_wide = min(shape.attended, shape.hidden, shape.inner) >= _CHUNK
    return is_aligned and is_wide and max(shape.hidden, shape.qkv) <= multiprocessors * SLOT_ROWS


def fewest_rows(shape: ChainShape) -> int:
    """From how many rows on the chain is faster than a launch a product: two, if those of one row are fast: in large
    layers whose inputs come in whole blocks."""
    is_large = shape.num_weights > _FEW_WEIGHTS
    return 2 if is_large and not shape.hidden % _BLOCK and not shape.inner % _BLOCK else 1


def chain_plan(shape: ChainShape, num_rows: int, multiprocessors: int) -> ChainPlan:
    assert 0 < num_rows <= MAX_ROWS
    hidden = stripes(shape.hidden, multiprocessors)
    inner = stripes(shape.inner, GROUPS * multiprocessors, SLOT_ROWS // 2)  # a slot has gate and up
    qkv = stripes(shape.qkv, multiprocessors) if shape.qkv else Stripes(8, 1)
    rows = max(next_power_of_2(num_rows), 8)
    # all of this as measured (docs/kernels.md)
    chunks = 4 if rows <= 16 and hidden.pad < _WIDE else 2
    stages = 8 if rows <= 32 else 6
    slot_rows = SLOT_ROWS
    if rows > 16:  # the more room rows take, the less of a slot may stay empty: no larger than widest stripes
        widest = max(hidden.pad, qkv.pad) * (chunks if rows == 32 else 1)
        slot_rows = min(max(widest, GROUPS * inner.pad, _FEWEST_SLOT_ROWS), SLOT_ROWS)
    row_bytes = rows * 2 * _CHUNK
    behind = MAX_ROWS * 2 * _CHUNK - row_bytes  # a tile of the last rows reads so far
    halves = MAX_ROWS * 4 * max(hidden.pad, qkv.pad)
    left = _SHARED_BYTES - _OTHER_BYTES - halves - behind - stages * chunks * row_bytes
    slots = left // (slot_rows * 2 * _CHUNK) // 2 * 2
    programs = min(max(hidden.count, -(-inner.count // GROUPS), qkv.count), multiprocessors)
    return ChainPlan(hidden, inner, qkv, programs, rows, chunks, stages, slots, slot_rows)
