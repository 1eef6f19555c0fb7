"""Cores are those that a process may run on, or what the quotas of its control groups allow: of either version."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aphro_core import host

V1 = "9:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n0::/\n"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("0::/\n", {"cpu.max": "250000 100000"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "1600000 100000"}, 8),
        ("0::/a.slice/b\n", {"a.slice/cpu.max": "300000 100000", "a.slice/b/cpu.max": "max 100000"}, 3),
        ("0::/a.slice/b\n", {"a.slice/cpu.max": "300000 100000", "a.slice/b/cpu.max": "200000 100000"}, 2),
        ("0::/../../a\n", {"cpu.max": "500000 100000"}, 5),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        (V1, {"cpu/cpu.cfs_quota_us": "350000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        (V1, {"cpu/docker/a/cpu.cfs_quota_us": "20000", "cpu/docker/a/cpu.cfs_period_us": "10000"}, 2),
        (V1, {"cpu/cpu.cfs_quota_us": "garbage", "cpu/cpu.cfs_period_us": "0"}, 8),
        (None, {}, 8),
    ],
)
def test_cores_within_the_quota(
    own: str | None, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    if own is not None:
        (tmp_path / "own").write_text(own)
    monkeypatch.setattr(host, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(host, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert host.num_cores() == expected
