"""Triton where it is installed; else stand-ins with which a kernel's file imports: its reference needs no Triton."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without it
    triton = tl = None

__all__ = [
    "chain_options",
    "fetch",
    "jit",
    "let_next_start",
    "make_seen",
    "next_power_of_2",
    "runs_kernels",
    "start_in_chain",
    "tl",
    "triton",
    "wait_for_last",
]


def jit(**options: Any) -> Callable[[Callable[..., None]], Any]:
    """``triton.jit(**options)``. Integers that vary between steps belong into ``do_not_specialize``: Triton would
    compile again, in the middle of serving, for each that becomes 1 or divisible by 16. Of any other that is 1 it makes
    a constant, which has no methods: ``tl.cast(n, tl.int64)``, not ``n.to(tl.int64)``."""
    return triton.jit(**options) if triton is not None else lambda function: function


def runs_kernels(x: Tensor) -> bool:
    """Whether an op of this tensor takes its Triton kernel; otherwise the torch reference."""
    if x.is_cuda and triton is None:
        raise ModuleNotFoundError("Triton is not installed, and tensors on a GPU need it: pip install triton")
    return x.is_cuda


def chain_options(x: Tensor) -> dict[str, bool]:
    """Launch options of a kernel that begins with :func:`start_in_chain`, on the device of ``x``.

    Programmatic dependent launch (Hopper and later): a kernel is put on the multiprocessors while the one before it
    still runs, and waits inside for that one's end. Safe only if every kernel waits, also one that needs nothing of
    the last: else one behind it could start before an earlier one has ended.
    """
    if not x.is_cuda or _capability(x.device.index) < (9, 0):
        return {"CHAINED": False}
    return {"CHAINED": True, "launch_pdl": True}


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@jit()
def start_in_chain(CHAINED: tl.constexpr) -> None:  # noqa: N803
    """Let the next kernel onto the device, then wait for the one before."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@jit()
def let_next_start(CHAINED: tl.constexpr) -> None:  # noqa: N803
    """The first half of :func:`start_in_chain`. Between the halves only what the chain does not write may be read:
    weights, and what a step writes once, before its layers (positions, lengths, block tables, the plan of attention),
    since kernels without the attribute stand between that and the layers."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()


@jit()
def wait_for_last(CHAINED: tl.constexpr) -> None:  # noqa: N803
    """The second half: from here on everything may be read and written."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()


@jit()
def make_seen(CHAINED: tl.constexpr) -> None:  # noqa: N803
    """Last in a kernel that is not chained, of what the chain behind it reads before its wait: the end of a program
    lets the next kernel start, and says nothing of where its stores are by then."""
    if CHAINED:
        tl.inline_asm_elementwise("fence.acq_rel.gpu; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@jit()
def fetch(at: tl.tensor) -> None:
    """Ask for the 128-byte lines at these addresses in the second-level cache: a hint, which never gives old bytes."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
