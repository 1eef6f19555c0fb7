"""Whether a GPU has lost memory rows or logged errors that need a drain."""

from __future__ import annotations

import re
from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.gpus import Gpu, read_gpus
from aphro_core.remote.remote import Host

ID: Final = "gpu.health"
TITLE: Final = "GPU health"
EXPLAIN: Final = """
Reads ECC counters and remapped rows from NVML, and Xid lines from the kernel's log where it may be read. PASS without
errors; WARN for corrected errors, for uncorrected ones of the past, and for Xid of applications (13, 31, 43, 63, 92,
94); FAIL for a row remap that is pending or has failed, uncorrected errors since the driver was loaded, and Xid of
the hardware (48, 54, 64, 74, 79, 95, 119, 120).
"""
_REMEDY: Final = "drain this host; nvidia-smi -q -d ECC,ROW_REMAPPER; dcgmi diag -r 2 (about two minutes)"
_FATAL_XIDS: Final = {48, 54, 64, 74, 79, 95, 119, 120}
_XID: Final = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")


async def check(host: Host) -> Finding:
    gpus = await read_gpus(host)
    if gpus.error:
        return Finding(ID, Status.SKIP, gpus.error)
    fatal, past = await _read_xids(host)
    for gpu in gpus.gpus:
        fatal += [Evidence("NVML", 0, f"GPU {gpu.index}: {text}") for text in _faults(gpu)]
        past += [Evidence("NVML", 0, f"GPU {gpu.index}: {text}") for text in _scars(gpu)]
    if fatal:
        return Finding(ID, Status.FAIL, f"hardware faults: {fatal[0].text}", True, tuple([*fatal, *past][:20]), _REMEDY)
    if past:
        return Finding(ID, Status.WARN, f"errors of the past: {past[0].text}", False, tuple(past[:20]), _REMEDY)
    return Finding(ID, Status.PASS, f"no ECC error, no remapped row on {len(gpus.gpus)} GPUs")


def _faults(gpu: Gpu) -> list[str]:
    found = []
    if gpu.remapped and gpu.remapped[2]:
        found.append("a row remap is pending: it takes effect at the next reset")
    if gpu.remapped and gpu.remapped[3]:
        found.append("a row remap has failed")
    if gpu.ecc.get("uncorrected_volatile"):
        found.append(f"{gpu.ecc['uncorrected_volatile']} uncorrected ECC errors since the driver was loaded")
    return found


def _scars(gpu: Gpu) -> list[str]:
    counts = {"corrected ECC errors": gpu.ecc.get("corrected_aggregate"),
              "uncorrected ECC errors since ever": gpu.ecc.get("uncorrected_aggregate"),
              "rows remapped": sum(gpu.remapped[:2]) if gpu.remapped else None}  # fmt: skip
    return [f"{count} {what}" for what, count in counts.items() if count]


async def _read_xids(host: Host) -> tuple[list[Evidence], list[Evidence]]:
    output = await host.run("dmesg")
    fatal: list[Evidence] = []
    past: list[Evidence] = []
    for number, line in enumerate(output.stdout.splitlines() if not output.returncode else [], 1):
        found = _XID.search(line)
        if found:
            (fatal if int(found[2]) in _FATAL_XIDS else past).append(Evidence("dmesg", number, line.strip()))
    return fatal[-5:], past[-5:]
