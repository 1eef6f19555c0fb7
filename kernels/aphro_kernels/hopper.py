"""Gluon, the level of Triton on which a kernel says which warps load, which multiply, and what they wait for.

Where Triton or its Gluon is missing, stand-ins let a kernel's file import, and :func:`suits_hopper` says no.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from aphro_kernels.language import triton

_LOG: Final = logging.getLogger(__name__)
_WITH: Final = (3, 6)  # Gluon changes from version to version: the one that these kernels were tried with on a GPU

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    barrier: Any = getattr(gl, "thread_barrier", None) or gl.barrier  # of a partition's threads
except ImportError:
    gluon = gl = hopper = mma_v2 = TensorDescriptor = barrier = None

__all__ = [
    "TensorDescriptor",
    "barrier",
    "gl",
    "hopper",
    "is_hopper",
    "jit",
    "mma_v2",
    "num_multiprocessors",
    "suits_hopper",
]


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``gluon.jit(**options)``, as language.py has ``triton.jit``."""
    return gluon.jit(**options) if gluon is not None else lambda function: function


def suits_hopper(x: Tensor) -> bool:
    """Whether kernels in Gluon run for a 16-bit tensor: on Hopper, with the Triton that they were written for."""
    return is_hopper(x.device, x.dtype)


def is_hopper(device: torch.device, dtype: torch.dtype) -> bool:
    """As :func:`suits_hopper`."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return _is_ready(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _is_ready(index: int) -> bool:
    if torch.cuda.get_device_capability(index) != (9, 0):
        return False
    version = "none" if gl is None else triton.__version__
    if version.split(".")[:2] == [str(part) for part in _WITH]:
        return True
    _LOG.warning(
        "Triton %s: attention, and rows of many tokens through a gated layer or experts, take slower kernels; "
        "those for Hopper are for Triton %d.%d",
        version,
        *_WITH,
    )
    return False


@cache
def num_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
