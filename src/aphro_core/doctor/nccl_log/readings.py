"""What healthy records say: one row a sentence of NCCL, its plug-ins or a launcher that a verdict may rest on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from aphro_core.doctor.nccl_log.facts import LogFacts, Sighting


@dataclass(frozen=True, slots=True)
class Reading:
    """Text that matches ``words`` is noted under ``kind``; its groups, joined by ``joint``, are the value."""

    kind: str
    words: re.Pattern[str]
    joint: str = " "


def _row(kind: str, words: str, joint: str = " ") -> Reading:
    return Reading(kind, re.compile(words), joint)


READINGS: Final = (
    _row("version", r"\bNCCL version (\d+\.\d+[\w.+:-]*)"),
    _row("rccl", r"\bRCCL version ?:? ?(\d+\.\d+[\w.+:-]*)"),
    _row("version-claimed", r"\bnccl==(\d+\.\d+\.\d+)|^Found nccl.* (\d+\.\d+\.\d+)"),
    _row("network", r"^Using (?:internal )?[Nn]etwork (\S.*)"),
    _row("network", r"^Assigned NET plugin (\S.*?) to comm"),
    _row("bootstrap", r"^Bootstrap ?: Using (?:\[0\])?(\S+?):(\S+?)<\d+>", ":"),
    _row("interfaces", r"^NET/Socket ?: Using (\[0\].*)"),
    _row("interfaces", r"^NET ?: Using interface (\S+)"),
    _row("ports", r"NET/IB ?: Using (\[\d+\].+?)(?: \[RO\]| ?;|$)"),
    _row("oob", r"NET/IB ?: Using .*OOB (\S+?):(\S+?)<\d+>", ":"),
    _row("no-device", r"NET/IB ?: (?:No device found|Using \[RO\];)"),
    _row("no-verbs", r"(?:Failed to open|[Cc]ould? not open) (libibverbs\.so(?:\[\.1\]|\.1))"),
    _row("plugin", r"^NET/Plugin ?: Loaded net plugin (\S.*?)(?: \(v\d+\))?$"),
    _row("plugin", r"^P2P plugin (\S+)"),
    _row("no-plugin", r"^NET/Plugin ?: (?:No plugin found|Could not find: \S+-net)"),
    _row("provider", r"NET/OFI Selected [Pp]rovider is (\w+)"),
    _row("platform", r"NET/OFI Running on (\S+) platform"),
    _row("ofi-no-gdr", r"NET/OFI .*(disabling GDR|GDR not supported|GPUDirect .*not (?:supported|available))"),
    _row("env", r"^(NCCL_\w+|RCCL_\w+) set (?:by environment )?to ?(\S*?)[.,]?(?:\s|$)", "="),
    _row("gdr-off", r"NET/IB.* GPU Direct RDMA .*[Dd]isabled for HCA (\d+) '([^']+)"),
    _row("gdr-on", r"GPU Direct RDMA .*[Ee]nabled for HCA (\d+) '([^']+)"),
    _row("gdr-far", r"GPU Direct RDMA Disabled for (GPU \S+ / HCA \S+) \(distance (\d+ [<>]=? \d+)"),
    _row("dmabuf", r"^DMA-BUF is available on GPU"),
    _row("nodes", r"\bnNodes (\d+) localRanks (\d+)"),
    _row("complete", r"- Init COMPLETE"),
    _row("works", r"- (?:Init|Destroy) COMPLETE|failed to NVLS register|^# Avg bus bandwidth"),
    _row(
        "works",
        r"Application startup complete|generation throughput: (?!0\.0 )\d|Capturing CUDA graph"
        r"|Graph capturing finished|Compiling a graph for|Model loading took",
    ),
    _row("idle", r"generation throughput: 0\.0 "),  # of the same shape as one that works
    _row("nvlink", r"\+ NVL\[|NVLS multicast support is available"),
    _row("nvls", r"^NVLS comm .*nHeads (\d+)"),
    _row("pxn", r"use ring PXN ([1-9]\d*)"),
    _row("min-capability", r"Min Comp Cap (\d+)"),
    _row("watchdog", r"\[Rank (\d+)\] Watchdog caught .*?WorkNCCL\((?:\w+=\w+, )?SeqNum=(\d+), OpType=(\w+)"),
    _row("ras-process", r"^Process (\d+) on node (\S+) managing GPUs? (\S+)", " on "),
    _row("gpu", r"Rank +\d+ (?:Group +\d+ )?Pid +\d+ on +\S+ device +\d+ \[[^\]]*\] (\S.*)"),
)

_MAX_TEXT: Final = 4096
_COMM: Final = re.compile(
    r"(?:comm \S+ )?\brank (?P<rank>\d+) n[rR]anks (?P<nranks>\d+)\b(?:.*? busId (?P<bus>\w+))?"
    r"(?:.*? commId (?P<comm>\w+))?"
)


def read_note(seen: Sighting, facts: LogFacts) -> bool:
    """Take down what the record says. False if it says nothing that is kept, whatever its digits."""
    text = seen.record.text[:_MAX_TEXT]
    found = False
    for reading in READINGS:
        match = reading.words.search(text)
        if match:
            found = True
            facts.note(reading.kind, reading.joint.join(group or "" for group in match.groups()).strip(), seen)
            if reading.kind in {"bootstrap", "oob"}:
                facts.place_address(seen.record, match[2])
            elif reading.kind == "works":
                facts.mark("works", seen)
                facts.waited.clear()
    return _read_communicator(seen, facts) or found


def _read_communicator(seen: Sighting, facts: LogFacts) -> bool:
    """Which rank this process is, and whether another rank of its communicator has the same GPU."""
    match = _COMM.search(seen.record.text[:_MAX_TEXT])
    if not match:
        return False
    rank = int(match["rank"][:9])
    facts.place_rank(rank, seen.record.host)
    if match["bus"] and match["comm"]:
        other = facts.place_gpu(match["comm"], rank, match["bus"], seen.record)
        if other is not None:
            pair = f"{min(rank, other)} and {max(rank, other)} are both on GPU {match['bus']}"
            facts.note("same-gpu", f"ranks {pair} of {seen.record.host or 'one host'}", seen)
    return True
