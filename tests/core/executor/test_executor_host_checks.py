"""Hosts that may not take part: the message names host, thing and both values."""

from __future__ import annotations

from pathlib import Path

import pytest

from aphro_core.checkpoint.model_files import FileFacts, facts_of
from aphro_core.errors import ModelError, PlacementError
from aphro_core.executor.host_checks import check_devices, check_files, check_versions
from aphro_core.worker.host_report import HostReport

OURS = HostReport("here", {"aphro": "1.0", "torch": "2.13.0", "python": "3.12"}, 8, 0, 2**34, {})


def report(num_gpus: int = 0, **versions: str) -> HostReport:
    return HostReport("there", OURS.versions | versions, 8, num_gpus, 2**34, {})


def test_versions() -> None:
    check_versions("b", report(), OURS)
    with pytest.raises(PlacementError, match=r"b has torch 2\.11\.0, this host has 2\.13\.0"):
        check_versions("b", report(torch="2.11.0"), OURS)
    with pytest.raises(PlacementError, match=r"b has python 3\.11, this host has 3\.12"):
        check_versions("b", report(python="3.11"), OURS)


def test_devices() -> None:
    check_devices("b", report(num_gpus=2), 2, "cuda")
    check_devices("b", report(), 4, "cpu")
    with pytest.raises(PlacementError, match="b shows 2 GPUs, 3 ranks are to run there") as refused:
        check_devices("b", report(num_gpus=2), 3, "cuda")
    assert refused.value.hint is not None
    assert "--hosts b:2" in refused.value.hint


def test_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(b"abc")
    (tmp_path / "notes.txt").write_text("not of the model")
    ours = facts_of(tmp_path)
    assert set(ours) == {"config.json", "a.safetensors"}
    check_files("b", "/m", ours, ours)
    assert facts_of(tmp_path / "a.safetensors") == {"a.safetensors": ours["a.safetensors"]}
    assert facts_of(tmp_path / "nothing") == {}
    changed = ours | {"a.safetensors": FileFacts(3, 3, "0" * 64)}
    missing = {"config.json": ours["config.json"]}
    for theirs, words in (
        ({}, "b has no model at /m"),
        (missing, "b: a.safetensors of /m is missing"),
        (ours | {"a.safetensors": FileFacts(2, 2, "")}, "b: a.safetensors of /m has 2 bytes, 3 on this host"),
        (changed, "b: a.safetensors of /m begins with other bytes"),
        (ours | {"b.safetensors": ours["a.safetensors"]}, "b: /m has b.safetensors, which this host's has not"),
    ):
        with pytest.raises(ModelError, match=words):
            check_files("b", "/m", theirs, ours)
