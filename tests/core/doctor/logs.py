"""Short logs in NCCL's own words, of several versions and writers, and the way from text to a report."""

from __future__ import annotations

from aphro_core.doctor.nccl_log.facts import LogFacts
from aphro_core.doctor.nccl_log.scan import Scan
from aphro_core.doctor.nccl_log.verdict import LogReport, judge


def scan(text: str | bytes, *, block_bytes: int = 1 << 20) -> LogFacts:
    data = text.encode() if isinstance(text, str) else text
    facts = LogFacts()
    Scan(facts).read_file("log", (data[at : at + block_bytes] for at in range(0, len(data), block_bytes)))
    return facts


def read(text: str | bytes, *, ib: bool = False) -> LogReport:
    return judge(scan(text), ib=ib)


def info(text: str, host: str = "n1", pid: int = 10) -> str:
    return f"{host}:{pid}:{pid + 1} [0] NCCL INFO {text}\n"


def warn(text: str, host: str = "n1", pid: int = 10, where: str = "misc/socket.cc:441") -> str:
    return f"\n{host}:{pid}:{pid + 1} [0] {where} NCCL WARN {text}\n"


IB_GDR = "".join(
    info(f"Channel {channel:02}/0 : {a}[0] -> {b}[0] [{side}] via NET/IB/{channel}/GDRDMA", host)
    for channel in (0, 1)
    for a, b, side, host in (
        (0, 1, "send", "n1"),
        (0, 1, "receive", "n2"),
        (1, 0, "send", "n2"),
        (1, 0, "receive", "n1"),
    )
)
SOCKETS = (
    info("NCCL_IB_DISABLE set by environment to 1.")
    + info("NET/Socket : Using [0]eth0:10.0.0.1<0>")
    + info("Using network Socket")
    + info("Channel 00/0 : 1[0] -> 0[0] [receive] via NET/Socket/0")
    + info("Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0")
    + info("Channel 00/0 : 0[0] -> 1[0] [receive] via NET/Socket/0", "n2")
)
P2P = "NCCL version 2.21.5+cuda12.4\n" + "".join(
    info(
        f"Channel {channel:02}/0 : {rank}[{rank}] -> {(rank + 1) % 4}[{(rank + 1) % 4}] via P2P/CUMEM/read",
        pid=10 + rank,
    )
    for rank in range(4)
    for channel in range(16)
)
SHM = info("NCCL_P2P_LEVEL set by environment to NVL") + info("Channel 00 : 0[0] -> 1[1] via SHM/direct/direct")
TIMEOUT = (
    info("NET/IB : Using [0]mlx5_0:1/RoCE [1]mlx5_1:1/RoCE [RO]; OOB eth0:10.0.0.1<0>")
    + info("Channel 00/0 : 0[0] -> 1[0] [send] via NET/IB/0/GDRDMA")
    + warn(
        "NET/IB : Got completion from peer 10.0.0.2<44206> with status=12 opcode=129 len=65536 vendor err 129 (Recv)"
    )
    + warn("NET/IB : Got completion from peer 10.0.0.2<44206> with status=5 opcode=0 len=0 vendor err 249 (Recv)")
    + info("transport/net.cc:1298 -> 6")
    + info("proxy.cc:874 -> 6 [Progress Thread]")
    + warn("socketProgress: Connection closed by remote peer n2<41000>", "n3")
)
INIT_ONLY = (
    info("Bootstrap: Using eth0:10.0.0.1<0>")
    + info("NET/IB : Using [0]mlx5_0:1/IB [RO]; OOB eth0:10.0.0.1<0>")
    + info("Using network IB")
    + info("ncclCommInitRank comm 0x5 rank 0 nranks 2 cudaDev 0 nvmlDev 0 busId 1c000 commId 0x65 - Init COMPLETE")
)
LOGS = {"ib": IB_GDR, "sockets": SOCKETS, "p2p": P2P, "shm": SHM, "timeout": TIMEOUT, "init": INIT_ONLY}
