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
retries and timeouts a lossy network (PFC and ECN on RoCE). Run it while a job is running.
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
    before = await _read(host)
    if not before:
        return Finding(ID, Status.SKIP, "the drivers here count no errors")
    await anyio.sleep(_SECONDS)
    after = await _read(host)
    growing = {path: count for path, count in after.items() if count > before.get(path, 0)}
    old = {path: count for path, count in after.items() if count}
    evidence = tuple(Evidence(path, 1, str(count)) for path, count in (growing or old).items())
    words = ", ".join(
        f"{path.split('/')[4]} {path.rsplit('/', 1)[1]} {count}" for path, count in (growing or old).items()
    )
    if growing:
        return Finding(ID, Status.FAIL, f"errors are being counted: {words}", True, evidence, _REMEDY)
    if old:
        return Finding(ID, Status.WARN, f"errors of the past: {words}", False, evidence, _REMEDY)
    return Finding(ID, Status.PASS, f"{len(after)} error counters, all zero")


async def _read(host: Host) -> dict[str, int]:
    base = "/sys/class/infiniband/*/ports/*"
    files = await host.files(f"{base}/counters/*", f"{base}/hw_counters/*")
    return {path: int(text) for path, text in files.items() if _NAMES.search(path) and text.strip().isdigit()}
