"""Which calls of decode attention the kernel for Hopper takes."""

from __future__ import annotations

import pytest
import torch
from aphro_kernels import decode_work, hopper_decode
from aphro_kernels.decode_work import build_decode_work, programs_of

CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.mark.parametrize(
    ("options", "is_taken"),
    [
        ({}, True),
        ({"head_dim": 64, "dtype": torch.float16}, True),
        ({"num_heads": 16, "num_kv_heads": 1}, True),
        ({"num_heads": 17, "num_kv_heads": 1}, False),  # more heads of a group than it has columns
        ({"head_dim": 96}, False),
        ({"window": 4096}, False),
        ({"cache_dtype": torch.float8_e4m3fn}, False),
        ({"cache_dtype": BF16}, True),
    ],
)
def test_work_is_for_one_kernel(options: dict[str, object], is_taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": BF16} | options
    monkeypatch.setattr(decode_work, "is_hopper", lambda device, dtype: True)
    work = build_decode_work(4, **call, device=CPU, num_programs=3)  # type: ignore[arg-type]
    assert bool(work.stages) == is_taken
    monkeypatch.setattr(decode_work, "is_hopper", lambda device, dtype: False)
    assert not build_decode_work(4, **call, device=CPU, num_programs=3).stages  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("block_size", "cache_dtype", "softcap", "is_taken"),
    [
        (16, BF16, None, True),
        (64, BF16, None, True),
        (128, BF16, None, False),
        (8, BF16, None, False),
        (16, torch.uint8, None, False),
        (16, BF16, 30.0, False),
    ],
)
def test_calls_that_it_is_not_made_for(
    block_size: int, cache_dtype: torch.dtype, softcap: float | None, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_work, "is_hopper", lambda device, dtype: True)
    work = build_decode_work(4, num_heads=8, num_kv_heads=2, head_dim=128, dtype=BF16, device=CPU, num_programs=3)
    q, cache = torch.empty(1, 8, 128, dtype=BF16), torch.empty(1, 2, block_size, 128, dtype=cache_dtype)
    assert hopper_decode.suits(q, cache, work, softcap) == is_taken


def test_one_row_takes_half_of_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_ring, programs in ((True, [4, 8, 8]), (False, [8, 8, 8])):
        monkeypatch.setattr(decode_work, "is_hopper", lambda device, dtype, is_ring=is_ring: is_ring)
        work = build_decode_work(4, num_heads=8, num_kv_heads=2, head_dim=128, dtype=BF16, device=CPU, num_programs=8)
        assert [programs_of(work, rows) for rows in (1, 2, 4)] == programs
