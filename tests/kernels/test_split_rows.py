"""bfloat16 rows as two float8 numbers each."""

from __future__ import annotations

import torch
from aphro_kernels.split_rows import LOW_UNIT, SplitRows, split_rows


def joined(split: SplitRows) -> torch.Tensor:
    high, low = split.codes.float()
    return (high + low * LOW_UNIT) * split.scales[:, None]


def test_numbers_near_the_largest_are_exact() -> None:
    sizes = torch.exp2(torch.randint(-12, 1, (7, 256)).float())
    x = (torch.rand(7, 256) + 1).mul(sizes).bfloat16() * torch.tensor([1, -1e-20, 3e30, 1e-3, 17, 0, 1]).bfloat16()[
        :, None
    ]
    assert torch.equal(joined(split_rows(x)), x.float())


def test_small_numbers_beside_a_large_one_are_near() -> None:
    x = torch.randn(3, 128).bfloat16()
    x[:, 5] = 30000.0
    error = (joined(split_rows(x)) - x.float()).abs().max()
    assert 0 < float(error) <= 30000 * 2**-21


def test_sums_and_rows_that_are_not_finite() -> None:
    x = torch.randn(4, 384).bfloat16()
    split = split_rows(x)
    torch.testing.assert_close(split.sums * split.scales[:, None], x.float().view(4, 3, 128).sum(dim=-1))
    x[1, 7], x[2, 300] = float("inf"), float("nan")
    assert split_rows(x).scales.isnan().tolist() == [False, True, True, False]
