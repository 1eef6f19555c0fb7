"""Findings and rank pairs for the operator's eyes, as lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from aphro_cli.console import printable, render_table
from aphro_core.doctor.finding import Finding, Status
from aphro_core.doctor.nccl_log.verdict import LogReport, Path

_MAX_ROWS: Final = 48  # of the table of pairs; beyond it pairs that are alike share a row
_MAX_TEXT: Final = 200


def render_report(report: LogReport) -> list[str]:
    """The verdict in one line, what the log says of versions and devices, the table of pairs, the findings."""
    version = (
        f"NCCL {report.nccl_version}".replace("NCCL RCCL", "RCCL") if report.nccl_version else "NCCL version not shown"
    )
    lines = [f"{report.verdict.upper()}: {report.num_records:,} NCCL records in {report.num_lines:,} lines; {version}"]
    for name, values in (
        ("network", report.networks),
        ("interfaces", report.interfaces),
        ("ports", report.ports),
        ("in use", report.features),
    ):
        if values:
            lines.append(f"{name}: {'; '.join(values[:4])}{' ...' if len(values) > 4 else ''}")
    lines += [f"between nodes: {report.ib}"] if report.ib else []
    if report.paths:
        lines += ["", *_render_paths(report)]
    return [*lines, "", *render_findings(report.findings)]


def _render_paths(report: LogReport) -> list[str]:
    devices = dict(report.devices)
    if len(report.paths) <= _MAX_ROWS:
        rows = [
            [f"{path.src} -> {path.dst if path.dst >= 0 else 'all'}", *_cells(path, devices), str(path.count)]
            for path in report.paths
        ]
        return render_table(
            "How ranks talk", ("ranks", "transport", "GPUDirect", "NIC", "hosts", "verdict", "lines"), rows
        )
    groups: dict[tuple[str, ...], list[Path]] = {}
    for path in report.paths:
        groups.setdefault((path.via, _gdr(path), path.quality.value), []).append(path)
    grouped = [[*key, str(len(paths)), f"{paths[0].src} -> {paths[0].dst}", str(sum(path.count for path in paths))]
               for key, paths in sorted(groups.items())]  # fmt: skip
    return render_table("How ranks talk", ("transport", "GPUDirect", "verdict", "pairs", "such as", "lines"), grouped)


def _cells(path: Path, devices: dict[int, str]) -> tuple[str, ...]:
    nics = ",".join(devices.get(dev, str(dev)) for dev in path.devs) or "-"
    proxy = f" (by rank {path.pxn_proxy})" if path.pxn_proxy is not None else ""
    sources, targets = ",".join(path.src_hosts[:2]) or "?", ",".join(path.dst_hosts[:2]) or "?"
    hosts = sources if sources == targets else f"{sources} -> {targets}"
    return path.via + proxy, _gdr(path), nics, hosts, path.quality.value


def _gdr(path: Path) -> str:
    return {True: "yes", False: "no", None: "-"}[path.gdr]


def render_checks(findings: Sequence[Finding], verdict: str) -> list[str]:
    """What needs attention in full, then the rest a line each; hosts that agree share a line."""
    counts = Counter(finding.status.value for finding in findings)
    lines = [f"{verdict.upper()}: {', '.join(f'{count} {status}' for status, count in sorted(counts.items()))}", ""]
    trouble = [finding for finding in findings if finding.status in {Status.FAIL, Status.WARN}]
    if trouble:
        lines += [*render_findings(trouble), ""]
    alike: dict[tuple[str, str, str], list[str]] = {}
    for finding in findings:
        if finding.status not in {Status.FAIL, Status.WARN}:
            alike.setdefault((finding.status.upper(), finding.id, finding.title), []).append(finding.host)
    for (status, id, title), hosts in alike.items():
        named = ", ".join(host for host in hosts if host)
        lines.append(f"{status:4}  {id}{f' [{named}]' if named else ''}: {title}")
    return lines


def render_findings(findings: Sequence[Finding]) -> list[str]:
    return [line for finding in findings for line in (*_render_finding(finding), "")][:-1]


def _render_finding(finding: Finding) -> Iterator[str]:
    root = " (root cause)" if finding.root_cause and finding.status is not Status.PASS else ""
    host = f" [{finding.host}]" if finding.host and finding.host not in finding.title else ""
    yield f"{finding.status.upper():4}  {finding.id}{root}{host}: {finding.title}"
    for line in finding.evidence:
        place = f"{line.file}:{line.line}" if line.line else line.file
        yield f"      {place}: {printable(line.text)[:_MAX_TEXT]}"
    if finding.remedy and finding.status is not Status.PASS:
        yield from _labelled("try: ", finding.remedy.splitlines())


def _labelled(label: str, lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield f"      {label}{line}"
        label = " " * len(label)
