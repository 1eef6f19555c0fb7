"""The cache of a CPU rank in the host's memory."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch

from aphro_core.worker import kv_cache

MIB = 2**20


def test_pages_are_prepared_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """``mmap.madvise`` holds the interpreter: none of its calls may take long, and other threads get between them."""
    prepared: list[tuple[int, int]] = []

    class Watched(mmap.mmap):
        def madvise(self, option: int, *where: int) -> None:
            if option == kv_cache._MADV_POPULATE_WRITE:
                start, length = where
                prepared.append((start, length))
            super().madvise(option, *where)

    watched: Any = Watched
    monkeypatch.setattr(mmap, "mmap", watched)
    cache = kv_cache._lazy_zeros((70, 2**18), torch.float32, 35 * MIB)
    assert not cache.any()
    assert max(length for _, length in prepared) <= 4 * MIB
    assert [start for start, _ in prepared] == list(range(0, 35 * MIB, 4 * MIB))
    assert sum(length for _, length in prepared) == 35 * MIB
