"""Weights of a CPU in large pages: a step reads all of them, and small pages are found more slowly than read."""

from __future__ import annotations

import mmap
from contextlib import suppress
from functools import cache
from typing import Final

import torch
from torch import Tensor

_PAGE_BYTES: Final = 2 * 2**20
_CHUNK_BYTES: Final = 16 * _PAGE_BYTES  # mapped at once; only what is written takes memory
_ALIGNED: Final = 64


def copied(tensor: Tensor) -> Tensor:
    """The same, contiguous, in huge pages where the kernel has some, in small ones elsewhere.

    Many share a mapping, which is given back when the last one is gone.
    """
    memory = _mapping().take(tensor.numel() * tensor.element_size())
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)


class _Mapping:
    """Memory, handed out from its beginning to its end, then another one."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        if num_bytes > len(self._left):
            fresh = _map(max(num_bytes, _CHUNK_BYTES))
            if num_bytes >= _CHUNK_BYTES:
                return fresh[:num_bytes]
            self._left = fresh
        taken = self._left[:num_bytes]
        self._left = self._left[num_bytes + -num_bytes % _ALIGNED :]
        return taken


@cache
def _mapping() -> _Mapping:
    return _Mapping()


def _map(num_bytes: int) -> Tensor:
    buffer = mmap.mmap(-1, num_bytes + _PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel that was built without huge pages refuses the advice
            buffer.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(buffer, dtype=torch.uint8)
    return memory[-memory.data_ptr() % _PAGE_BYTES :][:num_bytes]
