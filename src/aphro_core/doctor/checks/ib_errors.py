"""Whether RDMA ports count errors."""

from __future__ import annotations

import re
from typing import Final

import anyio

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.rdma import NO_RDMA, read_devices
from aphro_core.remote.remote import Host

ID: Final = "ib.errors"
TITLE: Final = "RDMA error counters"
EXPLAIN: Final = """
Reads counters/ and hw_counters/ of every port twice, a second apart. PASS when all error counters are zero; WARN for
old values (a cable that was pulled counts too); FAIL when one grows: symbol errors and link recoveries mean a cable,
retries and timeouts a lossy network (PFC and ECN on RoCE). Run it while a job is running; the live check between hosts
(ib.traffic) looks at the counters before and after its own traffic.
"""
_NAMES: Final = re.compile(
    r"/(symbol_error|link_error_recovery|link_downed|port_rcv_errors|packet_seq_err|implied_nak_seq_err|"
    r"local_ack_timeout_err|rnr_nak_retry_err|out_of_sequence)$"
)
_SECONDS: Final = 1.0
_REMEDY: Final = "InfiniBand: perfquery -x <LID>, ibdiagnet; RoCE: PFC and ECN on the switch, ethtool -S IF"


async def check(host: Host) -> Finding:
    if not await read_devices(host):
        return Finding(ID, Status.SKIP, NO_RDMA)
    before = await read_counters(host)
    if not before:
        return Finding(ID, Status.SKIP, "the drivers here count no errors")
    await anyio.sleep(_SECONDS)
    after = await read_counters(host)
    if (growing := judge_growth(before, after)) is not None:
        return growing
    old = {path: count for path, count in after.items() if count}
    if old:
        return Finding(ID, Status.WARN, f"errors of the past: {_words(old)}", False, _evidence(old), _REMEDY)
    return Finding(ID, Status.PASS, f"{len(after)} error counters, all zero")


def judge_growth(before: dict[str, int], after: dict[str, int], during: str = "", host: str = "") -> Finding | None:
    """A failure if any counter grew between two looks; ``during`` what went on meanwhile."""
    growing = {path: count for path, count in after.items() if count > before.get(path, 0)}
    if not growing:
        return None
    title = f"errors are being counted{during}: {_words(growing)}"
    return Finding(ID, Status.FAIL, title, True, _evidence(growing), _REMEDY, host)


def _words(counts: dict[str, int]) -> str:
    return ", ".join(f"{path.split('/')[4]} {path.rsplit('/', 1)[1]} {count}" for path, count in counts.items())


def _evidence(counts: dict[str, int]) -> tuple[Evidence, ...]:
    return tuple(Evidence(path, 1, str(count)) for path, count in counts.items())


async def read_counters(host: Host) -> dict[str, int]:
    base = "/sys/class/infiniband/*/ports/*"
    files = await host.files(f"{base}/counters/*", f"{base}/hw_counters/*")
    return {path: int(text) for path, text in files.items() if _NAMES.search(path) and text.strip().isdigit()}
