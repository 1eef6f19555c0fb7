"""What failed, and what failed first: errors become findings, one of them the root cause."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from aphro_core.doctor.finding import Finding, Status
from aphro_core.doctor.nccl_log.error_rule import Tier
from aphro_core.doctor.nccl_log.error_table import ERRORS
from aphro_core.doctor.nccl_log.facts import LogFacts, Note
from aphro_core.doctor.nccl_log.remedies import remedy_for

_TIERS: Final = {rule.id: rule.tier for rule in ERRORS} | {"log.warn": Tier.SUSPECT, "trail": Tier.TRAIL}
# a circumstance that leads to these errors is their cause
_EXPLAINS: Final = {
    "log.loopback": {"log.refused", "log.tcp-timeout", "log.no-route"},
    "log.docker-bridge": {"log.refused", "log.tcp-timeout", "log.no-route"},
    "log.version": {"log.wrong-peer"},
    "log.net-mixed": {"log.wrong-peer"},
    "log.same-name": {"log.wrong-peer"},
}


def judge_errors(facts: LogFacts) -> list[Finding]:
    """Every kind of error that was seen, the root cause marked; a trail only where nothing else explains it.

    Causes go before symptoms, symptoms before consequences; then by time where all say it, else by place in the logs.
    """
    seen = {id: facts.all_notes(id) for id in _TIERS if facts.notes.get(id)}
    firsts = {id: min((note.first for note in notes), key=lambda first: first.order) for id, notes in seen.items()}
    has_failed = any(_TIERS[id] not in (Tier.SUSPECT, Tier.NOTE) for id in seen)
    candidates = [id for id in seen if has_failed and _TIERS[id] is not Tier.NOTE]
    is_timed = all(firsts[id].record.time for id in candidates)
    root = min(
        candidates,
        key=lambda id: (_TIERS[id], firsts[id].record.time if is_timed else "", firsts[id].order),
        default=None,
    )
    findings = []
    for id, notes in seen.items():
        is_failure = id == root or _TIERS[id] not in (Tier.SUSPECT, Tier.NOTE)
        finding = _finding(id, notes, facts, Status.FAIL if is_failure else Status.WARN)
        findings.append(replace(finding, root_cause=id == root))
    has_cause = root is not None and root != "trail"
    return [finding for finding in findings if not (finding.id == "log.trail" and has_cause)]


def _finding(id: str, notes: list[Note], facts: LogFacts, status: Status) -> Finding:
    id = "log.trail" if id == "trail" else id
    first = min(notes, key=lambda note: note.first.order)
    count = sum(note.count for note in notes)
    title = (
        f"an error passed through NCCL (class {first.value}); its cause is not in this log"
        if id == "log.trail"
        else first.value
    )
    title += describe_hang(facts) if id == "log.watchdog" else ""
    title += _missing_processes(facts) if id in ("log.ras-dead", "log.ras-missing") else ""
    host = first.first.record.host
    title += f" (on {host})" if host else ""
    title += f", {count} times" if count > 1 else ""
    evidence = tuple(note.first.evidence for note in sorted(notes, key=lambda note: note.first.order)[:3])
    return Finding(id, status, title, evidence=evidence, remedy=remedy_for(id, facts), host=host)


def describe_hang(facts: LogFacts) -> str:
    """Which ranks waited in which collective: the same for all of them, or not."""
    waits = [note.value.split() for note in facts.all_notes("watchdog")]
    calls = {(sequence, operation) for _, sequence, operation in waits}
    if not waits:
        return ""
    ranks = ",".join(str(rank) for rank in sorted({int(rank) for rank, *_ in waits})[:16])
    if len(calls) == 1:
        return f"; ranks {ranks} waited in the same one: another rank is missing or slow"
    return f"; ranks {ranks} waited in {len(calls)} different ones: their programs diverge, or some finished several"


def _missing_processes(facts: LogFacts) -> str:
    """Those that the report names, with host and GPU."""
    named = [note.value.split(" on ") for note in facts.all_notes("ras-process")]
    return "".join(f"; process {pid} on {host}, GPU {gpu}" for pid, host, gpu in named[:4])


def explain_by_circumstance(findings: list[Finding]) -> list[Finding]:
    """A loopback address explains refused connections: then it is the root cause, and not they."""
    root = next((finding for finding in findings if finding.root_cause), None)
    for cause, errors in _EXPLAINS.items():
        explains = root is not None and root.id in errors and any(finding.id == cause for finding in findings)
        if explains:
            return [
                replace(finding, status=Status.FAIL, root_cause=True) if finding.id == cause
                else replace(finding, root_cause=False)
                for finding in findings
            ]  # fmt: skip
    return findings
