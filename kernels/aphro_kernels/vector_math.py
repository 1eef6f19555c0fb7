"""Functions of float32 for kernels that Numba compiles: only what LLVM makes vector code of."""

from __future__ import annotations

import numpy as np
from numba import njit

from aphro_kernels.vector_blocks import bits_of, float_of


@njit(fastmath=True, inline="always")
def exponential(x):  # type: ignore[no-untyped-def]
    """``e ** x`` for ``x <= 0``: a whole power of 2 by its bits, Cephes' exp2f polynomial for the rest, -1/2 to 1/2."""
    power = max(x * np.float32(1.4426950408889634), np.float32(-126))
    whole = np.floor(power + np.float32(0.5))
    rest = power - whole
    value = np.float32(1.535336188319500e-4)
    value = value * rest + np.float32(1.339887440266574e-3)
    value = value * rest + np.float32(9.618437357674640e-3)
    value = value * rest + np.float32(5.550332471162809e-2)
    value = value * rest + np.float32(2.402264791363012e-1)
    value = value * rest + np.float32(6.931472028550421e-1)
    value = value * rest + np.float32(1)
    return value * float_of((np.int32(whole) + np.int32(127)) << np.int32(23))


@njit(inline="always")
def widened(bits):  # type: ignore[no-untyped-def]
    """The float32 of a bfloat16 that is given as uint16."""
    return float_of(np.int32(np.uint32(bits) << np.uint32(16)))


@njit(inline="always")
def rounded(x):  # type: ignore[no-untyped-def]
    """float32 to the nearest bfloat16, ties to even, as uint16."""
    bits = np.uint32(bits_of(x))
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
