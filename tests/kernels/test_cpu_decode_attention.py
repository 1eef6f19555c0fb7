"""Decode attention on a CPU against its reference: any shape, lengths that end anywhere, NaN where nobody may read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from aphro_kernels import openmp
from aphro_kernels.cpu_decode_attention import DecodeAttention, _softmax, decode_attention_reference
from torch import Tensor

SHAPES = [  # query heads of a KV head, KV heads, head_dim, block_size; each is compiled
    (1, 1, 16, 16, torch.float32),
    (2, 2, 32, 16, torch.float32),
    (3, 2, 64, 16, torch.bfloat16),
    (7, 1, 10, 8, torch.bfloat16),
    (9, 1, 32, 24, torch.bfloat16),
    (4, 2, 128, 32, torch.float16),
]


def case(group: int, num_kv_heads: int, width: int, block_size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Rows of 1 to 200 keys in shuffled blocks; NaN wherever no key of any row is."""
    generator = torch.Generator().manual_seed(group * width)
    seq_lens = torch.tensor([1, block_size, block_size + 1, 63, 200])
    max_blocks = -(-200 // block_size)
    tables = torch.randperm(len(seq_lens) * max_blocks, generator=generator).view(len(seq_lens), max_blocks)
    cache = torch.full((tables.numel(), 2, num_kv_heads, block_size, width), float("nan"))
    for table, length in zip(tables, seq_lens.tolist(), strict=True):
        for at in range(length):
            key = torch.randn(2, num_kv_heads, width, generator=generator)
            cache[table[at // block_size], :, :, at % block_size] = key
    qkv = torch.randn(len(seq_lens), (group + 2) * num_kv_heads, width, generator=generator)
    return qkv.to(dtype)[:, : group * num_kv_heads], cache.to(dtype), tables, seq_lens


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (None, 5.0)])
def test_equals_its_reference(shape: tuple[Any, ...], window: int | None, softcap: float | None) -> None:
    q, cache, tables, seq_lens = case(*shape)
    attention = DecodeAttention(q.shape[1], shape[1], shape[2], q.dtype, 0.3, window, softcap)
    found = attention(q, cache, tables, seq_lens)
    expected = decode_attention_reference(q, cache, tables, seq_lens, scale=0.3, window=window, softcap=softcap)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", SHAPES[2:4])
def test_a_cache_of_float8(shape: tuple[Any, ...]) -> None:
    q, cache, tables, seq_lens = case(*shape)
    scales = (0.5, 1.7)
    cache = cache.to(torch.float8_e4m3fn)
    attention = DecodeAttention(
        q.shape[1], shape[1], shape[2], q.dtype, 0.3, None, None, cache_dtype=cache.dtype, cache_scales=scales
    )
    found = attention(q, cache, tables, seq_lens)
    options = {"scale": 0.3, "window": None, "softcap": None, "cache_scales": scales}
    torch.testing.assert_close(found, decode_attention_reference(q, cache, tables, seq_lens, **options))


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """The same bits alone and in a batch, so that a request's tokens do not depend on who else is served."""
    q, cache, tables, seq_lens = case(3, 2, 64, 16, torch.bfloat16)
    attention = DecodeAttention(6, 2, 64, torch.bfloat16, 0.125)
    together = attention(q, cache, tables, seq_lens)
    for row in range(len(q)):
        alone = attention(q[row : row + 1], cache, tables[row : row + 1].contiguous(), seq_lens[row : row + 1])
        assert torch.equal(alone[0], together[row])


def test_one_thread_where_torch_has_no_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    q, cache, tables, seq_lens = case(2, 2, 32, 16, torch.float32)
    attention = DecodeAttention(4, 2, 32, torch.float32, 0.2)
    expected = attention(q, cache, tables, seq_lens)
    monkeypatch.setattr(openmp, "_runtime", lambda: None)
    assert openmp.num_threads() == 1
    assert torch.equal(attention(q, cache, tables, seq_lens), expected)


def test_weights_are_float32s_own() -> None:
    """Parity with a reference in float32 hangs on it; rounding the exponent takes a part of these errors."""
    scores = np.linspace(-20, 0, 4001, dtype=np.float32)
    expected = np.exp(scores.astype(np.float64))
    found = np.append(scores, np.full(15, np.nan, np.float32))
    _softmax(found, len(scores), np.float32(1))
    np.testing.assert_allclose(found[: len(scores)], expected / expected.sum(), rtol=2e-6)
