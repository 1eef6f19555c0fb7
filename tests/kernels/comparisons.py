"""Each kernel against its torch reference on the same tensors; run by Triton's interpreter here and by tests/gpu there.

Outputs and workspaces are NaN before a kernel runs, and so is all of a cache that it must not read.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from aphro_kernels import (
    begin_step,
    chunk_tiles,
    expert_rows,
    gated_gemm,
    grouped_float8,
    grouped_gemm,
    grouped_hopper,
    grouped_hopper_float8,
    grouped_packed,
    hopper_attention,
    packed_linear,
    paged_attention,
    peer_all_reduce,
    peer_columns,
    peer_line,
    peer_rows,
    peer_two_shot,
    quantise_rows,
    rms_norm,
    rotary,
    rotary_angles,
    route,
    row_tiles,
    sample,
    silu_and_mul,
    skinny_linear,
    split_places,
    split_rows,
    step_rows,
)
from aphro_kernels.decode_work import DecodeWork, build_decode_work, plan_decode_
from aphro_kernels.float8 import FLOAT8
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


def compare_rotary_angles(num_tokens: int, half: int, device: str) -> None:
    positions = torch.arange(num_tokens, device=device) * 87
    frequencies = (10_000.0 ** -torch.linspace(0, 1, half)).to(device)
    found = rotary_angles._launch(positions, frequencies, 1.3)
    expected = rotary_angles.rotary_angles_reference(positions, frequencies, 1.3)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


def compare_rotary(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    dtype: torch.dtype,
    device: str,
    has_norm: bool = False,
    is_float8: bool = False,
) -> None:
    """``is_float8``: the cache's dtype, with scales."""
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
        cache = cache.to(FLOAT8) if is_float8 else cache
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
            key_scale=0.003 if is_float8 else 1.0,  # some are beyond the range then
            value_scale=0.3 if is_float8 else 1.0,
            **(options if op is rotary._launch else {}),
        )
        results.append((q, k_cache, v_cache))
    (q, k_cache, v_cache), (q_expected, k_expected, v_expected) = results
    assert_close(q, q_expected)
    if is_float8:
        k_cache, v_cache, k_expected, v_expected = (x.float() for x in (k_cache, v_cache, k_expected, v_expected))
        # at most one code apart, and rarely; the interpreter rounds up to the wrong power of 2, and small ones down
        share, most = (1 / 8, 0.01) if device == "cuda" else (1 / 2, 0.1)
        if device == "cuda" and dtype == torch.bfloat16:
            most = 0.05  # the reference rounds to bfloat16 first: of 16 such steps between two codes, half of one moves
        for ours, theirs in ((k_cache, k_expected), (v_cache, v_expected)):
            assert torch.equal(ours.isnan(), theirs.isnan())
            apart = (ours - theirs).nan_to_num(0).abs()
            assert bool((apart <= theirs.nan_to_num(0).abs() * share + 0.004).all())
            assert (apart > 0).float().mean() < most
        return
    torch.testing.assert_close(v_cache, v_expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(k_cache.isnan(), k_expected.isnan())  # nothing beside the slots was written
    assert_close(k_cache.nan_to_num(0), k_expected.nan_to_num(0))


def compare_gated_linear(num_rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    """On a GPU only: Gluon has no interpreter."""
    x = random(num_rows, k, dtype=dtype, device="cuda")
    weight = random(2 * n, k, dtype=dtype, device="cuda", seed=1) / k**0.5
    expected = gated_gemm.gated_linear_reference(x, weight)
    for _ in range(2):
        out = gated_gemm.gated_linear(x, weight, nans(num_rows, n, dtype=dtype, device="cuda"))
        assert_close(out, expected)


def compare_list_tiles(query_lens: Sequence[int], seq_lens: Sequence[int], group: int, device: str) -> None:
    """Every tile that sees a key is there once, the longer ones first as far as that counts."""
    starts = [sum(query_lens[:index]) for index in range(len(query_lens) + 1)]
    expected = []
    for seq, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        num_rows = query_len * group
        for first in range(0, num_rows, chunk_tiles.ROWS):
            last_query = (min(first + chunk_tiles.ROWS, num_rows) - 1) // group
            steps = -(-(seq_len - query_len + last_query + 1) // chunk_tiles.KEYS)
            if steps > 0:
                expected.append([seq, starts[seq], seq_len, num_rows, first, steps])
    listed = chunk_tiles.list_tiles(
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
        torch.tensor(starts, dtype=torch.int32, device=device),
        starts[-1],
        group,
    )
    count = int(listed[0, 0])
    found = listed[1 : 1 + count, :6].tolist()
    assert sorted(found) == sorted(expected)
    kinds = [min(entry[5], 8) for entry in found]
    assert kinds == sorted(kinds, reverse=True)
    assert found == sorted(found, key=lambda entry: (-min(entry[5], 8), -entry[0], -entry[4]))


def compare_attention(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    window: int | None = None,
    *,
    softcap: float | None = None,
    is_float8: bool = False,
) -> Tensor:
    """Returns the kernel's output."""
    blocks_of = [-(-seq_len // BLOCK_SIZE) for seq_len in seq_lens]
    num_blocks = sum(blocks_of) + 2
    shuffled = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(5)).tolist()
    cache = nans(num_blocks, 2, num_kv_heads, BLOCK_SIZE, head_dim, dtype=dtype, device=device)
    cache = cache.to(FLOAT8) if is_float8 else cache
    k_cache, v_cache = cache.unbind(1)  # strided, as the engine's are
    tables = torch.full((len(seq_lens), max(blocks_of) + 3), 2**30, dtype=torch.int32)  # far outside the cache
    for i, seq_len in enumerate(seq_lens):
        blocks = [shuffled.pop() for _ in range(blocks_of[i])]
        tables[i, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        for seed, half in ((7, k_cache), (8, v_cache)):
            tokens = random(seq_len, num_kv_heads, head_dim, dtype=dtype, device=device, seed=seed)
            for place, block in enumerate(blocks):
                part = tokens[place * BLOCK_SIZE : (place + 1) * BLOCK_SIZE]
                half[block, :, : len(part)] = part.transpose(0, 1).to(half.dtype)
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
        "softcap": softcap,
        "key_scale": 0.7 if is_float8 else 1.0,
        "value_scale": 1.3 if is_float8 else 1.0,
    }
    expected = paged_attention.paged_attention_reference(q, k_cache, v_cache, **arguments)
    if max(query_lens) == 1:
        arguments["work"] = poisoned_work(q, num_kv_heads, arguments["seq_lens"], window)
    out = nans(num_tokens, num_heads, head_dim, dtype=dtype, device=device)
    for run in range(2):  # what a call counts must be 0 again before the next
        if max(query_lens) == 1 and run == 1:  # all keys but the last may be read early
            plan_decode_(
                arguments["work"], arguments["seq_lens"], num_kv_heads, is_new=torch.zeros_like(arguments["seq_lens"])
            )
        out.fill_(math.nan)
        with poisoned_memory():
            paged_attention._launch(q, k_cache, v_cache, **arguments, out=out)
        assert_close(out, expected)
    _compare_with_room(q, k_cache, v_cache, arguments, expected)
    return out


def _compare_with_room(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, arguments: dict[str, Any], expected: Tensor
) -> None:
    """The same call in buffers with room for more sequences and rows, which get nothing."""
    num_seqs = len(arguments["seq_lens"])
    roomy = arguments | {"block_tables": torch.cat((arguments["block_tables"], arguments["block_tables"][:1]))}
    length = -1 if arguments["max_query_len"] == 1 else 2**20  # a decode row that is not there; one that is not read
    roomy["seq_lens"] = torch.cat((arguments["seq_lens"], arguments["seq_lens"].new_tensor([length])))
    roomy["query_start_loc"] = torch.cat((arguments["query_start_loc"], arguments["query_start_loc"][-1:]))
    q = torch.cat((q, q[:1].expand(1 if length < 0 else 70, -1, -1)))
    if length < 0:
        roomy["work"] = poisoned_work(q, k_cache.shape[1], roomy["seq_lens"], arguments["window"])
    else:
        roomy["num_seqs"] = torch.tensor([num_seqs], dtype=torch.int32, device=q.device)
        roomy["is_long"] = hopper_attention.are_long(len(expected), num_seqs)
    for call in (paged_attention._launch, paged_attention.paged_attention_reference):
        out = nans(*q.shape, dtype=q.dtype, device=q.device)
        call(q, k_cache, v_cache, **roomy, out=out)
        assert_close(out[: len(expected)], expected)
        assert bool(out[len(expected) :].isnan().all()), "rows that no sequence has get nothing"


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


def compare_route(num_tokens: int, num_experts: int, top: int, dtype: torch.dtype, device: str) -> None:
    """Also where two experts are alike: the first one comes first."""
    logits = random(num_tokens, num_experts + 8, dtype=torch.float32, device=device)[:, :num_experts]
    logits += torch.arange(num_experts, device=device) / 1e3  # no two alike by chance, so that topk has no choice
    for renormalize in (False, True):
        found = route._launch(logits.to(dtype), top, renormalize)
        expected = route.route_reference(logits.to(dtype), top, renormalize=renormalize)
        torch.testing.assert_close(found[1], expected[1], atol=1e-6, rtol=1e-5)
        alike = torch.softmax(logits.to(dtype).float(), dim=-1)
        torch.testing.assert_close(alike.gather(1, found[0]), alike.gather(1, expected[0]), atol=0, rtol=0)
    same = route._launch(torch.zeros(2, num_experts, dtype=dtype, device=device), top, True)
    assert same[0].tolist() == [list(range(top))] * 2
    torch.testing.assert_close(same[1], torch.full_like(same[1], 1 / top))


def chosen_experts(num_tokens: int, num_experts: int, top: int, device: str, *, left_out: int = 0) -> Tensor:
    """``left_out`` experts that nobody takes, the first and from there every third."""
    generator = torch.Generator().manual_seed(num_tokens)
    likely = torch.rand(num_tokens, num_experts, generator=generator)
    likely[:, : 3 * left_out : 3] = -1.0
    return likely.topk(top, dim=-1).indices.to(device)


def compare_plan_tiles(num_tokens: int, top: int, num_experts: int, here: range, rows: int, device: str) -> None:
    chosen = chosen_experts(num_tokens, num_experts, top, device, left_out=1)
    found = row_tiles._launch(chosen, here.start, len(here), rows)
    expected = row_tiles.plan_tiles_reference(chosen, here.start, len(here), rows)
    for name in ("slots", "experts", "places", "used"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    stands = [(slot, place) for slot, place in enumerate(found.places.flatten().tolist()) if place >= 0]
    assert [found.slots[place].item() for _, place in stands] == [slot for slot, _ in stands]


def compare_expert_rows(num_tokens: int, top: int, here: range, width: int, dtype: torch.dtype, device: str) -> None:
    """Rows spread and weighed; what is padded or elsewhere is NaN and is not seen."""
    tiles = row_tiles.plan_tiles(chosen_experts(num_tokens, 8, top, device), here.start, len(here), 32)
    x = random(num_tokens, width + 8, dtype=dtype, device=device)[:, :width]
    is_slot = tiles.slots < tiles.num_slots
    spread = expert_rows._launch_spread(x, tiles)
    assert torch.equal(spread[is_slot], expert_rows.spread_rows_reference(x, tiles)[is_slot])
    shares = random(num_tokens, top, dtype=torch.float32, device=device)
    for is_spread, rows in ((True, len(tiles.slots)), (False, tiles.num_slots)):
        y = random(rows, width, dtype=dtype, device=device)
        expected = expert_rows.weigh_rows_reference(y, shares, tiles.places, is_spread=is_spread)
        y[~is_slot if is_spread else tiles.places.flatten() < 0] = math.nan
        assert_close(expert_rows._launch_weigh(y, shares, tiles.places, is_spread=is_spread), expected)


def compare_split_places(num_tokens: int, here: range, width: int, device: str) -> None:
    tiles = row_tiles.plan_tiles(chosen_experts(num_tokens, 8, 2, device), here.start, len(here), 32)
    is_slot = tiles.slots < tiles.num_slots
    for is_gated, rows in ((False, num_tokens), (True, len(tiles.slots))):
        x = random(rows, width * (1 + is_gated), dtype=torch.bfloat16, device=device)
        codes, scales = split_places.split_places(x, tiles, is_gated=is_gated)
        expected, expected_scales = split_places.split_places_reference(x, tiles, is_gated=is_gated)
        assert_close(scales[is_slot], expected_scales[is_slot])
        values, found = ((c[0].float() + c[1].float() / 16)[is_slot] for c in (expected, codes))
        assert (values - found).abs().max() <= 2 * is_gated  # of 256: SiLU may be rounded to the next bfloat16


def compare_grouped_linear(
    num_tokens: int,
    top: int,
    num_experts: int,
    here: range,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    *,
    is_gated: bool = False,
) -> None:
    """Rows to the experts ``here`` of ``num_experts``: k slots a row (the first product), then a row a slot."""
    width, depth = shape
    chosen = chosen_experts(num_tokens, num_experts, top, device, left_out=1)
    rows_of_tile = 1 if num_tokens <= 4 else row_tiles.tile_rows(chosen.numel(), num_experts)
    tiles = row_tiles.plan_tiles(chosen, here.start, len(here), rows_of_tile)
    weight = random(len(here), width * (1 + is_gated), depth, dtype=dtype, device=device, seed=1) / depth**0.5
    for rows, slots_per_row in ((num_tokens, top), (num_tokens * top, 1)):
        x = random(rows, depth, dtype=dtype, device=device)
        expected = x.new_zeros(num_tokens * top, width)
        for slot, expert in enumerate(chosen.flatten().tolist()):
            if expert in here:
                y = weight[expert - here.start].float() @ x[slot // slots_per_row].float()
                expected[slot] = (silu_and_mul.silu_and_mul_reference(y) if is_gated else y).to(dtype)
        reference = grouped_gemm.grouped_linear_reference(x, weight, tiles, slots_per_row, is_gated=is_gated)
        assert_close(reference, expected)
        is_ours = tiles.places.flatten() >= 0
        out = nans(num_tokens * top, width, dtype=dtype, device=device)
        grouped_gemm._launch(x, weight, tiles, slots_per_row, out, is_gated=is_gated)
        assert bool(out[~is_ours].isnan().all()), "slots of other ranks are not written"
        assert_close(out[is_ours], expected[is_ours])


def compare_grouped_wide(
    num_tokens: int, top: int, num_experts: int, here: range, shape: tuple[int, int], dtype: torch.dtype, is_gated: bool
) -> None:
    """Only on Hopper. Padded rows of ``x`` are NaN."""
    width, depth = shape
    chosen = chosen_experts(num_tokens, num_experts, top, "cuda", left_out=1)
    tiles = row_tiles.plan_tiles(chosen, here.start, len(here), gated_gemm.ROWS)
    weight = random(len(here), width * (1 + is_gated), depth, dtype=dtype, device="cuda", seed=1) / depth**0.5
    x = random(len(tiles.slots), depth, dtype=dtype, device="cuda")
    expected = grouped_hopper.grouped_wide_reference(x, weight, tiles, is_gated=is_gated)
    is_slot = tiles.slots < tiles.num_slots
    x[~is_slot] = math.nan
    results = []
    for _ in range(3):  # a race would make them differ
        out = nans(len(x), width, dtype=dtype, device="cuda")
        results.append(grouped_hopper.grouped_wide(x, weight, tiles, is_gated=is_gated, out=out)[is_slot])
    assert_close(results[0], expected[is_slot])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def compare_skinny_linear(
    num_rows: int,
    n: int,
    k: int,
    config: skinny_linear.SkinnyConfig,
    dtype: torch.dtype,
    device: str,
    *,
    is_gated: bool = False,
    has_bias: bool = False,
) -> None:
    """Two runs, which must give the same bits."""
    x = random(num_rows, k + 8, dtype=dtype, device=device)[:, :k]
    weight = random(n * (1 + is_gated), k, dtype=dtype, device=device, seed=1) / k**0.5
    bias = random(weight.shape[0], dtype=dtype, device=device, seed=2) if has_bias else None
    workspace = skinny_linear.build_skinny_workspace(torch.device(device))
    results = []
    for _ in range(2):
        workspace.parts.fill_(math.nan)
        out = nans(num_rows, n, dtype=dtype, device=device)
        options = {"config": config, "workspace": workspace, "is_gated": is_gated, "out": out}
        results.append(skinny_linear.skinny_linear(x, weight, bias, **options))
    assert torch.equal(results[0], results[1])
    assert not workspace.arrivals.any()
    assert_close(results[0], skinny_linear.skinny_linear_reference(x, weight, bias, is_gated=is_gated))


DIALS: list[dict[str, float]] = [  # of rows in turn; what is left out is off
    {"temperature": 0.0},
    {},
    {"top_k": 50, "top_p": 0.9},
    {"top_p": 0.8, "temperature": 1.5},
    {"min_p": 0.01},
    {"top_k": 300},
    {"min_p": 0.1, "top_p": 0.5},
    {"top_k": 1},
    {"top_k": 40, "min_p": 0.05, "top_p": 0.7, "temperature": 0.7},
    {"top_p": 1e-6},
    {"top_p": 0.999},
]


def sampling_dials(num_rows: int, vocab_size: int, device: str) -> sample.SamplingDials:
    rows = [DIALS[i % len(DIALS)] for i in range(num_rows)]

    def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return sample.SamplingDials(
        temperature=column([row.get("temperature", 1.0) for row in rows]),
        log_min_p=column([math.log(row["min_p"]) if "min_p" in row else -math.inf for row in rows]),
        top_k=column([row.get("top_k", vocab_size) for row in rows], torch.int32),
        top_p=column([row.get("top_p", math.inf) for row in rows]),
        seed_hashes=sample.hash_seeds([2**62 // (i + 1) for i in range(num_rows)]).to(device),
    )


def compare_sample(num_rows: int, vocab_size: int, dtype: torch.dtype, device: str, *, spread: float = 2.0) -> None:
    """Coarse logits tie often; ``spread`` 0.1 makes rows so flat that all of the vocabulary is looked at."""
    logits = (random(num_rows, vocab_size + 5, dtype=torch.float32, device=device) * spread).to(dtype)[:, :vocab_size]
    if num_rows > len(DIALS):
        logits[-1, vocab_size // 2] = math.nan
        logits[-2] = -math.inf
    positions = torch.arange(num_rows, device=device) * 7
    dials = sampling_dials(num_rows, vocab_size, device)
    workspace = sample.build_sample_workspace(num_rows + 1, vocab_size, torch.device(device))
    out = (torch.full((num_rows,), -7, device=device), torch.zeros(num_rows, dtype=torch.bool, device=device))
    ends = [rows_that_end(num_rows, device) for _ in range(2)]
    for end, most_programs in ((None, 1024), (ends[0], 5)):
        for scratch in (workspace.peaks, workspace.best, workspace.mass):
            scratch.fill_(math.nan)
        workspace.listed.fill_(2**30)
        with mock.patch.object(sample, "_MOST_PROGRAMS", most_programs):
            sample._launch(logits, positions - 3, dials, workspace, 3, False, out, end)
        expected = sample.sample_reference(logits, positions, dials)
        assert torch.equal(out[1], expected[1])
        assert torch.equal(out[0], expected[0])
    step_rows.end_rows_reference(ends[1], *expected)
    compare_ends(*ends)
    sample._launch(logits, positions, dials, workspace, 0, True, out)
    sound = ~out[1]
    assert torch.equal(out[0][sound], logits.argmax(dim=-1)[sound])


def compare_peer_all_reduce(num_rows: int, width: int, dtype: torch.dtype, *, is_added: bool, is_normed: bool) -> None:
    """Two ranks in one process, one after the other: the first gives up waiting, but has written to the second."""
    device = torch.device("cpu")
    memories = [
        torch.zeros(peer_all_reduce.peer_bytes(2, 70, width, dtype), dtype=torch.uint8, device=device) for _ in range(2)
    ]
    addresses = [memory.data_ptr() for memory in memories]
    ends = [
        peer_all_reduce.join_peer_memory(rank, memories[rank], addresses, 70, width, dtype, None) for rank in range(2)
    ]
    gain = random(width, dtype=dtype, device="cpu", seed=5) if is_normed else None
    for call in range(3):
        first = call % 2  # the two take turns in being ahead
        summands = [random(num_rows, width, dtype=dtype, device="cpu", seed=10 * call + rank) for rank in range(2)]
        residual = random(num_rows, width, dtype=dtype, device="cpu", seed=call) if is_added else None
        options = {"gain": gain, "eps": 1e-5}
        copies = [None if residual is None else residual.clone() for _ in range(2)]
        peer_all_reduce.peer_all_reduce(summands[first], ends[first], residual=copies[first], **options, max_polls=2)
        assert int(ends[first].status) == 1  # it says so
        ends[first].status.zero_()
        out = nans(num_rows, width, dtype=dtype, device="cpu") if is_normed or not is_added else None
        other = 1 - first
        found = peer_all_reduce.peer_all_reduce(
            summands[other], ends[other], residual=copies[other], **options, max_polls=2, out=out
        )
        assert int(ends[other].status) == 0
        assert_close(found, peer_all_reduce.peer_all_reduce_reference(summands, residual, gain, 1e-5))
        if residual is not None:
            assert_close(copies[other], residual)


def compare_peer_columns(num_rows: int, columns: int, size: int, dtype: torch.dtype) -> None:
    """Ranks in one process, one after the other: what rank 0 has once the others have written, and that it waits."""
    num_bytes = peer_columns.peer_columns_bytes(num_rows + 1, columns, dtype)
    memories = [torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(size)]
    first = memories[0].data_ptr()
    shape = (num_rows + 1, columns, dtype)
    ends = [peer_columns.join_peer_columns(rank, size, memories[rank], first, *shape, None, 5) for rank in range(size)]
    width = -(-columns // (128 * size)) * 128  # the last ranks have padding, perhaps nothing else
    for call in range(3):
        parts = [random(num_rows, width, dtype=dtype, device="cpu", seed=10 * call + rank) for rank in range(size)]
        parts[size - 1][0, 0] = math.nan
        logits = torch.cat(parts, dim=-1)[:, :columns]
        is_whole = torch.arange(num_rows + 1) % 2 == call % 2
        ends[0].rows.fill_(math.nan)
        ends[0].peaks.fill_(math.nan)
        for rank in reversed(range(size)):
            ends[rank].is_whole.copy_(is_whole)
            found = peer_columns.peer_columns(parts[rank], ends[rank], max_polls=2)
        compare_written(found, ends[0].peaks[:num_rows], logits, is_whole[:num_rows], width)
        assert bool(ends[0].rows[num_rows].isnan().all())
        assert not any(int(end.status) for end in ends)
    peer_columns.peer_columns(parts[0], ends[0], max_polls=2)
    assert int(ends[0].status) == 1  # nobody else has come


def compare_drawn_columns(num_rows: int, columns: int, dtype: torch.dtype) -> None:
    """What is drawn of rows that two ranks wrote, some of them whole, is what is drawn of all logits."""
    width = -(-columns // 256) * 128
    memory = torch.zeros(peer_columns.peer_columns_bytes(num_rows, columns, dtype), dtype=torch.uint8)
    shape = (num_rows, columns, dtype)
    dials = sampling_dials(num_rows, columns, "cpu")
    dials.temperature[::2] = 0.0
    parts = [random(num_rows, width, dtype=torch.float32, device="cpu", seed=rank).mul(2).to(dtype) for rank in (0, 1)]
    if num_rows > 8:  # NaN, of a greedy row and another; nothing; all the same; the largest twice in the second rank
        parts[1][0, 3] = parts[0][1, 5] = math.nan
        for part in parts:
            part[2] = -math.inf
            part[4] = 1.0
        parts[1][6, 200] = parts[1][6, 500] = 99.0
    for rank in (1, 0):
        end = peer_columns.join_peer_columns(rank, 2, memory, memory.data_ptr(), *shape, None)
        end.is_whole.copy_(dials.temperature > 0)
        rows = peer_columns.peer_columns(parts[rank], end, max_polls=2)
    positions = torch.arange(num_rows)
    workspace = sample.build_sample_workspace(num_rows, columns, torch.device("cpu"))
    workspace.peaks.fill_(math.nan)
    out = (torch.full((num_rows,), -7), torch.ones(num_rows, dtype=torch.bool))
    sample._launch(rows, positions, dials, workspace, 0, False, out, None, end.peaks)
    expected = sample.sample_reference(torch.cat(parts, dim=-1)[:, :columns], positions, dials)
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1], expected[1])


def compare_written(found: Tensor, peaks: Tensor, logits: Tensor, is_whole: Tensor, width: int) -> None:
    """What peer_columns has written of ``logits`` into rows and peaks of NaN, ``width`` columns a rank."""
    num_rows, columns = logits.shape
    padded = torch.nn.functional.pad(logits.float(), (0, -columns % 128), value=-math.inf)
    blocks = padded.nan_to_num(math.inf, math.inf, -math.inf).view(num_rows, -1, 128)
    assert torch.equal(peaks, blocks.amax(dim=-1))
    for row in range(num_rows):
        is_written = torch.full_like(logits[row], is_whole[row], dtype=torch.bool)
        for start in range(0, columns, width):  # of a rank
            for first in range(start, min(start + width, columns), 32 * 128):
                stop = min(first + 32 * 128, start + width, columns)
                best = int(peaks[row, first // 128 : -(-stop // 128)].argmax())
                at = first + best * 128
                is_written[at : min(at + 128, stop)] = True
        assert torch.equal(found[row][is_written].nan_to_num(7.0), logits[row][is_written].nan_to_num(7.0))
        assert bool(found[row][~is_written].isnan().all())


def compare_peer_line(
    calls: Sequence[tuple[bool, int]], width: int, num_slots: int, programs: int, dtype: torch.dtype
) -> None:
    """Both ends in one process: any order of ``calls`` (whether it puts, rows) against a queue. A message is put while
    there is a free slot and taken while there is one, and else nothing happens."""
    max_rows = max(rows for _, rows in calls)
    row_bytes = width * dtype.itemsize
    num_bytes = peer_line.peer_line_bytes(num_slots, max_rows, row_bytes)
    memories = [torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(2)]
    shape = {"num_slots": num_slots, "max_rows": max_rows, "row_bytes": row_bytes, "programs": programs}
    writer, reader = (
        peer_line.join_peer_line(memories[end], memories[1 - end].data_ptr(), **shape) for end in range(2)
    )
    sent: deque[Tensor] = deque()
    for number, (puts, num_rows) in enumerate(calls):
        end, can = (writer, len(sent) < num_slots) if puts else (reader, bool(sent))
        if puts:
            x = torch.empty(num_rows, width, dtype=dtype)
            peer_line.put(x.fill_(number % 100 + 1), end, max_polls=2)
            if can:
                sent.append(x)
        else:
            out = torch.full((len(sent[0]) if sent else num_rows, width), -1, dtype=dtype)
            expected = sent.popleft() if can else out.clone()
            peer_line.take_(out, end, max_polls=2)
            assert torch.equal(out, expected)
        assert int(end.status) == (not can)
        end.status.zero_()


def compare_peer_two_shot(num_rows: int, width: int, size: int, dtype: torch.dtype, mode: str) -> None:
    """Ranks in one process, one after the other: all but the last give up waiting, but have written to it."""
    num_bytes = peer_rows.peer_rows_bytes(size, 70, width, dtype, 5)
    memories = [torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(size)]
    ends = [peer_rows.join_peer_rows(rank, memories, 70, width, dtype, None, 5) for rank in range(size)]
    gain = random(width, dtype=dtype, device="cpu", seed=5) if "normed" in mode else None
    is_shared_out = "shared" in mode
    for call in range(3):
        order = [(call + rank) % size for rank in range(size)]
        summands = [random(num_rows, width, dtype=dtype, device="cpu", seed=10 * call + rank) for rank in range(size)]
        residual = random(num_rows, width, dtype=dtype, device="cpu", seed=call) if "added" in mode else None
        copies = [None if residual is None else residual.clone() for _ in range(size)]
        before = copies[order[-1]]
        before = None if before is None else before.clone()
        for rank in order:
            peer_rows.send_all(summands[rank], ends[rank])
        for rank in order:
            found = peer_two_shot.peer_two_shot(
                summands[rank],
                ends[rank],
                residual=copies[rank],
                gain=gain,
                eps=1e-5,
                is_shared_out=is_shared_out,
                max_polls=2,
                out=None if is_shared_out or gain is None else nans(num_rows, width, dtype=dtype, device="cpu"),
            )
            assert int(ends[rank].status) == int(rank != order[-1])  # it says so
            ends[rank].status.zero_()
        assert_close(found, peer_all_reduce.peer_all_reduce_reference(summands, residual, gain, 1e-5))
        if residual is not None:
            ours = peer_rows.shares(num_rows, size)[order[-1]] if is_shared_out else range(num_rows)
            assert_close(copies[order[-1]][ours.start : ours.stop], residual[ours.start : ours.stop])
            for row in set(range(num_rows)) - set(ours):
                assert torch.equal(copies[order[-1]][row], before[row])


def packed_weight(
    shape: tuple[int, ...], kind: str, num_groups: int, dtype: torch.dtype, device: str
) -> packed_linear.PackedWeight:
    """Codes at their whole range; products of numbers of size 1 are of size 1."""
    *_, width, depth = shape
    generator = torch.Generator().manual_seed(width + depth)
    integers = torch.randint(0, 256, (*shape[:-1], depth // 2 if kind == "int4" else depth), generator=generator)
    codes = integers.to(torch.uint8).to(device)
    if kind == "int8":
        codes = codes.view(torch.int8)
    elif kind == "fp8":
        codes = (codes & 0xBF).view(FLOAT8)  # no NaN, nothing above 2
    size = {"int4": 15, "int8": 128, "fp8": 2}[kind]
    scale_dtype = torch.float32 if num_groups == 1 else dtype
    scales = (torch.rand(*shape[:-1], num_groups, generator=generator) / size / depth**0.5).to(device, scale_dtype)
    return packed_linear.PackedWeight(codes, scales, -scales * 7 if kind == "int4" else None)


def compare_packed_linear(
    num_rows: int,
    shape: tuple[int, int],
    kind: str,
    num_groups: int,
    dtype: torch.dtype,
    device: str,
    config: packed_linear.PackedConfig | None = None,
    *,
    is_tiled: bool = False,
) -> None:
    """Rows and columns that no tile ends with; plain, and as gate and up with a bias."""
    weight = packed_weight(shape, kind, num_groups, dtype, device)
    if is_tiled:
        plain, weight = weight, packed_linear.in_tiles(weight)
        assert weight.is_tiled
        halves = [packed_linear.dequantise_reference(one, dtype) for one in (plain, weight)]
        assert torch.equal(*halves)
    whole = packed_linear._launch_dequantise(weight, nans(*shape, dtype=dtype, device=device))
    assert_close(whole, packed_linear.dequantise_reference(weight, dtype))
    x = random(num_rows, shape[1] + 16, dtype=dtype, device=device)[:, : shape[1]]
    workspace = skinny_linear.build_skinny_workspace(torch.device(device))
    bias = random(shape[0], dtype=dtype, device=device, seed=3)
    for is_gated, added in ((False, None), (True, bias)) if shape[0] > 1 else ((False, bias),):
        chosen = config or packed_linear.packed_config(weight, x, is_gated=is_gated)
        assert chosen is not None
        for _ in range(2):
            workspace.parts.fill_(math.nan)
            out = nans(num_rows, shape[0] // (1 + is_gated), dtype=dtype, device=device)
            options = {"config": chosen, "workspace": workspace, "is_gated": is_gated}
            packed_linear.packed_linear(x, weight, added, **options, out=out)
            assert_close(out, packed_linear.packed_linear_reference(x, weight, added, is_gated=is_gated))
        assert not bool(workspace.arrivals.any())


def compare_split_rows(num_rows: int, width: int, device: str) -> None:
    """Rows of all sizes, one of zeros, one with infinity: the kernel's bits are the reference's, and they are x."""
    x = random(num_rows, width, dtype=torch.bfloat16, device=device)
    x *= torch.logspace(-30, 30, num_rows, device=device)[:, None].to(x.dtype)
    x[num_rows // 2] = 0.0
    split, expected = (function(x) for function in (split_rows._launch, split_rows.split_rows_reference))
    assert torch.equal(split.codes.float(), expected.codes.float())
    assert torch.equal(split.scales, expected.scales)
    torch.testing.assert_close(split.sums, expected.sums, atol=0.01, rtol=1e-5)
    x[0, -1] = math.inf
    assert split_rows._launch(x).scales.isnan().tolist() == [row == 0 for row in range(num_rows)]


def compare_grouped_packed_linear(
    num_tokens: int,
    top: int,
    here: range,
    shape: tuple[int, int],
    kind: str,
    groups: int,
    dtype: torch.dtype,
    device: str,
    *,
    is_tiled: bool = False,
    is_split: bool = False,
    is_gated: bool = False,
) -> None:
    """As compare_grouped_linear, of ``here`` among 8 experts."""
    width, depth = shape
    chosen = chosen_experts(num_tokens, 8, top, device, left_out=1)
    is_one = num_tokens <= 4 and kind != "int4" and not is_split
    rows_of_tile = 1 if is_one else row_tiles.tile_rows(chosen.numel(), 8)
    tiles = row_tiles.plan_tiles(chosen, here.start, len(here), rows_of_tile)
    weight = packed_weight((len(here), width * (1 + is_gated), depth), kind, groups, dtype, device)
    whole = [None if x is None else x.flatten(0, 1) for x in (weight.codes, weight.scales, weight.offsets)]
    assert whole[0] is not None
    assert whole[1] is not None
    weight = packed_linear.PackedWeight(whole[0], whole[1], whole[2])
    if is_tiled:
        weight = packed_linear.in_tiles(weight)
        assert weight.is_tiled
    for rows, slots_per_row in ((num_tokens, top), (num_tokens * top, 1)):
        x = random(rows, depth, dtype=dtype, device=device)
        place = len(here), tiles, slots_per_row
        expected = grouped_packed.grouped_packed_linear_reference(x, weight, *place, is_gated=is_gated)
        out = nans(num_tokens * top, width, dtype=dtype, device=device)
        launch = grouped_float8.launch_grouped_float8 if is_split else grouped_packed._launch
        launch(x, weight, *place, out, is_gated=is_gated)
        is_ours = tiles.places.flatten() >= 0
        assert_close(out[is_ours], expected[is_ours])
        assert bool(out[~is_ours].isnan().all()), "slots of other ranks are not written"


def compare_grouped_float8_wide(num_tokens: int, here: range, shape: tuple[int, int], groups: int) -> None:
    """Only on Hopper. Padded rows of ``x`` are NaN."""
    width, depth = shape
    chosen = chosen_experts(num_tokens, 8, 2, "cuda", left_out=1)
    tiles = row_tiles.plan_tiles(chosen, here.start, len(here), gated_gemm.ROWS)
    weight = packed_weight((len(here), width, depth), "fp8", groups, torch.bfloat16, "cuda")
    weight = packed_linear.PackedWeight(weight.codes.flatten(0, 1), weight.scales.flatten(0, 1))
    x = random(len(tiles.slots), depth, dtype=torch.bfloat16, device="cuda")
    assert grouped_hopper_float8.suits_float8_wide(x, weight, len(here))
    dense = packed_linear.dequantise_reference(weight, torch.float32).view(len(here), width, depth)
    expected = grouped_hopper.grouped_wide_reference(x, dense, tiles, is_gated=False)
    is_slot = tiles.slots < tiles.num_slots
    x[~is_slot] = math.nan
    results = []
    for _ in range(3):
        out = nans(len(x), width, dtype=torch.bfloat16, device="cuda")
        split = split_rows.split_rows(x)
        given = split.codes, split.scales, weight, len(here), tiles, out
        results.append(grouped_hopper_float8.grouped_float8_wide(*given)[is_slot])
    assert_close(results[0], expected[is_slot])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def compare_quantise_rows(
    num_rows: int, width: int, kind: str, scale: float | None, dtype: torch.dtype, device: str
) -> None:
    x = random(num_rows, width + 8, dtype=dtype, device=device)[:, :width]
    x[0] = 0.0
    codes, scales = quantise_rows.quantise_rows_reference(x, kind, scale)
    out = torch.full(x.shape, 7, dtype=torch.int8, device=device).view(codes.dtype)
    found, found_scales = quantise_rows._launch(x, kind, scale, out)
    floats, float_scales = quantise_rows._launch(x, kind, scale, nans(num_rows, width, dtype=dtype, device=device))
    torch.testing.assert_close(found_scales, scales)
    assert torch.equal(floats.float() * float_scales[:, None], found.float() * found_scales[:, None])
    apart = (found.float() - codes.float()).abs()
    # at most one code apart, and rarely; the interpreter rounds to float8 as in compare_rotary
    share, most = (1 / 2, 0.1) if device == "cpu" and kind == "fp8" else (1 / 8, 0.01)
    assert bool((apart <= (1.0 if kind == "int8" else codes.float().abs() * share + 0.004)).all())
    assert (apart > 0).float().mean() < most


def compare_begin_step(num_rows: int, device: str, *, is_whole: bool) -> None:
    """Rows that begin a block and rows that do not, tokens of the host and of the device, and padding; ``is_whole``:
    with the plan of attention, embeddings and angles."""
    generator = torch.Generator().manual_seed(num_rows)
    num_slots, max_blocks = num_rows + 3, 16 * 40  # more blocks than a program copies at once
    last = torch.randint(0, 1000, (num_slots,), generator=generator)
    tables = torch.randint(0, 2**20, (num_slots, max_blocks), generator=generator).int()
    rows = torch.zeros(num_rows, step_rows.ROW_FIELDS, dtype=torch.int64)
    rows[:, step_rows.SLOT] = torch.randperm(num_slots, generator=generator)[:num_rows]
    rows[:, step_rows.POSITION] = torch.randint(0, max_blocks * BLOCK_SIZE, (num_rows,), generator=generator)
    rows[:, step_rows.TOKEN] = torch.where(torch.arange(num_rows) % 2 == 0, -1, 7)
    rows[:, step_rows.BLOCK] = torch.where(torch.arange(num_rows) % 3 == 0, 99, -1)
    rows[3::4, step_rows.POSITION] = -1
    rows[3::4, step_rows.BLOCK] = -1
    rows[5::6, step_rows.IS_NEW] = 1
    if num_rows > 4 and not is_whole:
        rows[-2:, step_rows.POSITION] = -2
    found, expected = ([x.to(device).clone() for x in (rows, last, tables)] for _ in range(2))
    made = [step_rows.build_step_rows(num_rows + 2, max_blocks, torch.device(device)) for _ in range(2)]
    for buffer in (made[0].token_ids, made[0].positions, made[0].slot_mapping, made[0].seq_lens):
        buffer.fill_(-(2**30))
    start = begun = work = planned = None
    if is_whole:
        weight, frequencies = random(1001, 1100, dtype=torch.bfloat16, device=device), torch.rand(24, device=device)
        start = begin_step.RowStart(weight, frequencies, 1.25)
        begun = begin_step.new_rows(num_rows, start)
        for made_of_rows in (begun.x, begun.cos, begun.sin):
            made_of_rows.fill_(float("nan"))
        sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": torch.float32}
        work, planned = (
            build_decode_work(max(num_rows, 1), **sizes, device=torch.device(device), num_programs=37) for _ in range(2)
        )
        for plan in (work, planned):
            plan.stretches.fill_(-7)
            plan.totals.fill_(-7)
    begin_step.launch(*found, BLOCK_SIZE, made[0], work, 2, start, begun)
    step_rows.step_rows_reference(*expected, block_size=BLOCK_SIZE, out=made[1])
    for name in ("token_ids", "positions", "slot_mapping", "seq_lens"):
        # the last two are not there
        count = num_rows if name == "seq_lens" or num_rows <= 4 or is_whole else num_rows - 2
        ours, theirs = (getattr(one, name)[:count] for one in made)
        assert torch.equal(ours, theirs), name
        assert bool((getattr(made[0], name)[count:] == -(2**30)).all()), "nothing behind the rows is written"
    assert torch.equal(found[2], expected[2]), "the begun blocks, and no other, are noted"
    for row, seq_len in enumerate(made[1].seq_lens.tolist()[:num_rows]):
        width = -(-seq_len // BLOCK_SIZE)
        assert torch.equal(made[0].block_tables[row, :width], made[1].block_tables[row, :width])
    if start is not None and begun is not None and planned is not None and work is not None and num_rows:
        numbers = made[1].first(num_rows)
        assert torch.equal(begun.x, start.embedding[numbers.token_ids])
        angles = rotary_angles._launch(numbers.positions, start.frequencies, start.scale)
        assert torch.equal(begun.cos, angles[0]), "the same bits as the kernel of other steps gives"
        assert torch.equal(begun.sin, angles[1])
        plan_decode_(planned, numbers.seq_lens, 2, is_new=found[0][:, step_rows.IS_NEW])
        assert torch.equal(work.stretches, planned.stretches)
        assert torch.equal(work.totals, planned.totals)


def rows_that_end(num_rows: int, device: str) -> step_rows.RowsEnd:
    """Rows that go on from any line of answers, and padding that stays."""
    generator = torch.Generator().manual_seed(num_rows)
    lines, width = 3, num_rows + 2
    rows = torch.randint(0, 1000, (num_rows, step_rows.ROW_FIELDS), generator=generator)
    rows[:, step_rows.DRAW_SLOT] = torch.randperm(num_rows + 5, generator=generator)[:num_rows]
    rows[:, step_rows.ANSWER] = num_rows % lines * width + torch.arange(num_rows)
    rows[2::3, step_rows.ANSWER] = -1
    last, answers = torch.zeros(num_rows + 5, dtype=torch.int64), torch.zeros(lines, width, dtype=torch.int64)
    return step_rows.RowsEnd(rows.to(device), last.to(device), answers.to(device))


def compare_ends(found: step_rows.RowsEnd, expected: step_rows.RowsEnd) -> None:
    for name in ("rows", "last_token_ids", "answers"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def compare_end_rows(num_rows: int, device: str, *, has_bad: bool) -> None:
    given, found, expected = (rows_that_end(num_rows, device) for _ in range(3))
    tokens = torch.arange(num_rows, device=device) * 7
    is_bad = tokens % 2 == 0 if has_bad else None
    for _ in range(4):
        step_rows.launch_end_rows(found, tokens, is_bad)
        step_rows.end_rows_reference(expected, tokens, is_bad)
    compare_ends(found, expected)
    assert torch.equal(found.rows[2::3], given.rows[2::3]), "padding stays"
    position = step_rows.POSITION
    assert torch.equal(found.rows[0::3, position], given.rows[0::3, position] + 4)
