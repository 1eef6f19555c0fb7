"""What a pair's way is worth: one row a kind of transport, and the findings that all pairs together make."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from aphro_core.doctor.finding import Finding, Status
from aphro_core.doctor.nccl_log.facts import LogFacts, Pair
from aphro_core.doctor.nccl_log.reasons import reasons_for
from aphro_core.doctor.nccl_log.remedies import remedy_for

_MAX_EVIDENCE: Final = 3


class Quality(StrEnum):
    EFFICIENT = "efficient"
    ACCEPTABLE = "acceptable"
    SLOW = "slow"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Kind:
    """A transport: pairs whose ``via`` matches and whose ``gdr`` is this (None: any)."""

    id: str
    via: re.Pattern[str]
    gdr: bool | None
    quality: Quality
    status: Status
    ib_status: Status  # when InfiniBand is expected (``--ib``)
    title: str


def _kind(id: str, via: str, gdr: bool | None, quality: Quality, status: Status, ib_status: Status, title: str) -> Kind:
    return Kind(id, re.compile(via, re.IGNORECASE), gdr, quality, status, ib_status, title)


_PASS, _WARN, _FAIL = Status.PASS, Status.WARN, Status.FAIL
KINDS: Final = (
    _kind("log.mnnvl", "P2P/MNNVL", None, Quality.EFFICIENT, _PASS, _PASS, "NVLink across hosts"),
    _kind("log.p2p", "P2P/", None, Quality.EFFICIENT, _PASS, _PASS, "GPUs of one host talk peer to peer"),
    _kind("log.shm", "SHM", None, Quality.ACCEPTABLE, _WARN, _WARN, "GPUs of one host talk through host memory"),
    _kind("log.provider-tcp", ".*(?:FastSocket|TCPX|FasTrak|GPUDirectTCP)", None, Quality.ACCEPTABLE, _PASS, _WARN,
          "the provider's TCP"),
    _kind("log.sockets", "(?:COLL)?NET/Socket", None, Quality.SLOW, _WARN, _FAIL, "TCP sockets"),
    _kind("log.gdrdma", "(?:COLL)?NET/", True, Quality.EFFICIENT, _PASS, _PASS, "GPUDirect RDMA"),
    _kind("log.rdma-no-gdr", "(?:COLL)?NET/", False, Quality.ACCEPTABLE, _WARN, _WARN, "RDMA without GPUDirect"),
)  # fmt: skip
IN_HOST: Final = _kind("log.net-in-host", "(?:COLL)?NET/", None, Quality.ACCEPTABLE, _WARN, _WARN,
                       "ranks of one host talk over the network")  # fmt: skip
MIXED: Final = _kind("log.gdr-mixed", "NET/", None, Quality.ACCEPTABLE, _WARN, _WARN, "GPUDirect RDMA on some channels")


class Placement:
    """Which pairs share a host, as far as the log tells. Built once all facts are in."""

    def __init__(self, facts: LogFacts) -> None:
        num_nodes = {int(note.value.split()[0]) for note in facts.all_notes("nodes")}
        hosts = {host for hosts in facts.rank_hosts.values() for host in hosts}
        self._is_one_node = num_nodes == {1}
        self._is_masked = len(hosts) == 1 and max(num_nodes, default=1) > 1  # one name for all, by whoever posted it
        self._facts = facts

    def is_in_host(self, pair: Pair) -> bool:
        """Both ends are known to be on one host. Names that several hosts bear prove nothing."""
        if self._is_one_node:
            return True
        sources = pair.src_hosts or self._facts.rank_hosts.get(pair.src, set())
        targets = pair.dst_hosts or self._facts.rank_hosts.get(pair.dst, set())
        if len(sources) != 1 or sources != targets or pair.dst < 0 or self._is_masked:
            return False
        return len(self._facts.addresses.get(next(iter(sources)), set())) < 2


def kind_of(pair: Pair, placement: Placement) -> Kind:
    """The row of the table that the pair is; the network inside a host is one of its own."""
    if pair.gdr is not None and placement.is_in_host(pair):
        return IN_HOST
    return next(kind for kind in KINDS if kind.via.match(pair.via) and kind.gdr in (None, pair.gdr))


def judge_pairs(facts: LogFacts, *, ib: bool) -> list[Finding]:
    """One finding a kind of transport that the log shows."""
    placement = Placement(facts)
    groups: dict[str, tuple[Kind, list[Pair]]] = {}
    for pair in facts.pairs.values():
        kind = kind_of(pair, placement)
        groups.setdefault(kind.id, (kind, []))[1].append(pair)
    without = groups.get("log.rdma-no-gdr")
    if without and "log.gdrdma" in groups:
        excused = _sends_of_old_gpus(without[1], facts)
        pairs = [*without[1], *groups.pop("log.gdrdma")[1]]
        del groups["log.rdma-no-gdr"]
        kind = KINDS[-2] if excused else MIXED
        groups[kind.id] = (kind, pairs)
    return [_finding(kind, pairs, facts, ib) for kind, pairs in groups.values()]


def _sends_of_old_gpus(pairs: list[Pair], facts: LogFacts) -> bool:
    """Before compute capability 8.0 NCCL does not send from GPU memory over the NIC, unless NVLink is in the node."""
    capability = facts.first("min-capability")
    models = [note.value for note in facts.all_notes("gpu")]
    is_old = (capability is not None and int(capability.value) < 8) or any(
        re.search(r"\b(?:V100|P100|P40|T4|K80|TITAN|GTX|RTX 20\d0|Quadro)\b", model) for model in models
    )
    return is_old and all(pair.sides == {"send"} for pair in pairs)


def _finding(kind: Kind, pairs: list[Pair], facts: LogFacts, ib: bool) -> Finding:
    lacking = [pair for pair in pairs if pair.gdr is False] if kind is MIXED else pairs
    evidence = tuple(pair.first.evidence for pair in sorted(lacking, key=lambda pair: pair.first.order)[:_MAX_EVIDENCE])
    reasons = reasons_for(kind.id, facts)
    evidence += tuple(note.first.evidence for _, note in reasons)
    status = kind.ib_status if ib else kind.status
    if kind.id in {"log.rdma-no-gdr", "log.gdr-mixed"} and has_unified_memory(facts):
        status = Status.PASS
    remedy = "" if status is Status.PASS else remedy_for(kind.id, facts)
    title = _title(kind, pairs, lacking, facts) + "".join(f"; {words}" for words, _ in reasons)
    return Finding(kind.id, status, title, evidence=evidence, remedy=remedy)


def has_unified_memory(facts: LogFacts) -> bool:
    """GB10 (DGX Spark): GPU and host share their memory, so GPUDirect has nothing to add."""
    named = {"gpu": "GB10", "ports": "roceP2p1s0f", "gdr-on": "roceP2p1s0f", "gdr-off": "roceP2p1s0f"}
    return any(name in note.value for kind, name in named.items() for note in facts.all_notes(kind))


def _title(kind: Kind, pairs: list[Pair], lacking: list[Pair], facts: LogFacts) -> str:
    names = ", ".join(sorted({pair.via for pair in pairs})[:4])
    title = f"{kind.title}: {len(pairs)} way{'s' * (len(pairs) != 1)} between ranks by {names}"
    if kind.id in {"log.gdrdma", "log.rdma-no-gdr", "log.gdr-mixed"}:
        title += fabric_of(facts)
    if kind.id in {"log.rdma-no-gdr", "log.gdr-mixed"}:
        sides = _join(sorted({side for pair in lacking for side in pair.sides}))
        hosts = _join(sorted({host for pair in lacking for host in pair.src_hosts | pair.dst_hosts})[:4])
        devs = _join([_device(dev, facts) for dev in sorted({dev for pair in lacking for dev in pair.devs})[:8]])
        title += f"; /GDRDMA is missing on the {sides} side" + (f" of {hosts}" if hosts else "") + f", NIC {devs}"
        title += " (unified memory: nothing is lost)" if has_unified_memory(facts) else ""
    return title


def fabric_of(facts: LogFacts) -> str:
    """`` (RoCE)`` and the like, as far as the log tells: the name IB stands for both."""
    layers = {layer for note in facts.all_notes("ports") for layer in re.findall(r":\d+/(IB|RoCE)", note.value)}
    if facts.notes.get("provider") or any("Libfabric" in pair.via for pair in facts.pairs.values()):
        layers = {"EFA" if facts.first("provider", "platform") else "libfabric"}
    return f" ({_join(sorted(layers))})" if layers else ""


def devices_of(facts: LogFacts) -> dict[int, str]:
    """NCCL's device indices -> port names, where all processes agree."""
    names: dict[int, set[str]] = {}
    for note in facts.all_notes("ports"):
        for index, name in re.findall(r"\[(\d+)\](\S+?):\d+/", note.value):
            names.setdefault(int(index), set()).add(name)
    return {index: next(iter(found)) for index, found in names.items() if len(found) == 1}


def _device(dev: int, facts: LogFacts) -> str:
    name = devices_of(facts).get(dev)
    return f"{dev} ({name})" if name else str(dev)


def _join(words: Iterable[str]) -> str:
    return " and ".join(words)
