"""Everything that was asked, in one answer: logs, checks of hosts, the verdict, and the bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio

from aphro_core.doctor.bundle import write_bundle
from aphro_core.doctor.check import LiveOptions
from aphro_core.doctor.doctor import run_checks
from aphro_core.doctor.finding import Finding, Status, sort_findings
from aphro_core.doctor.log_files import expand, read_logs
from aphro_core.doctor.log_json import finding_to_json, report_to_json
from aphro_core.doctor.nccl_log.verdict import EXIT_CODES, LogReport, Verdict, verdict_of
from aphro_core.errors import UsageError

Progress = Callable[[str, int, int], None]  # what, how much of it, of how much (0: unknown)


@dataclass(frozen=True)
class Questions:
    """What the operator asked. With ``logs`` only they are read, unless checks or hosts are named too."""

    logs: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    ib: bool = False
    model: str | None = None
    tp: int | None = None
    pp: int | None = None
    device: str = "auto"
    bundle: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    log: LogReport | None
    checks: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        findings = [*(self.log.findings if self.log else ()), *self.checks]
        return verdict_of({finding.status for finding in findings})

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]


def diagnose(asked: Questions, progress: Progress = lambda what, done, size: None) -> Diagnosis:
    """Read the logs, run the checks, write the bundle. Raises UsageError for what cannot be asked."""
    logs = expand(asked.logs)
    if asked.bundle and "-" in logs:
        raise UsageError("--bundle cannot keep standard input", hint="save the log to a file and give its name")
    log = read_logs(logs, ib=asked.ib, progress=progress) if logs else None
    checks: list[Finding] = []
    if not logs or asked.only or asked.hosts:
        checks = anyio.run(_run_checks, asked, progress)
    diagnosis = Diagnosis(log, tuple(sort_findings(checks)))
    if asked.bundle:
        anyio.run(write_bundle, asked.bundle, to_json(diagnosis), logs, asked.hosts)
    return diagnosis


async def _run_checks(asked: Questions, progress: Progress) -> list[Finding]:
    live = LiveOptions(model=asked.model, tp=asked.tp, pp=asked.pp, device=asked.device)
    return await run_checks(
        only=asked.only,
        skip=asked.skip,
        ib=asked.ib,
        hosts=asked.hosts,
        live=live,
        progress=lambda line: progress(line, 0, 0) if asked.hosts else None,
    )


def to_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """The keys of docs/doctor.md. Findings that explain the verdict come first."""
    log = diagnosis.log
    row: dict[str, Any] = report_to_json(log) if log else {"nccl_version": None, "rank_pairs": []}
    severity = [Status.FAIL, Status.WARN, Status.PASS, Status.SKIP]
    findings = [*(log.findings if log else ()), *diagnosis.checks]
    findings.sort(key=lambda finding: severity.index(finding.status))  # stable: root causes stay first
    verdict = {"verdict": diagnosis.verdict, "exit_code": diagnosis.exit_code}
    return {**verdict, **row, "findings": [finding_to_json(finding) for finding in findings]}
