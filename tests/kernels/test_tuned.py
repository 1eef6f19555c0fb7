"""The tables of configurations: each entry fits its shape and the kernel's workspace, and unknown devices are safe."""

from __future__ import annotations

import json
import logging
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from aphro_kernels import tuned
from aphro_kernels.cublas_lt import WORKSPACE_BYTES, LtAlgorithm
from aphro_kernels.packed_linear import PackedWeight, packed_config
from aphro_kernels.skinny_linear import SkinnyConfig, build_skinny_workspace

FILES = sorted((Path(tuned.__file__).parent / "tuned").glob("*.json"))
CUBLAS_FILES = sorted((Path(tuned.__file__).parent / "tuned" / "cublas").glob("*.json"))
SHARED_MEMORY = 227 * 1024  # bytes that one program may have on Hopper


class Weight:
    """As much of a tensor on a GPU as the look-up asks for."""

    is_cuda = True
    dtype = torch.bfloat16
    device = torch.device("cuda", 0)

    def __init__(self, n: int, k: int) -> None:
        self.shape = (n, k)


def assert_fits(config: SkinnyConfig, n: int, k: int, is_gated: bool, rows: int) -> None:
    workspace = build_skinny_workspace(torch.device("cpu"))
    assert config.rows >= rows
    assert config.inputs % 64 == 0  # whole cache lines are asked for ahead
    assert -(-n // config.columns) <= workspace.arrivals.numel()
    assert 2 * (1 + is_gated) * config.programs * config.columns * config.rows <= workspace.parts.numel()
    tile_bytes = 2 * config.inputs * (config.columns * (1 + is_gated) + config.rows)
    assert max(config.num_stages - 1, 1) * tile_bytes <= SHARED_MEMORY


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_entry_fits(path: Path) -> None:
    content = json.loads(path.read_text())
    assert content["measured_on"] in content["devices"]
    keys = [(e["n"], e["k"], e["is_gated"], e["rows"]) for e in content["entries"]]
    assert len(keys) == len(set(keys)) > 0
    for entry in content["entries"]:
        if entry["config"] is not None:
            config = SkinnyConfig(**entry["config"])
            assert_fits(config, entry["n"], entry["k"], entry["is_gated"], entry["rows"])


@pytest.mark.parametrize("path", CUBLAS_FILES, ids=lambda path: path.stem)
def test_each_entry_of_cublas_is_a_gain(path: Path) -> None:
    content = json.loads(path.read_text())
    assert content["measured_on"] in content["devices"]
    assert content["library_version"] in (12, 13)
    keys = [(e["n"], e["k"], e["rows"]) for e in content["entries"]]
    assert len(keys) == len(set(keys)) > 0
    for entry in content["entries"]:
        assert min(astuple(LtAlgorithm(**entry["algorithm"]))) >= 0
        assert entry["us"] < entry["library_us"]


def test_algorithms_of_cublas_have_the_workspace_that_they_may_want() -> None:
    assert build_skinny_workspace(torch.device("cpu")).parts.nbytes >= WORKSPACE_BYTES


@pytest.mark.parametrize(("version", "num_lines"), [(13, 0), (12, 1)])
def test_the_table_of_cublas_is_for_one_version(
    version: int, num_lines: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tuned, "_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(tuned, "library_version", lambda: version)
    monkeypatch.setattr(tuned, "lt_product", lambda *arguments: arguments[-1])
    tuned._algorithms.cache_clear()
    with caplog.at_level(logging.INFO):
        found: Any = [tuned.library_product(Weight(4096, 14336), rows) for rows in (192, 192, 193)]  # type: ignore[arg-type]
    tuned._algorithms.cache_clear()
    assert [one is not None for one in found] == [version == 13, version == 13, False]
    assert len(caplog.records) == num_lines


def look_up(monkeypatch: pytest.MonkeyPatch, device: str, *shape: int, rows: int, is_gated: bool = False) -> Any:
    monkeypatch.setattr(tuned, "_device_name", lambda _: device)
    return tuned.skinny_config(Weight(*shape), rows, is_gated=is_gated)  # type: ignore[arg-type]


def test_the_table_is_asked_by_device_shape_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        for rows, bucket in ((1, 1), (5, 8), (16, 16), (17, 32)):
            config = look_up(monkeypatch, device, 28672, 4096, rows=rows, is_gated=True)
            assert config is None or config.rows in (bucket, 8)
        assert look_up(monkeypatch, device, 6144, 4096, rows=1) is not None
        assert look_up(monkeypatch, device, 6144, 4096, rows=65) is None
        assert look_up(monkeypatch, device, 999, 4096, rows=8) is None
    assert look_up(monkeypatch, "NVIDIA L4", 6144, 4096, rows=1) is None


@pytest.mark.parametrize("n", [1, 63, 896, 5120, 262144])
@pytest.mark.parametrize("k", [8, 900, 2048, 27648])
@pytest.mark.parametrize("is_gated", [False, True])
def test_one_row_of_an_unknown_shape_takes_the_rule(
    n: int, k: int, is_gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = look_up(monkeypatch, "NVIDIA H200", n * (1 + is_gated), k, rows=1, is_gated=is_gated)
    if not is_gated or n <= 131072:  # no model has a wider gate
        assert_fits(config, n, k, is_gated, 1)
    stripes = -(-n // config.columns)
    assert config.programs <= 512
    assert stripes / config.programs > 0.99 * -(-stripes // config.programs) or stripes < 8192


def test_no_cpu_tensor_takes_the_kernel() -> None:
    assert tuned.skinny_config(torch.zeros(6144, 16, dtype=torch.bfloat16), 1) is None
    assert tuned.library_product(torch.zeros(4096, 14336, dtype=torch.bfloat16), 192) is None


@pytest.mark.parametrize(
    ("kind", "group", "takes"),
    [("int8", 8, False), ("int8", 16, True), ("int8", 48, False), ("int4", 16, False), ("int4", 32, True)],
)
def test_the_kernel_of_few_rows_takes_what_a_tensor_core_adds_up(kind: str, group: int, takes: bool) -> None:
    """16 inputs with one scale: of int4 a group has two halves. Others are dequantised."""
    scales = torch.ones(64, 384 // group)
    codes = torch.zeros(64, 384 // (2 if kind == "int4" else 1), dtype=torch.uint8 if kind == "int4" else torch.int8)
    weight = PackedWeight(codes, scales, scales if kind == "int4" else None)
    assert (packed_config(weight, torch.zeros(4, 384)) is not None) == takes
