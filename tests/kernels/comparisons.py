"""Each kernel against its torch reference on the same tensors; run by Triton's interpreter here and by tests/gpu there.

Outputs and workspaces are NaN before a kernel runs, and so is all of a cache that it must not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from aphro_kernels import decode_inputs, grouped_gemm, paged_attention, rms_norm, rotary, silu_and_mul
from aphro_kernels.decode_work import DecodeWork, build_decode_work, plan_decode_
from torch import Tensor

BLOCK_SIZE = 16
# absolute and relative, on numbers of size 1: float32 sums differ in order, 16-bit results in their last place
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN: a workspace that is read before it is written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, equal_nan=False)


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)


def nans(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device=device)


def compare_rms_norm(num_tokens: int, width: int, dtype: torch.dtype, device: str) -> None:
    x = random(num_tokens, width + 8, dtype=dtype, device=device)[:, :width]  # rows of a wider tensor
    weight = random(width, dtype=dtype, device=device, seed=1)
    out = rms_norm._launch(x, None, weight, 1e-5, nans(num_tokens, width, dtype=dtype, device=device))
    assert_close(out, rms_norm.rms_norm_reference(x, weight, 1e-5))

    residual = random(num_tokens, width, dtype=dtype, device=device, seed=2)
    expected_residual = residual.clone()
    expected = rms_norm.add_rms_norm_reference_(expected_residual, x, weight, 1e-5)
    out = rms_norm._launch(x, residual, weight, 1e-5, nans(num_tokens, width, dtype=dtype, device=device))
    assert_close(out, expected)
    if device == "cuda":  # the interpreter cuts bfloat16 off where a GPU rounds
        assert torch.equal(residual, expected_residual)
    assert_close(residual, expected_residual)


def compare_silu_and_mul(num_tokens: int, width: int, dtype: torch.dtype, device: str) -> None:
    x = random(num_tokens, 2 * width, dtype=dtype, device=device) * 3
    out = silu_and_mul._launch(x, nans(num_tokens, width, dtype=dtype, device=device))
    assert_close(out, silu_and_mul.silu_and_mul_reference(x))


def compare_rotary(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    dtype: torch.dtype,
    device: str,
    has_norm: bool = False,
) -> None:
    wide = random(num_tokens, num_heads + 2 * num_kv_heads + 1, head_dim, dtype=dtype, device=device)
    qkv = wide[:, :-1]
    angles = random(num_tokens, rotary_dim // 2, dtype=torch.float32, device=device) * 10
    norms = [random(head_dim, dtype=dtype, device=device, seed=seed) if has_norm else None for seed in (3, 4)]
    num_blocks = num_tokens // BLOCK_SIZE + 3
    generator = torch.Generator().manual_seed(num_tokens)
    slots = torch.randperm(num_blocks * BLOCK_SIZE, generator=generator)[:num_tokens].to(device)
    slots[1::5] = -1  # padding
    results = []
    for op in (rotary._launch, rotary.rotary_and_cache_reference):
        cache = nans(num_blocks, 2, num_kv_heads, BLOCK_SIZE, head_dim, dtype=dtype, device=device)
        k_cache, v_cache = cache.unbind(1)  # strided, as the engine's are
        options = {"out": nans(num_tokens, num_heads, head_dim, dtype=dtype, device=device)}
        q = op(
            qkv,
            angles.cos(),
            angles.sin(),
            k_cache=k_cache,
            v_cache=v_cache,
            slot_mapping=slots,
            q_norm=norms[0],
            k_norm=norms[1],
            eps=1e-6,
            **(options if op is rotary._launch else {}),
        )
        results.append((q, k_cache, v_cache))
    (q, k_cache, v_cache), (q_expected, k_expected, v_expected) = results
    assert_close(q, q_expected)
    torch.testing.assert_close(v_cache, v_expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(k_cache.isnan(), k_expected.isnan())  # nothing beside the slots was written
    assert_close(k_cache.nan_to_num(0), k_expected.nan_to_num(0))


def compare_attention(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    window: int | None = None,
) -> Tensor:
    """Returns the kernel's output."""
    blocks_of = [-(-seq_len // BLOCK_SIZE) for seq_len in seq_lens]
    num_blocks = sum(blocks_of) + 2
    shuffled = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(5)).tolist()
    cache = nans(num_blocks, 2, num_kv_heads, BLOCK_SIZE, head_dim, dtype=dtype, device=device)
    k_cache, v_cache = cache.unbind(1)  # strided, as the engine's are
    tables = torch.full((len(seq_lens), max(blocks_of) + 3), 2**30, dtype=torch.int32)  # far outside the cache
    for i, seq_len in enumerate(seq_lens):
        blocks = [shuffled.pop() for _ in range(blocks_of[i])]
        tables[i, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        for seed, half in ((7, k_cache), (8, v_cache)):
            tokens = random(seq_len, num_kv_heads, head_dim, dtype=dtype, device=device, seed=seed)
            for place, block in enumerate(blocks):
                part = tokens[place * BLOCK_SIZE : (place + 1) * BLOCK_SIZE]
                half[block, :, : len(part)] = part.transpose(0, 1)
    num_tokens = sum(query_lens)
    q = torch.cat(
        [
            random(query_len, num_heads + 2, head_dim, dtype=dtype, device=device, seed=9 + i)
            for i, query_len in enumerate(query_lens)
        ]
    )[:, :num_heads]
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    arguments = {
        "block_tables": tables.to(device),
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32, device=device),
        "query_start_loc": starts.to(dtype=torch.int32, device=device),
        "max_query_len": max(query_lens),
        "max_seq_len": max(seq_lens),
        "scale": head_dim**-0.5,
        "window": window,
    }
    expected = paged_attention.paged_attention_reference(q, k_cache, v_cache, **arguments)
    if max(query_lens) == 1:
        arguments["work"] = poisoned_work(q, num_kv_heads, arguments["seq_lens"], window)
    out = nans(num_tokens, num_heads, head_dim, dtype=dtype, device=device)
    for _ in range(2):  # what a call counts must be 0 again before the next
        out.fill_(math.nan)
        with poisoned_memory():
            paged_attention._launch(q, k_cache, v_cache, **arguments, out=out)
        assert_close(out, expected)
    return out


def poisoned_work(q: Tensor, num_kv_heads: int, seq_lens: Tensor, window: int | None) -> DecodeWork:
    """Planned, with parts of NaN; without a GPU for 7 programs, so that rows are cut at odd places."""
    num_rows, num_heads, head_dim = q.shape
    work = build_decode_work(
        num_rows + 3,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=q.dtype,
        device=q.device,
        window=window,
        num_programs=None if q.is_cuda else 7,
    )
    work.parts.fill_(math.nan)
    work.part_weights.fill_(math.nan)
    work.stretches.fill_(2**30)
    plan_decode_(work, seq_lens, num_kv_heads)
    return work


def compare_decode_inputs(num_rows: int, max_rows: int, device: str) -> None:
    """Three steps of the same rows, one of which holds no sequence."""
    generator = torch.Generator().manual_seed(num_rows)
    tokens = torch.randint(0, 1000, (max_rows,), generator=generator).to(device)
    positions = torch.randint(0, 5 * BLOCK_SIZE, (max_rows,), generator=generator).to(device)
    positions[1::4] = -1
    tables = torch.randint(0, 2**20, (max_rows, 9), generator=generator).to(device=device, dtype=torch.int32)
    expected_positions = positions.clone()
    for _ in range(3):
        out = decode_inputs.build_decode_inputs(max_rows, torch.device(device))
        for buffer in (out.token_ids, out.positions, out.slot_mapping, out.seq_lens):
            buffer.fill_(-(2**30))
        decode_inputs._launch(tokens, positions, tables, num_rows, BLOCK_SIZE, out)
        expected = decode_inputs.decode_inputs_reference(
            tokens,
            expected_positions,
            tables,
            num_rows=num_rows,
            block_size=BLOCK_SIZE,
            out=decode_inputs.build_decode_inputs(max_rows, torch.device(device)),
        )
        found = decode_inputs.first_rows(out, num_rows)
        for name in ("token_ids", "positions", "slot_mapping", "seq_lens"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert torch.equal(positions, expected_positions)
        assert bool((out.token_ids[num_rows:] == -(2**30)).all())  # nothing behind the rows was written


def compare_grouped_linear(
    num_tokens: int, top: int, num_experts: int, here: range, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    """Rows to the experts ``here`` of ``num_experts``: k slots a row (the first product), then a row a slot."""
    width, depth = shape
    generator = torch.Generator().manual_seed(num_tokens)
    chosen = torch.rand(num_tokens, num_experts, generator=generator).topk(top, dim=-1).indices.to(device)
    tiles = grouped_gemm.plan_tiles(chosen, here.start, len(here))
    weight = random(len(here), width, depth, dtype=dtype, device=device, seed=1) / depth**0.5
    for rows, slots_per_row in ((num_tokens, top), (num_tokens * top, 1)):
        x = random(rows, depth, dtype=dtype, device=device)
        expected = x.new_zeros(num_tokens * top, width)
        for slot, expert in enumerate(chosen.flatten().tolist()):
            if expert in here:
                matrix = weight[expert - here.start].float()
                expected[slot] = (matrix @ x[slot // slots_per_row].float()).to(dtype)
        assert_close(grouped_gemm.grouped_linear_reference(x, weight, tiles, slots_per_row), expected)
        is_foreign = torch.tensor(
            [expert not in here for expert in chosen.flatten().tolist()], dtype=torch.bool, device=device
        )
        out = nans(num_tokens * top, width, dtype=dtype, device=device)
        grouped_gemm._launch(x, weight, tiles, slots_per_row, out)
        assert bool(out[is_foreign].isnan().all())
        assert_close(out[~is_foreign], expected[~is_foreign])
