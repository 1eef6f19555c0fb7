"""What NCCL wrote during a live check, read by the log parser: transports, and the warnings behind a failure."""

from __future__ import annotations

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.live.live import LiveReport
from aphro_core.doctor.nccl_log.facts import LogFacts
from aphro_core.doctor.nccl_log.scan import Scan
from aphro_core.doctor.nccl_log.verdict import LogReport, judge


def read_live_logs(report: LiveReport, *, ib: bool) -> LogReport | None:
    """None where no rank could hand its log over."""
    if not report.logs:
        return None
    facts = LogFacts()
    scan = Scan(facts)
    for number, text in report.logs.items():
        scan.read_file(f"NCCL log of rank {number} ({report.places[number].label})", [text.encode()])
    return judge(facts, ib=ib)


def transports(log: LogReport) -> tuple[Evidence, ...]:
    """One line for each way that ranks talked: ``P2P/CUMEM: 0 -> 1, 1 -> 0``."""
    ways: dict[str, list[str]] = {}
    for path in log.paths:
        gdr = "/GDRDMA" if path.gdr else ""
        ways.setdefault(f"{path.via}{gdr}", []).append(f"{path.src} -> {path.dst}")
    return tuple(
        Evidence("NCCL log", 0, f"NCCL {log.nccl_version}: {via}: {', '.join(list(dict.fromkeys(pairs))[:16])}")
        for via, pairs in ways.items()
    )


def troubles(log: LogReport, *, has_failed: bool = False) -> list[Finding]:
    """What the log holds against a run, the first cause first; beside a failure only what failed.

    A run that broke off shows how far it came, not which transports it would have used.
    """
    wanted = (Status.FAIL,) if has_failed else (Status.FAIL, Status.WARN)
    return [finding for finding in log.findings if finding.status in wanted]
