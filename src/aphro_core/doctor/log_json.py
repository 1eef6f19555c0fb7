"""A log's report and findings as JSON: the keys that scripts rely on (docs/doctor.md)."""

from __future__ import annotations

from typing import Any

from aphro_core.doctor.finding import Finding
from aphro_core.doctor.nccl_log.verdict import LogReport, Path


def report_to_json(report: LogReport) -> dict[str, Any]:
    return {
        "nccl_version": report.nccl_version,
        "rank_pairs": [_pair_to_json(path) for path in report.paths],
        "networks": list(report.networks),
        "interfaces": list(report.interfaces),
        "ports": list(report.ports),
        "devices": {str(index): name for index, name in report.devices},
        "features": list(report.features),
        "lines": report.num_lines,
        "records": report.num_records,
        **({"ib": report.ib} if report.ib else {}),
    }


def _pair_to_json(path: Path) -> dict[str, Any]:
    row: dict[str, Any] = {
        "src": path.src,
        "dst": path.dst,
        "via": path.via,
        "gdr": path.gdr,
        "devs": list(path.devs),
        "count": path.count,
        "verdict": path.quality.value,
        "src_hosts": list(path.src_hosts),
        "dst_hosts": list(path.dst_hosts),
    }
    if path.sides:
        row["sides"] = list(path.sides)
    if path.pxn_proxy is not None:
        row["pxn_proxy"] = path.pxn_proxy
    return row


def finding_to_json(finding: Finding) -> dict[str, Any]:
    return {
        "id": finding.id,
        "status": finding.status.value,
        "title": finding.title,
        "root_cause": finding.root_cause,
        "evidence": [{"file": line.file, "line": line.line, "text": line.text} for line in finding.evidence],
        "remedy": finding.remedy,
        "host": finding.host,
    }
