"""The paged cache of one rank: K and V of each local layer side by side in one tensor."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from typing import Final

import torch
from torch import Tensor

from aphro_core.models.spec import DecoderSpec
from aphro_core.parallel.shard import RankShard

# Of the cache, which is filled from its beginning. A page of 2 MiB takes 0.2 ms, and up to 5 in a virtual machine whose
# host has to find it, too: for the first requests of a small model that was a twentieth of their time.
# They are zeroed beside whatever comes next: in such a machine that took 1.3 to 9 s.
_PREPARED_BYTES: Final = 512 * 2**20
_PREPARED_AT_ONCE: Final = 2 * 2**20
_MADV_POPULATE_WRITE: Final = 23  # Linux; Python has no name for it


def allocate_kv_cache(
    shard: RankShard, spec: DecoderSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """``[num_blocks, 2, num_kv_heads, block_size, head_dim]`` a layer, K at index 0 and V at 1 of the second dim.

    Zeros, since a masked key is multiplied by 0 and stale memory may hold NaN.
    """
    shape = (num_blocks, 2, len(shard.kv_heads), block_size, spec.head_dim)
    if device.type == "cpu":
        caches = [_lazy_zeros(shape, dtype) for _ in shard.layers]
        threading.Thread(target=_prepare, args=(caches,), name="pages", daemon=True).start()
        return caches
    return [torch.zeros(shape, dtype=dtype, device=device) for _ in shard.layers]


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Pages that the kernel zeroes when they are first written: what no request uses costs no memory and no time.

    Private pages: of memory that could be shared the kernel makes no huge ones unless it is set up to.
    """
    buffer = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel that was built without huge pages refuses the advice
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


def _prepare(caches: Sequence[Tensor]) -> None:
    """Zero the first pages of each now. By the C library's call: Python's own would hold its lock meanwhile."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    most = min(_PREPARED_BYTES // max(len(caches), 1), min((cache.nbytes for cache in caches), default=0))
    for start in range(0, most, _PREPARED_AT_ONCE):
        for cache in caches:
            if madvise(cache.data_ptr() + start, min(_PREPARED_AT_ONCE, most - start), _MADV_POPULATE_WRITE):
                return  # Linux before 5.14, or no memory is left: they are zeroed when they are written
