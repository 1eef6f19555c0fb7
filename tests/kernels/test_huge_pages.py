"""Copies in shared mappings: each is whole, apart from the others, and aligned."""

from __future__ import annotations

import torch
from aphro_kernels import huge_pages

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
