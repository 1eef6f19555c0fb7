"""Whether all hosts run the same versions."""

from __future__ import annotations

from collections import Counter
from typing import Final

from aphro_core.doctor.check import Cluster
from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.versions import read_versions
from aphro_core.errors import AphroError

ID: Final = "nodes.versions"
TITLE: Final = "versions on all hosts"
EXPLAIN: Final = """
Compares aphro, torch, transformers, triton, NCCL (as a package), Python, the kernel and the GPU driver. PASS when all
are equal; WARN when only driver, kernel, Python's last digit, transformers or triton differ; FAIL when aphro, torch or
NCCL do, or when aphro is not installed at the same path. The odd host is marked. On one host it only lists them.
"""
_FATAL: Final = ("aphro", "torch", "NCCL")
_MISSING: Final = "not there"


async def check(cluster: Cluster) -> list[Finding]:
    tables: dict[str, dict[str, str]] = {}
    findings = []
    for host in cluster.hosts:
        try:
            tables[host.name] = await read_versions(host)
        except AphroError as error:
            findings.append(Finding(ID, Status.FAIL, error.message, True, (), error.hint or "", host.name))
    return [*findings, _compare(tables)] if tables else findings


def _compare(tables: dict[str, dict[str, str]]) -> Finding:
    names = list(dict.fromkeys(name for table in tables.values() for name in table))
    evidence, different = [], []
    for name in names:
        versions = {host: table.get(name, _MISSING) for host, table in tables.items()}
        usual, count = Counter(versions.values()).most_common(1)[0]
        if count == len(versions):
            evidence.append(Evidence("versions", 0, f"{name} {usual}"))
        else:
            different.append(name)
            marked = (f"{host} {text}{'' if text == usual else ' (!)'}" for host, text in versions.items())
            evidence.insert(len(different) - 1, Evidence("versions", 0, f"{name}: {', '.join(marked)}"))
    found = tuple(evidence)
    if not different:
        text = ", ".join(line.text for line in evidence)
        title = f"{len(tables)} hosts with the same versions" if len(tables) > 1 else text
        return Finding(ID, Status.PASS, title, evidence=found)
    fatal = [name for name in different if name in _FATAL]
    remedy = "make one environment, and the same image or driver, for all hosts"
    title = f"{', '.join(fatal or different)} differ: {evidence[0].text}"
    return Finding(ID, Status.FAIL if fatal else Status.WARN, title, bool(fatal), found, remedy)
