"""Facts -> verdict: the first cause of a failure, what the transports are worth, and what the log does not show."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal

from aphro_core.doctor.finding import Finding, Status
from aphro_core.doctor.nccl_log.context import judge_context
from aphro_core.doctor.nccl_log.error_table import ERRORS, Tier
from aphro_core.doctor.nccl_log.facts import LogFacts, Note, Pair
from aphro_core.doctor.nccl_log.remedies import remedy_for
from aphro_core.doctor.nccl_log.transports import Quality, devices_of, fabric_of, judge_pairs, kind_of

Verdict = Literal["pass", "warn", "fail", "inconclusive"]

EXIT_CODES: Final[dict[Verdict, int]] = {"pass": 0, "inconclusive": 0, "warn": 1, "fail": 2}
_TIERS: Final = {rule.id: rule.tier for rule in ERRORS} | {"log.warn": Tier.SUSPECT, "trail": Tier.TRAIL}
# a circumstance that leads to these errors is their cause
_EXPLAINS: Final = {
    "log.loopback": {"log.refused", "log.tcp-timeout", "log.no-route"},
    "log.docker-bridge": {"log.refused", "log.tcp-timeout", "log.no-route"},
    "log.same-name": {"log.wrong-peer"},
}
# of warnings, what costs or tells most comes first
_WEIGHTY: Final = (
    "log.loopback", "log.docker-bridge", "log.no-plugin-start", "log.interfaces", "log.sockets", "log.net-in-host",
    "log.gdr-mixed", "log.rdma-no-gdr", "log.gdr-off", "log.same-name", "log.shm", "log.p2p-pcie", "log.no-rdma-device",
    "log.version", "log.env", "log.ofi-warn", "log.ib-warn", "log.warn", "log.numa",
)  # fmt: skip
_BREAKS: Final = {
    "P2P/": {"log.p2p-denied", "log.p2p-nvlink", "log.peer-map"},
    "SHM": {"log.shm-small", "log.shm-gone"},
}


@dataclass(frozen=True, slots=True)
class Path:
    """A row of the table: how ``src`` reaches ``dst``, over which devices, and what that is worth."""

    src: int
    dst: int
    via: str
    gdr: bool | None
    devs: tuple[int, ...]
    count: int
    quality: Quality
    sides: tuple[str, ...] = ()
    pxn_proxy: int | None = None
    src_hosts: tuple[str, ...] = ()
    dst_hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LogReport:
    """What logs say in the end. ``findings`` that explain the verdict come first; ``devices``: index -> port."""

    verdict: Verdict
    nccl_version: str | None
    paths: tuple[Path, ...]
    findings: tuple[Finding, ...]
    networks: tuple[str, ...] = ()
    interfaces: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    devices: tuple[tuple[int, str], ...] = ()
    num_lines: int = 0
    num_records: int = 0
    ib: str = ""  # the answer to --ib

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]


def judge(facts: LogFacts, *, ib: bool = False) -> LogReport:
    """The verdict on everything scanned so far; ``ib``: sockets between nodes are a failure."""
    findings = [*_judge_errors(facts), *judge_pairs(facts, ib=ib), *judge_context(facts, ib=ib)]
    findings = _explain_by_circumstance(findings)
    findings = _drop_answered(findings, facts)
    findings = _order(findings)
    statuses = {finding.status for finding in findings}
    if not statuses & {Status.PASS, Status.WARN, Status.FAIL}:
        title = f"the log shows no transport{_chosen(facts)}" if facts.num_records else "the log holds no NCCL record"
        findings.insert(
            0, Finding("log.no-transport", Status.SKIP, title, remedy=remedy_for("log.no-transport", facts))
        )
    return LogReport(
        verdict=verdict_of(statuses),
        nccl_version=_version_of(facts),
        paths=tuple(_path(pair, facts) for pair in sorted(facts.pairs.values(), key=lambda p: (p.src, p.dst, p.via))),
        findings=tuple(findings),
        networks=_values(facts, "network"),
        interfaces=tuple(dict.fromkeys((*_values(facts, "bootstrap"), *_values(facts, "interfaces")))),
        ports=_values(facts, "ports"),
        devices=tuple(sorted(devices_of(facts).items())),
        num_lines=facts.num_lines,
        num_records=facts.num_records,
        ib=_ib_sentence(findings, facts) if ib else "",
    )


def _chosen(facts: LogFacts) -> str:
    """What NCCL chose, which does not prove that it is used."""
    networks = _values(facts, "network")
    return f"; NCCL chose the network {', '.join(networks[:3])}{fabric_of(facts)}" if networks else ""


def _ib_sentence(findings: list[Finding], facts: LogFacts) -> str:
    """What ``--ib`` is asked for, in one sentence: the worst way between nodes that is shown."""
    ids = {finding.id for finding in findings}
    fabric = fabric_of(facts).strip(" ()") or "RDMA"
    sentences = {
        "log.sockets": "TCP sockets",
        "log.gdr-mixed": f"{fabric}, on some channels without GPUDirect",
        "log.rdma-no-gdr": f"{fabric} without GPUDirect",
        "log.gdrdma": "GPUDirect RDMA",
    }
    return next((sentence for id, sentence in sentences.items() if id in ids), "not shown")


def _order(findings: list[Finding]) -> list[Finding]:
    """Those that explain the verdict first, the very first marked as its cause if nothing else is."""
    severity = [Status.FAIL, Status.WARN, Status.PASS, Status.SKIP]
    weight = {id: place for place, id in enumerate(_WEIGHTY)}
    ordered = sorted(
        findings,
        key=lambda finding: (
            severity.index(finding.status),
            not finding.root_cause,
            weight.get(finding.id, len(weight)),
        ),
    )
    if (
        ordered
        and ordered[0].status in {Status.FAIL, Status.WARN}
        and not any(finding.root_cause for finding in ordered)
    ):
        ordered[0] = replace(ordered[0], root_cause=True)
    return ordered


def verdict_of(statuses: Iterable[Status]) -> Verdict:
    """The worst status; what was skipped alone proves nothing."""
    for status, verdict in ((Status.FAIL, "fail"), (Status.WARN, "warn"), (Status.PASS, "pass")):
        if status in statuses:
            return verdict  # type: ignore[return-value]
    return "inconclusive"


def _judge_errors(facts: LogFacts) -> list[Finding]:
    """Every kind of error that was seen, the root cause marked.

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
    return findings


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


def _explain_by_circumstance(findings: list[Finding]) -> list[Finding]:
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


def _drop_answered(findings: list[Finding], facts: LogFacts) -> list[Finding]:
    """Retries that ended well and a trail whose cause is known need no row of their own."""
    has_cause = any(finding.root_cause and finding.id != "log.trail" for finding in findings)
    return [finding for finding in findings if not (finding.id == "log.trail" and has_cause)]


def _path(pair: Pair, facts: LogFacts) -> Path:
    kind = kind_of(pair, facts)
    broken = {id for prefix, ids in _BREAKS.items() if pair.via.startswith(prefix) for id in ids}
    is_broken = any(note.processes & pair.processes for id in broken for note in facts.all_notes(id))
    return Path(
        pair.src, pair.dst, pair.via, pair.gdr, tuple(sorted(pair.devs)), pair.count,
        Quality.BROKEN if is_broken else kind.quality, tuple(sorted(pair.sides)), min(pair.proxies, default=None),
        tuple(sorted(pair.src_hosts)), tuple(sorted(pair.dst_hosts)),
    )  # fmt: skip


def _version_of(facts: LogFacts) -> str | None:
    note = facts.first("version") or facts.first("version-claimed")
    if note is None:
        return None
    return f"RCCL {note.value.split('-')[0]}" if facts.first("rccl") else note.value.rstrip(".,")


def _values(facts: LogFacts, kind: str) -> tuple[str, ...]:
    return tuple(note.value for note in facts.all_notes(kind))[:16]
