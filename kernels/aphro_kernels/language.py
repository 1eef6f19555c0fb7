"""Triton where it is installed; else stand-ins with which a kernel's file imports: its reference needs no Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without it
    triton = tl = None

__all__ = ["jit", "next_power_of_2", "runs_kernels", "tl", "triton"]


def jit(**options: Any) -> Callable[[Callable[..., None]], Any]:
    """``triton.jit(**options)``. Integers that vary between steps belong into ``do_not_specialize``: Triton would
    compile again, in the middle of serving, for each that becomes 1 or divisible by 16."""
    return triton.jit(**options) if triton is not None else lambda function: function


def runs_kernels(x: Tensor) -> bool:
    """Whether an op of this tensor takes its Triton kernel; otherwise the torch reference."""
    if x.is_cuda and triton is None:
        raise ModuleNotFoundError("Triton is not installed, and tensors on a GPU need it: pip install triton")
    return x.is_cuda


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
