"""How ranks talk, in the words of NCCL 2.2 to 2.30 and RCCL."""

from __future__ import annotations

import pytest

from aphro_core.doctor.nccl_log.hops import Hop, read_hop

NET = [
    ("Channel 00/0 : 7[3] -> 0[0] [receive] via NET/IB/0/GDRDMA", Hop(7, 0, "NET/IB", "receive", True, 0)),
    ("Channel 00 : 7[1a000] -> 0[1b000] [send] via NET/IB/3", Hop(7, 0, "NET/IB", "send", False, 3)),
    (
        "Channel 12/0 : 13[5] -> 5[5] [receive] via NET/IBext_v8/5/GDRDMA/Shared",
        Hop(13, 5, "NET/IBext_v8", "receive", True, 5),
    ),
    ("Channel 01/1 : 0[0] -> 8[0] [send] via NET/IB/9/GDRDMA(PCI)/Shared", Hop(0, 8, "NET/IB", "send", True, 9)),
    ("Channel 01/1 : 0[0] -> 8[0] [send] via NET/IB/9/GDRDMA/Shared/flush=2", Hop(0, 8, "NET/IB", "send", True, 9)),
    ("Channel 01/0 : 2[1] -> 1[0] [send] via NET/IB/1(3)/GDRDMA", Hop(2, 1, "NET/IB", "send", True, 1, 3)),
    (
        "Channel 01/0 : 2[1] -> 1[0] [send] via NET/NCCL RDMA Plugin v6/1(3)/GDRDMA",
        Hop(2, 1, "NET/NCCL RDMA Plugin v6", "send", True, 1, 3),
    ),
    (
        "Channel 00/0 : 1[0] -> 0[0] [receive] via NET/AWS Libfabric/2/GDRDMA",
        Hop(1, 0, "NET/AWS Libfabric", "receive", True, 2),
    ),
    (
        "Channel 02/0 : 1[c6000] -> 4[c1000] [send] via NET/Socket/1 comm 0x95 nRanks 08",
        Hop(1, 4, "NET/Socket", "send", False, 1),
    ),
    ("Ring 00 : 15[41000] -> 0[1b000] [receive] via NET/IB/0", Hop(15, 0, "NET/IB", "receive", False, 0)),
    ("Ring 00 : 1 -> 0 [receive] via NET/Socket/0", Hop(1, 0, "NET/Socket", "receive", False, 0)),
    ("CollNet 00/0 : 3 [send] via COLLNET/SHARP/0/GDRDMA", Hop(3, -1, "COLLNET/SHARP", "send", True, 0)),
    ("9[1a000] -> 2[6b000] [receive] via NET/IB/1", Hop(9, 2, "NET/IB", "receive", False, 1)),
]
LOCAL = [
    ("Channel 00 : 1[c2000] -> 0[c1000] via P2P/direct pointer", "P2P/direct pointer"),
    ("Channel 00/0 : 1[1] -> 0[0] via P2P/IPC/read", "P2P/IPC"),
    ("Channel 00/0 : 1[1] -> 0[0] via P2P/CUMEM/read/CE", "P2P/CUMEM"),
    ("Channel 08/1 : 1[7] -> 0[0] via P2P/indirect/4[4]", "P2P/indirect"),
    ("Channel 00/0 : 1[3] -> 0[0] via P2P/MNNVL", "P2P/MNNVL"),
    ("Channel 00 : 1[1] -> 0[2] via SHM/direct/direct", "SHM"),
    ("Channel 00 : 1[1] -> 0[2] via SHM/CE/direct", "SHM"),
    ("Channel 00/0 : 1[1] -> 0[2] via SHM/direct", "SHM"),
    ("Ring 00 : 1[1b000] -> 0[41000] via direct shared memory", "SHM"),
    ("Channel 02/0 : 1[ce000] -> 0[c6000] via P2P/IPC comm 0xfb nRanks 08", "P2P/IPC"),
]


@pytest.mark.parametrize(("text", "hop"), NET)
def test_network(text: str, hop: Hop) -> None:
    assert read_hop(text) == hop


@pytest.mark.parametrize(("text", "via"), LOCAL)
def test_inside_a_host(text: str, via: str) -> None:
    assert read_hop(text) == Hop(1, 0, via)


@pytest.mark.parametrize("cut", range(1, 7))
def test_a_cut_suffix_claims_nothing(cut: int) -> None:
    text = "Channel 00/0 : 7[3] -> 0[0] [receive] via NET/IB/0/GDRDMA"
    assert read_hop(text[:-cut]) is None


@pytest.mark.parametrize(
    "text",
    [
        "Channel 00/16 :    0   1   2   3",
        "Ring 00 : 1 -> 0 -> 1",
        "Trees [0] 1/-1/-1->0->-1",
        "Tree 0 : -1 -> 0 -> 1/-1/-1",
        "Channel ... via NET/IB/18/GDRDMA",
        "Channel 12/0 : 13[5] -> 5[5] [receive] via",
        "Channel 12/0 : 13[5] -> 5[5] [receive] via NET/IB",
        "NET/IB/4/GDRDMA",
        "we went from 1 -> 2 via Rome",
    ],
)
def test_no_hop(text: str) -> None:
    assert read_hop(text) is None
