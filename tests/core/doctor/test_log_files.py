"""Logs as files: plain, packed, folders, standard input, and those that cannot be read."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from aphro_core.doctor import log_files
from aphro_core.doctor.log_files import expand, read_logs
from aphro_core.errors import UsageError
from tests.core.doctor.logs import IB_GDR, P2P, TIMEOUT


def test_several_files_make_one_verdict(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text(IB_GDR)
    (tmp_path / "b.log").write_text(TIMEOUT)
    report = read_logs(expand([str(tmp_path)]))
    assert (report.verdict, len(report.paths)) == ("fail", 2)
    assert report.findings[0].evidence[0].file == str(tmp_path / "b.log")


def test_packed_is_read_like_plain(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text(P2P)
    (tmp_path / "a.log.gz").write_bytes(gzip.compress(P2P.encode()))
    assert read_logs([str(tmp_path / "a.log")]).paths == read_logs([str(tmp_path / "a.log.gz")]).paths


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(P2P.encode())))
    report = read_logs(["-"])
    assert report.findings[0].evidence[0].file == "stdin"


@pytest.mark.parametrize("name", ["missing.log", "damaged.gz", "empty"])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "damaged.gz").write_bytes(gzip.compress(P2P.encode())[:-20])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=name) as error:
        read_logs(expand([str(tmp_path / name)]))
    assert error.value.hint


def test_standard_input_is_there_once() -> None:
    with pytest.raises(UsageError, match="once"):
        expand(["-", "-"])


def test_long_reading_shows_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_files, "_LARGE_BYTES", 10)
    monkeypatch.setattr(log_files, "_BLOCK_BYTES", 1000)
    (tmp_path / "a.log").write_text(P2P)
    steps: list[tuple[int, int]] = []
    read_logs([str(tmp_path / "a.log")], progress=lambda what, done, size: steps.append((done, size)))
    assert steps[-1] == (len(P2P), len(P2P))
    assert len(steps) > 3
