"""What a running NCCL job says of itself through its RAS port."""

from __future__ import annotations

import re
from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.probe import probe
from aphro_core.remote.remote import Host

ID: Final = "job.ras"
TITLE: Final = "the running job (NCCL RAS)"
EXPLAIN: Final = """
Asks localhost:28028 (or NCCL_RAS_ADDR), where NCCL 2.24 and newer answer about the job that runs, twice. PASS when its
communicators are running and complete; WARN for a mismatch of operation counts that changes between the two answers
(ranks at different places, on their way); FAIL for ranks that are dead or missing, and for a mismatch that stands
still. SKIP without such a job.
"""
_BAD: Final = re.compile(r"\b(DEAD|INCOMPLETE|ERROR|NOCOMM)\b")


async def check(host: Host) -> Finding:
    said = await probe(host, "ras")
    if not said.get("first"):
        return Finding(ID, Status.SKIP, f"no NCCL job answers at {said['address']}: {said['error']}")
    first, second = str(said["first"]), str(said["second"])
    evidence = _lines(second, _BAD) or _lines(second, re.compile("MISMATCH"))
    remedy = "look at the host, process and GPU that the report names: `echo verbose status | nc localhost 28028`"
    if _BAD.search(second):
        return Finding(ID, Status.FAIL, f"the job has lost ranks: {evidence[0].text}", True, evidence, remedy)
    if "MISMATCH" in second:
        is_stuck = _lines(first, re.compile("MISMATCH|operation")) == _lines(second, re.compile("MISMATCH|operation"))
        title = "ranks stand at different operations" + (" and do not move" if is_stuck else ", on their way")
        return Finding(ID, Status.FAIL if is_stuck else Status.WARN, title, is_stuck, evidence, remedy)
    return Finding(ID, Status.PASS, f"the job at {said['address']} is running and complete")


def _lines(text: str, pattern: re.Pattern[str]) -> tuple[Evidence, ...]:
    found = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if pattern.search(line)]
    return tuple(Evidence("NCCL RAS", number, line) for number, line in found[:10])
