"""Norms, rotations and KV writes of bfloat16 rows on a CPU against their references: odd sizes, strided rows."""

from __future__ import annotations

import pytest
import torch
from aphro_kernels.cpu_rms_norm import CpuRMSNorm
from aphro_kernels.cpu_rotary import CpuRotaryAndCache
from aphro_kernels.rms_norm import add_rms_norm_reference_, rms_norm_reference
from aphro_kernels.rotary import rotary_and_cache_reference
from torch import Tensor

NAN = float("nan")


def strided(*shape: int) -> Tensor:
    """Rows of normal numbers with NaN between them."""
    whole = torch.full((shape[0], 2, *shape[1:]), NAN).bfloat16()
    whole[:, 0] = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return whole[:, 0]


@pytest.mark.parametrize("rows", [1, 16, 17, 63])
@pytest.mark.parametrize("width", [1, 63, 576])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_norms(rows: int, width: int, weight_dtype: torch.dtype) -> None:
    x, residual = strided(rows, width), strided(rows, width) * 3
    weight = torch.rand(width).to(weight_dtype) + 0.5
    norm = CpuRMSNorm(weight, 1e-5)
    torch.testing.assert_close(norm(x), rms_norm_reference(x, weight, 1e-5), rtol=1 / 128, atol=1e-4)
    summed = residual.clone()
    expected = add_rms_norm_reference_(summed, x, weight, 1e-5)
    torch.testing.assert_close(norm.add_(residual, x), expected, rtol=1 / 128, atol=1e-4)
    assert torch.equal(residual, summed)


def test_a_norm_passes_nan_on() -> None:
    x = strided(3, 40)
    x[1, 7] = NAN
    found = CpuRMSNorm(torch.ones(40), 1e-5)(x)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("num_tokens", [1, 8, 21])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "rotary_dim"),
    [(1, 1, 2, 2), (9, 3, 64, 64), (4, 2, 50, 30), (2, 1, 16, 0)],
)
@pytest.mark.parametrize("has_norm", [False, True])
def test_rotation_and_cache(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int, has_norm: bool
) -> None:
    block_size, num_blocks, planes = 16, 5, 2 * num_kv_heads
    qkv = strided(num_tokens, num_heads + planes, head_dim)
    angles = torch.rand(num_tokens, rotary_dim // 2) * 6
    norms = [torch.rand(head_dim).bfloat16() + 0.5 for _ in range(2)] if has_norm else [None, None]
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    first = slots // block_size * planes * block_size + slots % block_size
    slot_rows = first[:, None] + torch.arange(planes) * block_size
    expected_cache = torch.full((num_blocks, 2, num_kv_heads, block_size, head_dim), NAN).bfloat16()
    cache = expected_cache.clone()
    expected = rotary_and_cache_reference(
        qkv,
        angles.cos(),
        angles.sin(),
        k_cache=expected_cache[:, 0],
        v_cache=expected_cache[:, 1],
        slot_mapping=slots,
        q_norm=norms[0],
        k_norm=norms[1],
        eps=1e-6,
    )
    in_place = qkv.clone()
    rotate = CpuRotaryAndCache(num_heads, num_kv_heads, *norms, 1e-6)
    rotate(in_place, angles.cos(), angles.sin(), None, slot_rows)
    rotate(qkv, angles.cos(), angles.sin(), cache, slot_rows)
    assert torch.equal(in_place[:, :num_heads], qkv[:, :num_heads])
    assert torch.equal(in_place[:, num_heads:].flatten(0, 1), cache.view(-1, head_dim)[slot_rows.flatten()])
    torch.testing.assert_close(qkv[:, :num_heads], expected, rtol=1 / 128, atol=1e-3)
    torch.testing.assert_close(cache, expected_cache, rtol=1 / 128, atol=1e-3, equal_nan=True)
