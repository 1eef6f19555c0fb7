"""Runs a compiled function on the threads that torch itself multiplies with.

A second pool (Numba's own) would fight with torch's for the cores: both spin while they wait.
"""

from __future__ import annotations

import ctypes
import re
from contextvars import ContextVar
from functools import cache
from math import prod
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor


class Recorder(Protocol):
    """Notes calls, to make them again (cpu_program.py)."""

    def note(self, address: int, arguments: tuple[int, ...]) -> None:
        """A call of the function at ``address``."""

    def empty(self, num_bytes: int) -> Tensor:
        """Memory for what is computed, as bytes; it stays while the calls may be made again."""


RECORDER: Final = ContextVar[Recorder | None]("RECORDER", default=None)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory for what a :class:`Call` writes."""
    recorder = RECORDER.get()
    if recorder is None:
        return torch.empty(shape, dtype=dtype)
    return recorder.empty(prod(shape) * dtype.itemsize).view(dtype).view(shape)


@cache
def _runtime() -> ctypes.CDLL | None:
    """The OpenMP library in this process that torch uses; libgomp's entry points are LLVM's and Intel's too."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    found = sorted(set(re.findall(r"\S+/lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*", maps.read_text())))
    for path in sorted(found, key=lambda path: "/torch/" not in path):
        library = ctypes.CDLL(path)
        if hasattr(library, "GOMP_parallel"):
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            return library
    return None


def share(num_rows: int, most: int) -> int:
    """Rows that a thread takes at once of work that is done sooner than a second thread begins: ``most``, or an even
    share where all threads are there already."""
    return most if RECORDER.get() is None else min(most, -(-num_rows // num_threads()))


def team_size_address() -> int | None:
    """Where ``int omp_get_num_threads()`` is; None where torch's OpenMP library was not found."""
    library = _runtime()
    return None if library is None else ctypes.cast(library.omp_get_num_threads, ctypes.c_void_p).value


def num_threads() -> int:
    """Threads that :class:`Call` uses: torch's, or 1 where torch's OpenMP library was not found."""
    return torch.get_num_threads() if _runtime() is not None else 1


class Call:
    """``void function(int64 *numbers)``, run at once on several threads, which share out its tasks by ``numbers[0]``.

    The numbers' memory is kept from call to call (making it anew takes longer than a small function does), so one
    thread at a time may call.
    """

    __slots__ = ("_address", "_alone", "_at", "_numbers")

    def __init__(self, address: int, num_arguments: int) -> None:
        self._address = address
        self._alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
        self._numbers = (ctypes.c_int64 * num_arguments)()
        self._at = ctypes.addressof(self._numbers)

    def __call__(self, num_tasks: int, *arguments: int) -> None:
        """``numbers`` becomes (0, *arguments): tasks taken so far, then what the function reads."""
        if (recorder := RECORDER.get()) is not None:
            recorder.note(self._address, arguments)
        self._numbers[:] = [0, *arguments]
        library, threads = _runtime(), min(torch.get_num_threads(), num_tasks)
        if library is None or threads <= 1:
            self._alone(self._at)
        else:
            library.GOMP_parallel(self._address, self._at, threads, 0)
