"""What failed, and what failed first: errors become findings, one of them the root cause."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from aphro_core.doctor.finding import Finding, Status
from aphro_core.doctor.nccl_log.error_rule import Tier
from aphro_core.doctor.nccl_log.error_table import ERRORS
from aphro_core.doctor.nccl_log.facts import LogFacts, Note
from aphro_core.doctor.nccl_log.records import Record
from aphro_core.doctor.nccl_log.remedies import remedy_for

_TIERS: Final = {rule.id: rule.tier for rule in ERRORS} | {
    "log.warn": Tier.SUSPECT, "trail": Tier.TRAIL, "trail-nvls": Tier.TRAIL,
}  # fmt: skip
_NVLS_FAILED: Final = "NVLink SHARP (NVLS) could not be set up"
_MAX_SILENCE: Final = 600  # seconds that an engine waits for a worker before that counts as a hang
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
    if "log.nvls" in seen and _lives_without_nvls(facts):
        seen["log.nvls-off"] = [*seen.pop("log.nvls"), *seen.get("log.nvls-off", [])]
        seen.pop("trail-nvls", None)
    tiers = _TIERS | ({"log.engine-wait": Tier.SYMPTOM} if _silence(facts) >= _MAX_SILENCE else {})
    firsts = {id: min((note.first for note in notes), key=lambda first: first.order) for id, notes in seen.items()}
    has_failed = any(tiers[id] not in (Tier.SUSPECT, Tier.NOTE) for id in seen)
    candidates = [id for id in seen if has_failed and tiers[id] is not Tier.NOTE]
    is_timed = all(firsts[id].record.time for id in candidates)
    root = min(
        candidates,
        key=lambda id: (tiers[id], firsts[id].record.time if is_timed else "", firsts[id].order),
        default=None,
    )
    findings = []
    for id, notes in seen.items():
        is_failure = id == root or tiers[id] not in (Tier.SUSPECT, Tier.NOTE)
        finding = _finding(id, notes, facts, Status.FAIL if is_failure else Status.WARN)
        findings.append(replace(finding, root_cause=id == root))
    has_cause = root is not None and not root.startswith("trail")
    trails = [finding for finding in findings if finding.id == "log.trail"]
    superfluous = trails if has_cause else trails[1:]
    return [finding for finding in findings if finding not in superfluous]


def _lives_without_nvls(facts: LogFacts) -> bool:
    """Each process whose NVLS failed went on to work, and the failure did not leave the file in which it happened.

    NCCL goes on without NVLS where it only wanted to register a buffer, and versions differ in what they do without
    its memory. An error that the communicator ends with leaves a trail, or the framework says that NCCL failed.
    """
    works, aborts = facts.marks.get("works", {}), facts.marks.get("aborts", {})
    anywhere = works.get(Record("").process, 0)  # lines without a prefix: a benchmark's end, a server's start
    failed = facts.marks.get("nvls-failed", {})
    went_on = all(max(works.get(process, 0), anywhere) > order for process, order in failed.items())
    has_raised = any("cuda error" in note.value.lower() or "cudaerror" in note.value.lower()
                     for note in facts.all_notes("log.exception"))  # fmt: skip
    return went_on and not has_raised and not failed.keys() & aborts.keys()


def _silence(facts: LogFacts) -> int:
    """Seconds for which one process of an engine has been waiting at the end of the log."""
    return max(facts.waited.values(), default=0)


def _finding(id: str, notes: list[Note], facts: LogFacts, status: Status) -> Finding:
    id = "log.trail" if id.startswith("trail") else id
    first = min(notes, key=lambda note: note.first.order)
    count = sum(note.count for note in notes)
    title = (
        f"an error passed through NCCL (class {first.value}); its cause is not in this log"
        if id == "log.trail"
        else first.value
    )
    title += describe_hang(facts) if id == "log.watchdog" else ""
    title += _missing_processes(facts) if id in ("log.ras-dead", "log.ras-missing") else ""
    if id == "log.engine-wait":
        minutes = _silence(facts) // 60
        title += f"; {minutes} minutes without a sign of work at the end" if minutes > 1 else ""
    if id == "log.nvls-off":
        title += "; NCCL went on without it" if first.value.startswith(_NVLS_FAILED) else ""
        title += "; large sums inside a host are slower"
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
