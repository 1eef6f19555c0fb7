"""A real run, recorded: two H100s of one NVSwitch host, NCCL 2.28.9; once as they are, once with P2P switched off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aphro_core.doctor.checks import (
    gpu_busy,
    gpu_count,
    gpu_driver,
    gpu_fabric,
    gpu_health,
    gpu_throttle,
    gpu_topology,
)
from aphro_core.doctor.finding import Status
from aphro_core.doctor.live.live import LiveReport, Outcome
from aphro_core.doctor.live.nccl import read_live_logs, transports, troubles
from aphro_core.doctor.live.ranks import Place
from aphro_core.remote.local import LocalHost
from tests.core.doctor.recorded import RecordedHost, write_tree

RECORDINGS = Path(__file__).parent / "recordings"
GPU_CHECKS = [gpu_driver, gpu_count, gpu_health, gpu_throttle, gpu_busy, gpu_topology, gpu_fabric]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def report_of(name: str) -> LiveReport:
    host = LocalHost("")
    places = tuple(Place(host, f"cuda:{number}", "127.0.0.1", None) for number in range(2))
    logs = {number: (RECORDINGS / f"{name}.rank{number}.log").read_text() for number in range(2)}
    return LiveReport(places, (None, None), (), Outcome((0, 1)), logs)


def test_nvlink_is_seen_in_nccls_own_log() -> None:
    log = read_live_logs(report_of("h100x2"), ib=False)
    assert log is not None
    assert (log.verdict, log.nccl_version) == ("pass", "2.28.9+cuda13.0")
    assert [line.text for line in transports(log)] == ["NCCL 2.28.9+cuda13.0: P2P/CUMEM: 0 -> 1, 1 -> 0"]
    assert troubles(log) == []


def test_switched_off_p2p_is_seen_with_its_reason() -> None:
    log = read_live_logs(report_of("h100x2-p2p-off"), ib=False)
    assert log is not None
    assert [line.text for line in transports(log)] == ["NCCL 2.28.9+cuda13.0: SHM: 0 -> 1, 1 -> 0"]
    found = troubles(log)
    assert {finding.id for finding in found} == {"log.shm", "log.env"}
    assert "unset NCCL_P2P_DISABLE" in found[0].remedy
    assert troubles(log, has_failed=True) == []


@pytest.mark.anyio
@pytest.mark.parametrize("check", GPU_CHECKS, ids=lambda check: check.ID)
async def test_real_gpus_pass(check: Any, tmp_path: Path) -> None:
    text = (RECORDINGS / "h100x2.nvml.json").read_text()
    root = write_tree(tmp_path, {"/dev/nvidia0": "", "/dev/nvidia1": ""})
    host = RecordedHost(root, {"env -0": "", "python -m aphro_core.doctor.probes.gpus": text})
    found = await check.check(host)
    assert found.status is Status.PASS, found


@pytest.mark.anyio
async def test_behind_an_nvswitch_links_lead_to_the_switch(tmp_path: Path) -> None:
    text = (RECORDINGS / "h100x2.nvml.json").read_text()
    host = RecordedHost(write_tree(tmp_path, {"/dev/nvidia0": ""}), {"python -m aphro_core.doctor.probes.gpus": text})
    found = await gpu_topology.check(host)
    assert [line.text for line in found.evidence] == ["GPU 0 - GPU 1: NV18"]
