"""The doctor on real GPUs: what NVML says, copies between pairs, collectives over NCCL, and a rank that is stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import anyio
import pytest
import torch

from aphro_core.doctor.check import LiveOptions
from aphro_core.doctor.doctor import run_checks
from aphro_core.doctor.finding import Finding, Status

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def _run(live: LiveOptions | None = None, **options: object) -> list[Finding]:
    return anyio.run(lambda: run_checks(live=live, **options))  # type: ignore[arg-type]


def test_healthy_gpus_have_no_failure() -> None:
    found = {finding.id: finding for finding in _run(only=["gpu", "nccl.version"])}
    assert found["gpu.driver"].status is Status.PASS, found["gpu.driver"]
    assert found["gpu.count"].status is not Status.SKIP
    assert [finding for finding in found.values() if finding.status is Status.FAIL] == []


@two_gpus
def test_nccl_adds_up_and_its_log_names_the_transport() -> None:
    found, *_ = _run(only=["comm.nccl"])
    assert found.status in (Status.PASS, Status.WARN), found
    text = "\n".join(line.text for line in found.evidence)
    assert "graph-all-reduce" in text
    assert "WRONG" not in text
    assert any(way in text for way in ("P2P/", "SHM", "NET/"))


@two_gpus
def test_a_stopped_rank_is_named() -> None:
    def stop(line: str) -> None:
        if "round 1" in line:
            os.kill(_ranks()[-1], signal.SIGSTOP)

    found, *_ = _run(LiveOptions(limit_seconds=4), only=["comm.nccl"], progress=stop)
    assert (found.status, found.root_cause) == (Status.FAIL, True)
    assert "stopped answering" in found.title
    assert _ranks() == []


def _ranks() -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if "aphro_core.doctor.live.rank" in path.read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return sorted(found)
