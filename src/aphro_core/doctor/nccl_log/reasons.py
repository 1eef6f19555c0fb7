"""Why a transport is not the better one: the notes of a log that answer it, as words and as evidence."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.nccl_log.facts import LogFacts, Note

Reason = tuple[str, Note]

_IB_OFF: Final = {"NCCL_IB_DISABLE": "1", "NCCL_IBEXT_DISABLE": "1", "NCCL_NET": "Socket"}
_FORCED: Final = _IB_OFF | {
    "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_NET_GDR_LEVEL": "LOC", "NCCL_SOCKET_IFNAME": "lo",
}  # fmt: skip


def forced_choices(facts: LogFacts) -> dict[str, Note]:
    """Variables that force a bad choice, as the log says NCCL read them last."""
    read = {name: facts.environment(name) for name in _FORCED}
    return {name: note for name, note in read.items() if note and note.value == f"{name}={_FORCED[name]}"}


def rdma_switched_off(facts: LogFacts) -> dict[str, Note]:
    return {name: note for name, note in forced_choices(facts).items() if name in _IB_OFF}


def why_sockets(facts: LogFacts) -> list[Reason]:
    reasons = [(f"{note.value} is set", note) for note in rdma_switched_off(facts).values()]
    if reasons:
        return reasons
    named = (
        ("no-verbs", "the verbs library cannot be opened"),
        ("log.no-plugin-start", "the network plug-in could not start"),
        ("no-device", "no RDMA device was found"),
        ("no-plugin", "no network plug-in was found, which EFA and Slingshot need"),
    )
    found = [(words, note) for kind, words in named if (note := facts.first(kind))]
    return found[:1] if facts.first("ports") is None else []


def why_no_gdr(facts: LogFacts) -> list[Reason]:
    level = facts.environment("NCCL_NET_GDR_LEVEL")
    if level and level.value.endswith(("=LOC", "=0")):
        return [(f"{level.value} is set", level)]
    named = (
        ("ofi-no-gdr", "the EFA plug-in works without it"),
        ("gdr-off", "NCCL finds no peer-memory module or DMA-BUF"),
        ("gdr-far", "GPU and NIC are too far apart"),
    )
    return [(words, note) for kind, words in named if (note := facts.first(kind))][:1]


def why_shm(facts: LogFacts) -> list[Reason]:
    disabled, level = facts.environment("NCCL_P2P_DISABLE"), facts.environment("NCCL_P2P_LEVEL")
    if disabled and disabled.value.endswith("=1"):
        return [(f"{disabled.value} is set", disabled)]
    if level:
        return [(f"{level.value} limits P2P", level)]
    denied = facts.first("log.p2p-pcie")
    return [("the GPUs have no P2P over PCIe", denied)] if denied else []


WHY: Final = {
    "log.sockets": why_sockets,
    "log.rdma-no-gdr": why_no_gdr,
    "log.gdr-mixed": why_no_gdr,
    "log.gdr-off": why_no_gdr,
    "log.shm": why_shm,
}


def reasons_for(id: str, facts: LogFacts) -> list[Reason]:
    return WHY[id](facts) if id in WHY else []
