"""Findings from what NCCL chose and saw: variables, addresses, devices and modules. None of them needs an error."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.nccl_log.facts import LogFacts, Note
from aphro_core.doctor.nccl_log.reasons import forced_choices, reasons_for
from aphro_core.doctor.nccl_log.remedies import remedy_for
from aphro_core.doctor.nccl_log.topics import TOPICS

_BRIDGE: Final = re.compile(r"docker\d*|br-\w+|virbr|veth|flannel|cni\d|cali\w|podman|lxc", re.IGNORECASE)
_TUNNEL: Final = re.compile(r"tun\d|tnl\d|tap\d|wg\d|tailscale|zt\w|warp|vpn", re.IGNORECASE)
_MAX_EVIDENCE: Final = 3


def judge_context(facts: LogFacts, *, ib: bool) -> list[Finding]:
    """All findings of this file's table, in its order."""
    return [finding for check in _CHECKS for finding in check(facts, ib)]


def num_nodes(facts: LogFacts) -> int:
    """The largest number of nodes that the log proves; 0 if it proves none. NCCL's nodes are domains, not hosts."""
    said = [int(note.value.split()[0]) for note in facts.all_notes("nodes")]
    hosts = {host for hosts in facts.rank_hosts.values() for host in hosts}
    return max([*said, len(hosts) if len(hosts) > 1 else 0, 0])


def _evidence(*notes: Note | None) -> tuple[Evidence, ...]:
    return tuple(note.first.evidence for note in notes if note)[:_MAX_EVIDENCE]


def _found(id: str, status: Status, title: str, facts: LogFacts, *notes: Note | None) -> Finding:
    return Finding(id, status, title, evidence=_evidence(*notes), remedy=remedy_for(id, facts))


def _environment(facts: LogFacts, ib: bool) -> Iterator[Finding]:
    for name, note in forced_choices(facts).items():
        is_fatal = ib and name in {"NCCL_IB_DISABLE", "NCCL_NET"}
        remedy = f"unset {name}\n{TOPICS['log.env'].remedy}"
        status = Status.FAIL if is_fatal else Status.WARN
        yield Finding("log.env", status, f"{note.value} is set", evidence=_evidence(note), remedy=remedy)


def _sockets(facts: LogFacts, ib: bool) -> Iterator[Finding]:
    """Sockets were chosen, and no Channel line says who uses them."""
    network = facts.notes.get("network", {}).get("Socket")
    if facts.pairs or not network:
        return
    nodes = num_nodes(facts)
    where = " (harmless while all ranks share one host, as here)" if nodes == 1 else ""
    status = Status.FAIL if ib and nodes != 1 else Status.WARN
    reasons = reasons_for("log.sockets", facts)
    why = "".join(f": {words}" for words, _ in reasons[:1])
    title = f"TCP sockets were chosen as the network{where}{why}"
    yield _found("log.sockets", status, title, facts, network, *(note for _, note in reasons))


def _gdr_off(facts: LogFacts, ib: bool) -> Iterator[Finding]:
    """Channel lines decide; without any, what is said of each NIC is all there is."""
    off = [note for note in facts.all_notes("gdr-off") if note.value not in facts.notes.get("gdr-on", {})]
    shows_network = any(pair.gdr is not None for pair in facts.pairs.values())
    if off and not shows_network:
        names = ", ".join(sorted({note.value.split(" ", 1)[-1] for note in off})[:8])
        yield _found("log.gdr-off", Status.WARN, f"GPUDirect RDMA is off for {names}", facts, *off)
    lacks = facts.first("ofi-no-gdr")
    if lacks and not shows_network and num_nodes(facts) > 1:
        yield _found("log.gdr-off", Status.WARN, "the EFA plug-in runs without GPUDirect RDMA", facts, lacks)


def _no_device(facts: LogFacts, ib: bool) -> Iterator[Finding]:
    missing, plugin = facts.first("no-device"), facts.first("plugin")
    if missing and plugin and num_nodes(facts) != 1 and not facts.first("ports") and "network" not in facts.notes:
        title = f"the plug-in {plugin.value} is loaded, but finds no RDMA device"
        yield _found("log.no-rdma-device", Status.WARN, title, facts, missing, plugin)


def _addresses(facts: LogFacts) -> list[Note]:
    return [note for kind in ("bootstrap", "oob", "interfaces") for note in facts.all_notes(kind)]


def _loopback(facts: LogFacts, ib: bool) -> Iterator[Finding]:
    notes = [note for note in _addresses(facts) if re.search(r"(?:^|[\]\s])lo\d*:|:127\.\d", note.value)]
    if notes and num_nodes(facts) != 1 and not facts.first("log.loopback"):
        yield _found("log.loopback", Status.WARN, f"NCCL uses a loopback address: {notes[0].value}", facts, *notes)


def _docker_bridge(facts: LogFacts, ib: bool) -> Iterator[Finding]:
    notes = [note for note in _addresses(facts) if re.search(r"docker\d*:|eth\d:172\.17\.", note.value)]
    if notes and (num_nodes(facts) > 1 or any(len(note.hosts) > 1 for note in notes)):
        yield _found("log.docker-bridge", Status.WARN, "NCCL uses a container bridge between hosts", facts, *notes)


def _interfaces(facts: LogFacts, ib: bool) -> Iterator[Finding]:
    """Several interfaces, one of which other hosts cannot reach."""
    notes = facts.all_notes("interfaces")
    names = {name for note in notes for name in re.findall(r"(?:\[\d+\])?([^\s\[\]:]+):", note.value)}
    odd = sorted(name for name in names if _BRIDGE.match(name) or _TUNNEL.search(name))
    local = [note for note in notes if ":fe80:" in note.value.lower()]
    if num_nodes(facts) == 1:
        return
    if odd and len(names) > 1:
        title = f"{', '.join(odd[:4])} among the interfaces that NCCL may use between hosts"
        notes = [note for note in notes if any(name in note.value for name in odd)]
        yield _found("log.interfaces", Status.WARN, title, facts, *notes)
    elif 0 < len(local) < len(notes):
        title = "link-local IPv6 addresses among the interfaces that NCCL may use between hosts"
        yield _found("log.interfaces", Status.WARN, title, facts, *local)


def _same_name(facts: LogFacts, ib: bool) -> Iterator[Finding]:
    """Two addresses of one network on one interface of one host name: these are two hosts."""
    for host in sorted({host for note in _addresses(facts) for host in note.hosts}):
        interfaces = _interfaces_of(host, facts)
        networks = Counter((name, address.rsplit(".", 1)[0]) for name, address in interfaces)
        if max(networks.values(), default=0) > 1:
            notes = [note for note in _addresses(facts) if host in note.hosts]
            title = f"hosts share the name {host!r}: {', '.join(sorted({ip for _, ip in interfaces})[:4])}"
            yield _found("log.same-name", Status.WARN, title, facts, *notes)


def _interfaces_of(host: str, facts: LogFacts) -> set[tuple[str, str]]:
    """Interface and IPv4 address of every sighting of the host."""
    found = set()
    for note in _addresses(facts):
        if host in note.hosts:
            found |= set(re.findall(r"([^\s\[\]:]+):(\d+\.\d+\.\d+\.\d+)", note.value))
    return found


def _same_gpu(facts: LogFacts, ib: bool) -> Iterator[Finding]:
    notes = facts.all_notes("same-gpu")
    if notes and not facts.first("log.dup-gpu"):
        yield _found("log.dup-gpu", Status.FAIL, f"two ranks use the same GPU: {notes[0].value}", facts, *notes)


def _versions(facts: LogFacts, ib: bool) -> Iterator[Finding]:
    bases = {found[0]: note for note in facts.all_notes("version") if (found := re.match(r"\d+\.\d+\.\d+", note.value))}
    if len(bases) > 1:
        title = f"different NCCL versions: {', '.join(sorted(bases)[:4])}"
        yield _found("log.version", Status.WARN, title, facts, *bases.values())


def _networks(facts: LogFacts, ib: bool) -> Iterator[Finding]:
    """Hosts that chose different networks cannot talk: no host is among those of two of them."""
    notes = [note for note in facts.all_notes("network") if note.hosts]
    hosts = [host for note in notes for host in note.hosts]
    if len(notes) > 1 and len(hosts) == len(set(hosts)):
        named = "; ".join(f"{note.value} on {', '.join(sorted(note.hosts)[:3])}" for note in notes[:4])
        yield _found("log.net-mixed", Status.WARN, f"hosts chose different networks: {named}", facts, *notes)


def _quality_of_log(facts: LogFacts, ib: bool) -> Iterator[Finding]:
    nodes = [note for note in facts.all_notes("nodes") if note.value.endswith(" 1") and not note.value.startswith("1 ")]
    if nodes and len(nodes) == len(facts.all_notes("nodes")):
        title = "every rank counts as a node of its own: are they pods of one host?"
        yield _found("log.one-gpu-nodes", Status.SKIP, title, facts, nodes[0])
    if facts.num_folded:
        yield _found("log.folded", Status.SKIP, f"lines that Ray left out: {facts.num_folded}", facts)
    if facts.num_torn:
        yield _found("log.torn", Status.SKIP, f"lines that are cut or mixed and were not read: {facts.num_torn}", facts)


_CHECKS: Final[tuple[Callable[[LogFacts, bool], Iterator[Finding]], ...]] = (
    _same_gpu, _loopback, _docker_bridge, _same_name, _interfaces, _versions, _networks, _sockets, _gdr_off,
    _no_device, _environment, _quality_of_log,
)  # fmt: skip
