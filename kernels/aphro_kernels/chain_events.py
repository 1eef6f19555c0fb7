"""What the warps and programs of chain_kernel.py tell each other besides what is full and what is empty."""

from __future__ import annotations

from typing import Any, Final

from aphro_kernels.hopper import barrier, gl, jit
from aphro_kernels.language import tl


def _constant(value: int) -> Any:
    return value if gl is None else gl.constexpr(value)


EVENTS: Final = _constant(5)  # barriers in shared memory:
IS_SUMMED: Final = _constant(0)  # all programs have added up their columns' squares
IS_SCALED: Final = _constant(1)  # the scales of the rows stand in shared memory
IS_HALF: Final = _constant(2)  # so do the second group's sums
IS_STORED: Final = _constant(3)  # the second group has stored its columns
IS_OPEN: Final = _constant(4)  # this program may say that it has finished the first, second, third phase


@jit()
def arrive(arrivals: tl.tensor) -> None:
    """This program's phase is done: all its threads have stored before one of them says so."""
    fence_async()
    barrier()
    gl.atomic_add(arrivals, 1, sem="release", scope="gpu")


@jit()
def count_arrivals(arrivals: tl.tensor) -> tl.tensor:
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.s64 $0, [$1];", "=l,l", [arrivals], dtype=gl.int64, is_pure=False, pack=1
    )


@jit()
def wait_for_arrivals(arrivals: tl.tensor, target: tl.tensor) -> None:
    count = count_arrivals(arrivals)
    while count < target:
        count = count_arrivals(arrivals)
    fence_async()


@jit()
def fence_async() -> None:
    """What threads wrote to memory, or have learnt of others' writes, holds for the copy engine too."""
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
