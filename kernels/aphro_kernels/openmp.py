"""Runs a compiled function on the threads that torch itself multiplies with.

A second pool (Numba's own) would fight with torch's for the cores: both spin while they wait.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path

import torch


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


def num_threads() -> int:
    """Threads that :func:`run` uses: torch's, or 1 where torch's OpenMP library was not found."""
    return torch.get_num_threads() if _runtime() is not None else 1


def run(function: int, argument: int, threads: int) -> None:
    """Call ``void function(void *argument)``, both given as addresses, once on each of ``threads`` threads."""
    library = _runtime()
    if library is None or threads == 1:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(argument)
    else:
        library.GOMP_parallel(function, argument, threads, 0)
