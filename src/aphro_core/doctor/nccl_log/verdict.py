"""Facts -> verdict: the first cause of a failure, what the transports are worth, and what the log does not show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

from aphro_core.doctor.finding import Finding, Status
from aphro_core.doctor.nccl_log.context import judge_context
from aphro_core.doctor.nccl_log.facts import LogFacts
from aphro_core.doctor.nccl_log.failures import explain_by_circumstance, judge_errors
from aphro_core.doctor.nccl_log.remedies import remedy_for
from aphro_core.doctor.nccl_log.transports import Placement, Quality, devices_of, fabric_of, judge_pairs, kind_of

Verdict = Literal["pass", "warn", "fail", "inconclusive"]

EXIT_CODES: Final[dict[Verdict, int]] = {"pass": 0, "inconclusive": 0, "warn": 1, "fail": 2}
# of warnings, what costs or tells most comes first
_WEIGHTY: Final = (
    "log.loopback", "log.docker-bridge", "log.net-mixed", "log.no-plugin-start", "log.interfaces", "log.sockets",
    "log.net-in-host", "log.gdr-mixed", "log.rdma-no-gdr", "log.gdr-off", "log.same-name", "log.shm", "log.p2p-pcie",
    "log.no-rdma-device", "log.version", "log.nvls-off", "log.engine-wait", "log.env", "log.ofi-warn", "log.ib-warn",
    "log.no-libcuda", "log.warn", "log.numa",
)  # fmt: skip
# errors that a process reports of what it uses
_BREAKS: Final = {
    "P2P/": ("log.p2p-denied", "log.p2p-nvlink", "log.peer-map"),
    "SHM": ("log.shm-small", "log.shm-gone"),
    "NET/": ("log.ib-timeout", "log.ib-protection", "log.ib-completion", "log.ib-nomem", "log.ib-register",
             "log.ofi-peer", "log.ofi-error", "log.wrong-peer"),
}  # fmt: skip


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
    features: tuple[str, ...] = ()  # of NVLS, PXN, CollNet: those that are in use

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]


def judge(facts: LogFacts, *, ib: bool = False) -> LogReport:
    """The verdict on everything scanned so far; ``ib``: sockets between nodes are a failure."""
    findings = [*judge_errors(facts), *judge_pairs(facts, ib=ib), *judge_context(facts, ib=ib)]
    findings = _order(explain_by_circumstance(findings))
    statuses = {finding.status for finding in findings}
    if not statuses & {Status.PASS, Status.WARN, Status.FAIL}:
        title = f"the log shows no transport{_chosen(facts)}" if facts.num_records else "the log holds no NCCL record"
        findings.insert(
            0, Finding("log.no-transport", Status.SKIP, title, remedy=remedy_for("log.no-transport", facts))
        )
    return LogReport(
        verdict=verdict_of(statuses),
        nccl_version=_version_of(facts),
        paths=tuple(_paths(facts)),
        findings=tuple(findings),
        networks=_values(facts, "network"),
        interfaces=tuple(dict.fromkeys((*_values(facts, "bootstrap"), *_values(facts, "interfaces")))),
        ports=_values(facts, "ports"),
        devices=tuple(sorted(devices_of(facts).items())),
        num_lines=facts.num_lines,
        num_records=facts.num_records,
        ib=_ib_sentence(findings, facts) if ib else "",
        features=tuple(_features(facts)),
    )


def _chosen(facts: LogFacts) -> str:
    """What NCCL chose, which does not prove that it is used."""
    networks = _values(facts, "network")
    return f"; NCCL chose the network {', '.join(networks[:3])}{fabric_of(facts)}" if networks else ""


def _features(facts: LogFacts) -> Iterator[str]:
    if facts.first("nvls"):
        yield "NVLS"
    if facts.first("pxn") or any(pair.proxies for pair in facts.pairs.values()):
        yield "PXN"
    if any(pair.via.startswith("COLLNET/") for pair in facts.pairs.values()):
        yield "CollNet"


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


def _paths(facts: LogFacts) -> Iterator[Path]:
    placement = Placement(facts)
    blamed = {prefix: {process for id in ids for note in facts.all_notes(id) for process in note.processes}
              for prefix, ids in _BREAKS.items()}  # fmt: skip
    for pair in sorted(facts.pairs.values(), key=lambda pair: (pair.src, pair.dst, pair.via, pair.gdr is False)):
        is_broken = any(
            pair.via.startswith(prefix) and processes & pair.processes for prefix, processes in blamed.items()
        )
        yield Path(
            pair.src, pair.dst, pair.via, pair.gdr, tuple(sorted(pair.devs)), pair.count,
            Quality.BROKEN if is_broken else kind_of(pair, placement).quality,
            tuple(sorted(pair.sides)), min(pair.proxies, default=None),
            tuple(sorted(pair.src_hosts)), tuple(sorted(pair.dst_hosts)),
        )  # fmt: skip


def _version_of(facts: LogFacts) -> str | None:
    """NCCL's own line, or else what a framework says of it."""
    note = facts.first("version", "rccl") or facts.first("version-claimed")
    if note is None:
        return None
    is_rccl = facts.notes.get("rccl", {}).get(note.value) is note
    return f"RCCL {note.value.split('-')[0]}" if is_rccl else note.value.rstrip(".,")


def _values(facts: LogFacts, kind: str) -> tuple[str, ...]:
    return tuple(note.value for note in facts.all_notes(kind))[:16]
