"""From log to verdict: what is claimed, what comes first, and what is not known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphro_core.doctor.finding import Status
from aphro_core.doctor.nccl_log import topics_errors, topics_network, topics_transports
from aphro_core.doctor.nccl_log.topics import TOPICS, parse_topics
from aphro_core.doctor.nccl_log.verdict import Verdict
from tests.core.doctor.logs import IB_GDR, INIT_ONLY, LOGS, P2P, SHM, SOCKETS, TIMEOUT, info, read, warn

SHARED = Path(__file__).parents[4] / "shared" / "nccl_logs"
CASES = json.loads((SHARED / "cases.json").read_text()) if SHARED.exists() else []


@pytest.mark.parametrize(
    ("name", "verdict", "first"),
    [
        ("ib", "pass", "log.gdrdma"),
        ("p2p", "pass", "log.p2p"),
        ("sockets", "warn", "log.sockets"),
        ("shm", "warn", "log.shm"),
        ("timeout", "fail", "log.ib-timeout"),
        ("init", "inconclusive", "log.no-transport"),
    ],
)
def test_verdicts(name: str, verdict: Verdict, first: str) -> None:
    report = read(LOGS[name])
    assert (report.verdict, report.findings[0].id) == (verdict, first)
    assert report.exit_code == {"pass": 0, "inconclusive": 0, "warn": 1, "fail": 2}[verdict]


def test_nothing_is_claimed_of_an_empty_or_foreign_log() -> None:
    for text in ("", "hello\n", "\x00\xff" * 100):
        report = read(text)
        assert (report.verdict, report.paths, report.nccl_version) == ("inconclusive", (), None)


def test_pairs_merge_channels_and_sides() -> None:
    paths = {(path.src, path.dst): path for path in read(IB_GDR).paths}
    assert set(paths) == {(0, 1), (1, 0)}
    assert paths[0, 1].devs == (0, 1)
    assert (paths[0, 1].count, paths[0, 1].sides) == (4, ("receive", "send"))
    assert (paths[0, 1].src_hosts, paths[0, 1].dst_hosts) == (("n1",), ("n2",))


def test_sockets_say_why_and_what_to_type() -> None:
    report = read(SOCKETS)
    assert "NCCL_IB_DISABLE=1" in report.findings[0].title
    assert report.findings[0].remedy.startswith("unset NCCL_IB_DISABLE\n")
    assert report.findings[0].root_cause
    assert read(SOCKETS, ib=True).verdict == "fail"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (IB_GDR, "GPUDirect RDMA"),
        (IB_GDR.replace("/GDRDMA", ""), "RDMA without GPUDirect"),
        (SOCKETS, "TCP sockets"),
        (P2P, "not shown"),
    ],
)
def test_ib_is_answered_in_one_sentence(text: str, sentence: str) -> None:
    assert read(text, ib=True).ib == sentence
    assert read(text).ib == ""


def test_shared_memory_names_the_variable() -> None:
    assert "NCCL_P2P_LEVEL=NVL" in read(SHM).findings[0].title


def test_consequences_never_outrank_the_cause() -> None:
    findings = read(TIMEOUT).findings
    assert [finding.id for finding in findings if finding.root_cause] == ["log.ib-timeout"]
    assert {"log.ib-flush", "log.heartbeat"} <= {finding.id for finding in findings[1:]}
    assert "log.trail" not in {finding.id for finding in findings}
    assert "10.0.0.2" in findings[0].title
    assert findings[0].evidence[0].text.startswith("n1:10:11")


def test_consequence_before_the_cause_in_the_file() -> None:
    late = warn("socketProgress: Connection closed by remote peer n2<41000>") + warn(
        "Cuda failure 2 'out of memory'", "n2"
    )
    assert read(late).findings[0].id == "log.cuda-memory"


def test_time_decides_between_causes() -> None:
    first = "[2026-01-01 10:00:02] n1:1:2 [0] a.cc:1 NCCL WARN Cuda failure 2 'out of memory'\n"
    second = (
        "[2026-01-01 10:00:01] n2:1:2 [0] b.cc:1 NCCL WARN Call to posix_fallocate failed : No space left on device\n"
    )
    assert read(first + second).findings[0].id == "log.shm-small"
    assert read(second + first).findings[0].id == "log.shm-small"


def test_loopback_explains_refused_connections() -> None:
    loopback = info("NET : Using interface lo:127.0.0.1<0>") + info("NET : Using interface eth0:10.0.0.1<0>")
    alone = read(loopback)
    assert (alone.verdict, alone.findings[0].id) == ("warn", "log.loopback")
    findings = read(loopback + warn("Call to connect timeout : Connection refused")).findings
    assert [(f.id, f.root_cause) for f in findings if f.status is Status.FAIL] == [
        ("log.loopback", True),
        ("log.refused", False),
    ]


def _net(suffixes: tuple[str, str], *, nodes: int = 2) -> str:
    send, receive = suffixes
    return (
        info(f"comm 0x5 rank 0 nRanks 2 nNodes {nodes} localRanks 1 localRank 0 MNNVL 0")
        + info(f"Channel 00/0 : 0[0] -> 1[0] [send] via NET/IB/0{send}")
        + info(f"Channel 00/0 : 0[0] -> 1[0] [receive] via NET/IB/1{receive}", "n2")
    )


@pytest.mark.parametrize(
    ("suffixes", "id", "words"),
    [
        (("/GDRDMA", "/GDRDMA"), "log.gdrdma", ""),
        (("", ""), "log.rdma-no-gdr", "receive and send side"),
        (("/GDRDMA", ""), "log.gdr-mixed", "receive side of n2, NIC 1"),
        (("", "/GDRDMA"), "log.gdr-mixed", "send side of n1, NIC 0"),
    ],
)
def test_both_ends_count(suffixes: tuple[str, str], id: str, words: str) -> None:
    finding = read(_net(suffixes)).findings[0]
    assert finding.id == id
    assert words in finding.title


def test_old_gpus_do_not_send_from_their_memory() -> None:
    text = info("Using 256 threads, Min Comp Cap 7, Trees disabled") + _net(("", "/GDRDMA"))
    assert read(text).verdict == "pass"


def test_network_inside_a_host() -> None:
    text = info("Channel 00/0 : 0[0] -> 1[1] [send] via NET/IB/0/GDRDMA") + info(
        "Channel 00/0 : 0[0] -> 1[1] [receive] via NET/IB/0/GDRDMA", pid=12
    )
    assert read(text).findings[0].id == "log.net-in-host"


def test_one_name_for_all_hosts_proves_nothing() -> None:
    text = info("comm 0x5 rank 0 nRanks 4 nNodes 2 localRanks 2 localRank 0 MNNVL 0", "masked")
    for side, pid in (("send", 10), ("receive", 20)):
        text += info(f"Channel 00/0 : 0[0] -> 2[0] [{side}] via NET/IB/0/GDRDMA", "masked", pid)
    assert read(text).findings[0].id == "log.gdrdma"
    assert read(text + info("comm 0x5 rank 3 nRanks 4 nNodes 2 localRanks 2 localRank 1", "n2")).findings[0].id == (
        "log.net-in-host"
    )


def test_unified_memory_loses_nothing() -> None:
    text = "#  Rank  0 Group  0 Pid  59 on  spark1 device  0 [0x01] NVIDIA GB10\n" + _net(("", ""))
    report = read(text)
    assert (report.verdict, report.findings[0].id) == ("pass", "log.rdma-no-gdr")


def test_gdr_switched_off_counts_without_channels() -> None:
    off = info("NET/IB : GPU Direct RDMA Disabled for HCA 0 'mlx5_0'") + "NCCL version 2.20.5+cuda12.4\n"
    finding = read(off).findings[0]
    assert (finding.id, finding.status) == ("log.gdr-off", Status.WARN)
    assert "2.23.4" in finding.remedy
    assert read(off + IB_GDR).verdict == "pass"


def test_hang_is_described() -> None:
    line = (
        "[rank{0}]: [Rank {0}] Watchdog caught collective operation timeout: WorkNCCL(SeqNum={1}, OpType=ALLREDUCE)\n"
    )
    same = read(line.format(0, 7) + line.format(2, 7)).findings[0]
    assert same.id == "log.watchdog"
    assert "ranks 0,2 waited in the same one" in same.title
    assert "different" in read(line.format(0, 7) + line.format(2, 9)).findings[0].title


def test_remedy_names_the_ports_of_the_log() -> None:
    text = info("NET/IB : Using [0]irdma0:1/RoCE [1]irdma3:1/RoCE [RO]; OOB eth0:10.0.0.1<0>")
    remedy = read(text + warn("Call to ibv_modify_qp failed with error Connection timed out")).findings[0].remedy
    assert "irdma0" in remedy
    assert "mlx5" not in remedy


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NCCL version 2.4.8+cuda10.0", "2.4.8+cuda10.0"),
        (info("NCCL version 2.27.3+cuda12.9").strip(), "2.27.3+cuda12.9"),
        (info("RCCL version : 2.26.6-HEAD:f224e2c").strip(), "RCCL 2.26.6"),
        (
            "DistBackendError: NCCL error in: /a.cpp:17, invalid usage (run with NCCL_DEBUG=WARN), NCCL version 2.19.3",
            "2.19.3",
        ),
        ("INFO 01-29 07:44:27 pynccl.py:69] vLLM is using nccl==2.21.5", "2.21.5"),
    ],
)
def test_version(line: str, version: str) -> None:
    assert read(f"{line}\n").nccl_version == version


def test_two_ranks_on_one_gpu_before_nccl_says_so() -> None:
    line = "comm 0x{0} rank {0} nranks 4 cudaDev 0 nvmlDev 0 busId 31000 commId 0x26 - Init START"
    same = read(info(line.format(1)) + info(line.format(3), pid=12))
    assert (same.verdict, same.findings[0].id, same.findings[0].root_cause) == ("fail", "log.dup-gpu", True)
    assert read(info(line.format(1)) + info(line.format(3), "n2")).verdict == "inconclusive"


def test_one_name_for_two_hosts() -> None:
    text = "".join(info(f"Bootstrap : Using eth0:10.0.0.{last}<0>", "localhost", 10 * last) for last in (1, 2))
    assert "log.same-name" in {finding.id for finding in read(text).findings}
    findings = read(text + warn("socketFinalizeAccept: wrong type 4 != 3")).findings
    assert [(finding.id, finding.root_cause) for finding in findings][:2] == [
        ("log.same-name", True), ("log.wrong-peer", False),
    ]  # fmt: skip


def test_interfaces_do_not_matter_on_one_node() -> None:
    one_node = info("comm 0x5 rank 0 nRanks 2 nNodes 1 localRanks 2 localRank 0 MNNVL 0")
    found = read(info("NET/Socket : Using [0]eth0:10.0.0.1<0> [1]tailscale0:100.64.0.1<0>") + one_node + P2P)
    assert found.verdict == "pass"


def test_odd_interfaces() -> None:
    assert (
        read(info("NET/Socket : Using [0]eth0:10.0.0.1<0> [1]docker0:172.17.0.1<0>")).findings[0].id == "log.interfaces"
    )


def test_init_complete_proves_nothing() -> None:
    report = read(INIT_ONLY)
    assert report.verdict == "inconclusive"
    assert "NCCL_DEBUG=INFO" in report.findings[0].remedy


def test_ray_is_asked_for_whole_logs() -> None:
    text = P2P + f"(pid=1) {info('Connected all trees').strip()} [repeated 7x across cluster]\n"
    assert [finding.id for finding in read(text).findings][-1] == "log.folded"


def test_broken_path_is_named() -> None:
    text = info("Channel 00 : 0[0] -> 1[1] via P2P/IPC") + warn("failed to open CUDA IPC handle : 217 peer access")
    assert [path.quality.value for path in read(text).paths] == ["broken"]


@given(st.permutations(range(4)), st.integers(1, 64))
def test_interleaved_ranks_and_block_borders_do_not_matter(order: list[int], block: int) -> None:
    lines = P2P.splitlines(keepends=True)
    shuffled = [lines[0], *(line for rank in order for line in lines[1:] if f":1{rank}:" in line)]
    assert [path for path in read("".join(shuffled)).paths] == list(read(P2P).paths)


def test_topics_are_whole() -> None:
    tables = (topics_transports, topics_network, topics_errors)
    assert sum(len(parse_topics(table.TEXT)) for table in tables) == len(TOPICS)
    for id, topic in TOPICS.items():
        assert id.startswith("log.")
        assert len(topic.meaning) > 20, id
        assert topic.remedy, id


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"])
def test_published_logs(case: dict[str, object]) -> None:
    """What experts read in logs that were published; they lie beside a developer's checkout."""
    report = read((SHARED / str(case["file"])).read_bytes())
    assert report.verdict == case["verdict_from_log"]
    assert list(report.networks) == case["network"]
    expected = {
        (pair["src"], pair["dst"], pair["via"], pair.get("gdr")): (
            pair.get("devs", []),
            sorted(pair.get("sides", [])),
            pair.get("pxn_proxy"),
        )
        for pair in case["rank_pairs"]  # type: ignore[attr-defined]
    }
    assert {(p.src, p.dst, p.via, p.gdr): (list(p.devs), list(p.sides), p.pxn_proxy) for p in report.paths} == expected


def test_features_in_use() -> None:
    text = info("NVLS comm 0x5 headRank 0 nHeads 8 buffSize 4194304 memSize 2097152")
    text += info("Channel 01/0 : 2[1] -> 1[0] [send] via NET/IB/1(3)/GDRDMA")
    text += info("CollNet 00/0 : 3 [send] via COLLNET/SHARP/0/GDRDMA")
    report = read(text)
    assert report.features == ("NVLS", "PXN", "CollNet")
    assert report.paths[0].pxn_proxy == 3
    assert read(info("NVLS multicast support is available on dev 0")).features == ()


def test_evidence_of_a_long_line_shows_the_record() -> None:
    text = "x" * 3000 + " n1:1:2 [0] a.cc:1 NCCL WARN Cuda failure 2 'out of memory'\n"
    assert "NCCL WARN Cuda failure 2" in read(text).findings[0].evidence[0].text
