"""Which products run on which CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from aphro_core import host

ZEN4 = "flags\t\t: fpu avx512f avx512bw avx512vl avx512_bf16 avx512_vnni"


@pytest.mark.parametrize(
    ("line", "has_bf16", "has_kernels"),
    [
        (ZEN4, True, True),
        (f"{ZEN4} amx_bf16 amx_tile", True, False),
        ("flags\t\t: fpu avx2 avx512f avx512bw avx512vl avx512_vnni", False, False),
        ("Features\t: fp asimd bf16 sve svebf16", True, False),
        ("", False, False),
    ],
)
def test_by_the_flags_of_cpuinfo(line: str, has_bf16: bool, has_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: f"processor\t: 0\n{line}\nbogomips\t: 1\n")
    host.cpu_instructions.cache_clear()
    try:
        assert (host.has_bf16_instructions(), host.has_product_kernels()) == (has_bf16, has_kernels)
    finally:
        host.cpu_instructions.cache_clear()
