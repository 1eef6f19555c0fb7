"""What control groups leave, of either version: cores, memory, processes; and what a host makes of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from aphro_core import host
from aphro_core.cgroups import OWN, Limits, find_limits, limit_files

GIB = 2**30
V1 = "9:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n0::/\n"
CASES = [
    ("0::/\n", {}, Limits()),
    ("0::/\n", {"cpu.max": "max 100000", "memory.max": "max", "pids.max": "max"}, Limits()),
    ("0::/\n", {"cpu.max": "250000 100000"}, Limits(cores=2.5)),
    ("0::/a.slice/b\n", {"a.slice/cpu.max": "300000 100000", "a.slice/b/cpu.max": "max 100000"}, Limits(cores=3.0)),
    ("0::/a.slice/b\n", {"a.slice/cpu.max": "300000 100000", "a.slice/b/cpu.max": "20000 10000"}, Limits(cores=2.0)),
    ("0::/../../a\n", {"cpu.max": "500000 100000"}, Limits(cores=5.0)),
    (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, Limits()),
    (V1, {"cpu/cpu.cfs_quota_us": "350000", "cpu/cpu.cfs_period_us": "100000"}, Limits(cores=3.5)),
    (V1, {"cpu/docker/a/cpu.cfs_quota_us": "20000", "cpu/docker/a/cpu.cfs_period_us": "10000"}, Limits(cores=2.0)),
    (V1, {"cpu/cpu.cfs_quota_us": "garbage", "cpu/cpu.cfs_period_us": "0"}, Limits()),
    ("0::/\n", {"memory.max": str(4 * GIB), "memory.current": str(3 * GIB)}, Limits(memory=GIB)),
    (
        "0::/\n",
        {"memory.max": str(4 * GIB), "memory.current": str(3 * GIB), "memory.stat": f"anon 5\ninactive_file {GIB}\n"},
        Limits(memory=2 * GIB),
    ),
    ("0::/\n", {"memory.max": str(GIB), "memory.current": str(2 * GIB)}, Limits(memory=0)),
    (
        V1,
        {
            "memory/memory.limit_in_bytes": "9223372036854771712",
            "memory/docker/a/memory.limit_in_bytes": str(3 * GIB),
            "memory/docker/a/memory.usage_in_bytes": str(2 * GIB),
            "memory/docker/a/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\n",
        },
        Limits(memory=2 * GIB),
    ),
    ("0::/\n", {"pids.max": "512", "pids.current": "500"}, Limits(pids=12)),
    ("", {"cpu.max": "250000 100000"}, Limits(cores=2.5)),
    ("nonsense\n", {}, Limits()),
]


@pytest.mark.parametrize(("own", "files", "expected"), CASES)
def test_the_tightest_of_all_groups_counts(own: str, files: Mapping[str, str], expected: Limits) -> None:
    texts = {f"/sys/fs/cgroup/{name}": text for name, text in files.items()}
    assert set(texts) <= set(limit_files(own))
    assert find_limits(own, texts) == expected


@pytest.mark.parametrize(("quota", "expected"), [("max", 8), ("250000", 2), ("50000", 1), ("1600000", 8)])
def test_cores_are_whole_and_no_more_than_may_be_used(
    quota: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {OWN: "0::/\n", "/sys/fs/cgroup/cpu.max": f"{quota} 100000\n"}
    monkeypatch.setattr(host, "_read", lambda path: texts.get(path, ""))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert host.num_cores() == expected


def test_memory_is_no_more_than_the_container_has_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(f"MemAvailable: {8 * 2**20} kB\n")
    monkeypatch.setattr(host, "_MEMINFO", tmp_path / "meminfo")
    texts = {OWN: V1}
    monkeypatch.setattr(host, "_read", lambda path: texts.get(path, ""))
    assert host.available_memory_bytes() == 8 * GIB
    texts["/sys/fs/cgroup/memory/memory.limit_in_bytes"] = str(GIB)
    assert host.available_memory_bytes() == GIB
