"""What a check found: its verdict, the evidence for it, and the remedy as a line that can be pasted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"  # not checked here, the title says why


@dataclass(frozen=True, slots=True)
class Evidence:
    """A line that was read. ``file`` is a path, or a command whose output it is; ``line`` counts from 1, 0 if none."""

    file: str
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Finding:
    """``id`` names the check that found it; ``root_cause``: others follow from it."""

    id: str
    status: Status
    title: str
    root_cause: bool = False
    evidence: tuple[Evidence, ...] = ()
    remedy: str = ""
    host: str = ""  # "" is this host


def sort_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Those that explain the verdict first: root causes, then by severity; otherwise in their order."""
    severity = {Status.FAIL: 0, Status.WARN: 1, Status.SKIP: 2, Status.PASS: 3}
    return sorted(findings, key=lambda finding: (severity[finding.status], not finding.root_cause))
