"""Logs as they are published, one case a line: verdict, root cause and remedy of each class of trouble."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.core.doctor.logs import read

HERE = Path(__file__).parent
CASES = [json.loads(line) for line in (HERE / "log_cases.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_verdict_root_cause_and_remedy(case: dict[str, Any]) -> None:
    """Written from excerpts of issues, with hosts and addresses replaced; what each means was judged by eye."""
    report = read(case["text"])
    assert report.verdict == case["verdict"]
    first = report.findings[0]
    assert (first.id, first.root_cause) == (case["finding"], case["root_cause"])
    assert case["remedy"] in first.remedy
    assert sorted({path.via for path in report.paths}) == case["transports"]


@pytest.mark.parametrize(
    ("recording", "verdict", "finding", "remedy"),
    [
        ("h100x2-sockets", "warn", "log.sockets", "ibv_devinfo"),
        ("h100x2-no-interface", "fail", "log.no-interface", "NCCL_SOCKET_IFNAME==nosuch0 matches no interface"),
    ],
)
def test_real_runs_with_what_was_broken_on_purpose(recording: str, verdict: str, finding: str, remedy: str) -> None:
    """Two H100s, NCCL 2.28.9: P2P and shared memory switched off, and a filter that matches no interface."""
    report = read("".join(path.read_text() for path in sorted((HERE / "recordings").glob(f"{recording}.rank*.log"))))
    assert (report.verdict, report.findings[0].id) == (verdict, finding)
    assert report.findings[0].root_cause
    assert remedy in report.findings[0].remedy
    assert (report.nccl_version or "").startswith("2.28.9")
