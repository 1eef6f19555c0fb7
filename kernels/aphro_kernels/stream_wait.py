"""A stream that waits for a number in the device's memory, which another GPU may write.

The driver waits, without a program: one that looks at the number in a loop takes a multiprocessor, and products that
want all of them at once take a turn more.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

_AT_LEAST: Final = 0  # CU_STREAM_WAIT_VALUE_GEQ of cuda.h: the difference, as a signed number, is not negative


def wait_for_count(stream: torch.cuda.Stream, counter: Tensor, count: int) -> None:
    """What is launched on ``stream`` from here on waits until ``counter`` [1] int32 has reached ``count``; both wrap
    alike. Raises RuntimeError where the driver has no such wait."""
    assert counter.dtype == torch.int32
    value, address = ctypes.c_uint32(count & 0xFFFFFFFF), ctypes.c_void_p(counter.data_ptr())
    status = _wait_value()(ctypes.c_void_p(stream.cuda_stream), address, value, ctypes.c_uint(_AT_LEAST))
    if status:
        raise RuntimeError(f"the driver cannot let a stream wait for a number in memory (CUDA error {status})")


@cache
def _wait_value() -> Any:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        return getattr(driver, "cuStreamWaitValue32_v2", None) or driver.cuStreamWaitValue32
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"the driver cannot let a stream wait for a number in memory ({error})") from error
