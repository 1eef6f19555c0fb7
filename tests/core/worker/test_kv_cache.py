"""The cache of a CPU rank in the host's memory."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from torch import Tensor

from aphro_core.worker import kv_cache

MIB = 2**20


def num_resident(cache: Tensor, start: int, end: int) -> int:
    """Pages of these bytes that have memory."""
    pages = (ctypes.c_ubyte * (-(-(end - start) // mmap.PAGESIZE)))()
    at = ctypes.c_void_p(cache.data_ptr() + start)
    assert ctypes.CDLL(None).mincore(at, ctypes.c_size_t(end - start), pages) == 0
    return sum(page & 1 for page in pages)


def test_the_first_pages_of_each_layer_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_PREPARED_BYTES", 14 * MIB)
    caches = [kv_cache._lazy_zeros((32, 2**18), torch.float32) for _ in range(2)]
    assert not any(num_resident(cache, 0, cache.nbytes) for cache in caches)
    kv_cache._prepare(caches)
    for cache in caches:
        assert num_resident(cache, 0, 7 * MIB) == 7 * MIB // mmap.PAGESIZE
        assert num_resident(cache, 9 * MIB, cache.nbytes) == 0, "what no request uses costs no memory"
        assert not cache.any()


def test_a_small_cache_is_prepared_whole() -> None:
    cache = kv_cache._lazy_zeros((3, 1000), torch.bfloat16)
    kv_cache._prepare([cache])
    kv_cache._prepare([])
    assert num_resident(cache, 0, cache.nbytes) == 2
    assert not cache.any()
