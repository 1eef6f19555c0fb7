"""Copies in shared mappings: each is whole, apart from the others, and aligned."""

from __future__ import annotations

import errno
import mmap

import pytest
import torch
from aphro_kernels import huge_pages

from aphro_core.worker.kv_cache import _lazy_zeros as allocate_zeros

MIB = 2**20


def test_copies_are_apart() -> None:
    sizes = [1, 63, 64, 65, 5 * MIB, 40 * MIB, 7, 20 * MIB, 20 * MIB]  # within a mapping, and beyond one
    copies = [huge_pages.copied(torch.full((size,), at + 1, dtype=torch.uint8)) for at, size in enumerate(sizes)]
    for at, (copy, size) in enumerate(zip(copies, sizes, strict=True)):
        assert copy.data_ptr() % 64 == 0
        assert copy.shape == (size,)
        assert bool((copy == at + 1).all())


def test_order_and_dtype_are_kept() -> None:
    x = torch.randn(6, 5, 4).bfloat16()
    found = huge_pages.copied(x.permute(2, 0, 1))
    assert found.is_contiguous()
    assert torch.equal(found, x.permute(2, 0, 1))
    assert huge_pages.copied(x[:0]).shape == (0, 5, 4)


def test_kernels_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, option: int, start: int = 0, length: int = 0) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    x = torch.randn(33 * MIB // 4)  # in a mapping of its own
    assert torch.equal(huge_pages.copied(x), x)
    assert allocate_zeros((2, 2, 1, 16, 8), torch.bfloat16).count_nonzero() == 0
