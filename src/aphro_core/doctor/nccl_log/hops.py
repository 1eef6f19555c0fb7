"""How one rank reaches another: the grammar of Channel and Ring lines, NCCL 2.2 to 2.30 and RCCL."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

Side = Literal["send", "receive"]

_RANKS: Final = re.compile(
    r"(?<![\d.:])(?P<src>\d{1,7})(?:\[[^\]\s]*\])? -> (?P<dst>\d{1,7})(?:\[[^\]\s]*\])? "
    r"(?:\[(?P<side>send|receive)\] )?via (?P<via>\S.*)"
)
_COLLNET: Final = re.compile(r"CollNet \S+ : (?P<src>\d{1,7}) \[(?P<side>send|receive)\] via (?P<via>COLLNET/.*)")
_NET: Final = re.compile(
    r"(?P<kind>NET|COLLNET)/(?P<name>[^/:][^/]{0,63}?)/(?P<dev>\d{1,4})(?:\((?P<proxy>\d{1,7})\))?"
    r"(?P<flags>(?:/[A-Za-z][\w=]*(?:\(\w+\))?)*)(?P<rest>.*)"
)
_P2P: Final = re.compile(r"P2P/(direct pointer|[A-Za-z]+)")
_SHM: Final = re.compile(r"SHM\b|direct shared memory\b")
_CUT_FLAGS: Final = tuple("/GDRDMA"[:end] for end in range(1, 7))


@dataclass(frozen=True, slots=True)
class Hop:
    """One direction between two ranks of one communicator, over one channel.

    ``via`` is NET/NAME, P2P/KIND, SHM or COLLNET/NAME; ``gdr`` is None where GPU Direct RDMA has no meaning;
    ``side`` says which end printed the line ("send": ``src``; also for P2P and SHM); ``dst`` is -1 for CollNet.
    """

    src: int
    dst: int
    via: str
    side: Side = "send"
    gdr: bool | None = None
    dev: int | None = None  # NCCL's index into the devices it uses, not the N of mlx5_N
    proxy: int | None = None  # PXN: the rank of the same host that sends for src


def read_hop(text: str) -> Hop | None:
    """The hop that a record or a bare line names; None if there is none, or its transport is cut."""
    if " via " not in text:
        return None
    ends = _RANKS.search(text) or _COLLNET.search(text)
    if not ends:
        return None
    named = ends.groupdict()
    src, dst, side = int(named["src"]), int(named.get("dst") or -1), named["side"] or "send"
    return _read_via(named["via"], src, dst, "receive" if side == "receive" else "send")


def _read_via(via: str, src: int, dst: int, side: Side) -> Hop | None:
    if net := _NET.match(via):
        flags = net["flags"]
        if net["rest"] == "/" or (not net["rest"] and flags.endswith(_CUT_FLAGS)):
            return None  # /GDR: with or without /GDRDMA is not known
        proxy = int(net["proxy"]) if net["proxy"] else None
        return Hop(src, dst, f"{net['kind']}/{net['name']}", side, "/GDRDMA" in flags, int(net["dev"]), proxy)
    if p2p := _P2P.match(via):
        return Hop(src, dst, f"P2P/{p2p[1]}")
    if _SHM.match(via):
        return Hop(src, dst, "SHM")
    return None
