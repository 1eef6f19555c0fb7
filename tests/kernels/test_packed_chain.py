"""Which quantised layers a chain is made for, and how it deals out their outputs."""

from __future__ import annotations

import pytest
import torch
from aphro_kernels import packed_chain_layer
from aphro_kernels.chain_plan import ChainShape
from aphro_kernels.packed_chain_layer import packed_chain_rows, stripes_of
from aphro_kernels.packed_linear import PackedWeight, in_tiles
from hypothesis import given
from hypothesis import strategies as st

BF16 = torch.bfloat16
SHAPE = ChainShape(128, 256, 384, 96)


@given(st.integers(1, 4000), st.integers(1, 144))
def test_stripes(stripes: int, programs: int) -> None:
    at_once = stripes_of(16 * stripes, programs)
    assert stripes % at_once == 0
    most = -(-(stripes // at_once) // programs) * at_once
    assert most == -(-stripes // programs), "no program has more than with single stripes"


def weights(kind: str = "fp8", group: int = 128, dtype: torch.dtype = BF16) -> list[PackedWeight]:
    sizes = [(256, 128), (768, 256), (256, 384), (96, 256)]
    if kind == "int4":
        codes = [torch.zeros(n, k // 2, dtype=torch.uint8) for n, k in sizes]
        scales = [torch.ones(n, k // group, dtype=dtype) for n, k in sizes]
        return [in_tiles(PackedWeight(q, s, s)) for q, s in zip(codes, scales, strict=True)]
    element = torch.float8_e4m3fn if kind == "fp8" else torch.int8
    return [
        PackedWeight(torch.zeros(n, k).to(element), torch.ones(n, k // group if group else 1, dtype=dtype))
        for n, k in sizes
    ]


@pytest.mark.parametrize(
    ("shape", "found", "dtype", "is_taken"),
    [
        (SHAPE, weights("int4"), BF16, True),
        (SHAPE, weights("fp8"), BF16, True),
        (SHAPE, weights("fp8", 0, torch.float32), BF16, True),
        (SHAPE, weights("int4"), torch.float16, False),
        (SHAPE, weights("int4", dtype=torch.float16), BF16, False),
        (SHAPE, weights("int4", 64), BF16, False),  # not in tiles
        (SHAPE, weights("fp8", 64), BF16, False),
        (SHAPE, weights("int8"), BF16, False),
        (SHAPE, [*weights("fp8")[:3], weights("int4")[3]], BF16, False),
        (ChainShape(128, 256, 352, 96), weights("fp8"), BF16, False),
        (ChainShape(128, 256, 384, 104), weights("fp8"), BF16, False),
        (ChainShape(128, 256, 2**17, 96), weights("fp8"), BF16, False),  # no room for the row
        (ChainShape(128, 256, 384, 0), weights("fp8"), BF16, True),
    ],
)
def test_choice(
    shape: ChainShape,
    found: list[PackedWeight],
    dtype: torch.dtype,
    is_taken: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed_chain_layer, "is_hopper", lambda device, dtype: True)
    assert list(packed_chain_rows(shape, found, torch.ones(256, dtype=dtype))) == [1] * is_taken
    monkeypatch.setattr(packed_chain_layer, "is_hopper", lambda device, dtype: False)
    assert not packed_chain_rows(shape, found, torch.ones(256, dtype=dtype))
