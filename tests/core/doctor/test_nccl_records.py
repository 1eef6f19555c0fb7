"""A record is found whatever stands before and behind it."""

from __future__ import annotations

import pytest

from aphro_core.doctor.nccl_log.records import Record, read_bare, read_records

TEXT = "Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM"
RECORD = f"gpu-7:31:44 [3] NCCL INFO {TEXT}"


@pytest.mark.parametrize(
    "line",
    [
        RECORD,
        f"(RayWorkerWrapper pid=935, ip=10.0.0.2) {RECORD}",
        f"(EngineCore_DP0 pid=750) (RayWorkerWrapper pid=935) {RECORD} [repeated 6x across cluster] (Ray deduplicates",
        f"\x1b[36m(RayWorkerVllm pid=5119)\x1b[0m {RECORD}\x1b[32m [repeated 4x across cluster]\x1b[0m",
        f"ESC[36m(RayWorkerVllm pid=5119)ESC[0m {RECORD}",
        f" [36m(RayWorkerVllm pid=5119) [0m {RECORD}",
        f"[rank0]: {RECORD}",
        f"[rank3]:{RECORD}",
        f"[trainer3]:{RECORD}",
        f"[1,3]<stdout>:{RECORD}",
        f"[0]<stderr>:{RECORD}",
        f"Fri Aug 11 12:31:45 2023[1,0]<stdout>:{RECORD}",
        f"2024-12-04T05:27:44.078Z {RECORD}",
        f"2024-12-04T05:27:44.078123456+00:00 stdout F {RECORD}",
        f"Dec 04 05:27:44 host7 docker[31]: {RECORD}",
        f"24/05/06 12:00:00 INFO Executor: {RECORD}",
        f"10.0.0.5: 10.0.0.5: {RECORD}",
        f"451 {RECORD}",
        f"0: {RECORD}",
        f"[0] {RECORD}",
        f"pod/worker-0/main {RECORD}",
        f"{RECORD}\r",
        f"{RECORD}   ",
        f"{RECORD}```",
        f'{{"log":"{RECORD}\\n","stream":"stderr","time":"2024-01-01T00:00:00.1Z"}}',
        f'{{"log":"{RECORD}\\n","stream":"stdout"}}'.replace(">", "\\u003e"),
    ],
)
def test_foreign_text_is_left_out(line: str) -> None:
    (record,) = read_records(line)
    assert (record.host, record.pid, record.level, record.text) == ("gpu-7", "31", "INFO", TEXT)


@pytest.mark.parametrize(
    ("line", "host", "where", "time"),
    [
        ("n1:3:4 [0] misc/socket.cc:441 NCCL WARN bad", "n1", "misc/socket.cc:441", ""),
        ("[2026-04-22 21:34:20] n1:3:4 [0] misc/shmutils.cc:88 NCCL WARN bad", "n1", "misc/shmutils.cc:88",
         "2026-04-22 21:34:20"),
        ("n1:3:4 [0] misc/socket.cc:441 (socketFinalizeAccept) NCCL WARN bad", "n1",
         "misc/socket.cc:441 (socketFinalizeAccept)", ""),
        ("[2026-01-01 12:08:32] n1:3:4 [0] int create(nccl_net_ofi_plugin_t**, uint16_t):208 NCCL WARN bad", "n1",
         "int create(nccl_net_ofi_plugin_t**, uint16_t):208", "2026-01-01 12:08:32"),
        ("2026-01-01 12:31:45 [0] n1:3:4 [3] file.cc:9 NCCL WARN bad", "n1", "file.cc:9", "2026-01-01 12:31:45"),
        ("n1:3:4 [0] /a b/build/rccl/src/init.cc:140 NCCL WARN bad", "n1", "/a b/build/rccl/src/init.cc:140", ""),
        ("misc/socket.cc:441 NCCL WARN bad", "", "misc/socket.cc:441", ""),
        ("[0] misc/socket.cc:441 NCCL WARN bad", "", "misc/socket.cc:441", ""),
        ("NCCL WARN bad", "", "", ""),
        ("n1:3:4 [0] graph/topo.cc:12 WARN bad", "n1", "graph/topo.cc:12", ""),
    ],
)  # fmt: skip
def test_warnings(line: str, host: str, where: str, time: str) -> None:
    (record,) = read_records(line)
    assert record == Record("bad", "WARN", host, record.pid, where, time)


@pytest.mark.parametrize(
    ("line", "host"),
    [
        ("[pod-name]:5310:5310 [7] NCCL INFO x", "pod-name"),
        ("<cluster_name>:1:2 [0] NCCL INFO x", "cluster_name"),
        ("[Node-A]:[PID]:[Thread] [0] NCCL INFO x", "Node-A"),
        ("pod-id:num:num [0] NCCL INFO x", "pod-id"),
        (":22901:22901 [0] NCCL INFO x", ""),
        (" [0] NCCL INFO x", ""),
        ("NCCL INFO x", ""),
        ("n1:1:2 NCCL CALL x", "n1"),
        ("n1:1:2 [0] 123.456 ncclFoo:44 NCCL TRACE x", "n1"),
        ("n1:1:2 [0] INFO x", "n1"),
    ],
)
def test_masked_and_old_heads(line: str, host: str) -> None:
    (record,) = read_records(line)
    assert (record.host, record.text) == (host, "x")


def test_records_on_one_line() -> None:
    first, second, third = read_records(
        "x n1:1:2 [0] NCCL INFO a b     n2:3:4 [1] NCCL INFO c n3:5:6 [0] f.cc:1 NCCL WARN d"
    )
    assert [(r.host, r.level, r.text) for r in (first, second, third)] == [
        ("n1", "INFO", "a b"), ("n2", "INFO", "c"), ("n3", "WARN", "d"),
    ]  # fmt: skip


def test_a_log_quoted_as_one_string() -> None:
    line = '{"message": "n1:1:2 [0] NCCL INFO a\\nn2:3:4 [1] NCCL INFO b\\n", "x": 1}'
    assert [(record.host, record.text) for record in read_records(line)] == [("n1", "a"), ("n2", "b")]


def test_ray_counts_what_it_left_out() -> None:
    (record,) = read_records(f"(pid=1) {RECORD} [repeated 6x across cluster]")
    assert record.num_folded == 5


@pytest.mark.parametrize(
    "line", ["", "NCCL IINFO x", "INFO 11-12 hello", "vLLM is using nccl==2.21.5", "NCCL version 2.4"]
)
def test_no_record(line: str) -> None:
    assert read_records(line) == []


def test_bare_text_has_no_level() -> None:
    assert read_bare("  \x1b[31mDuplicate GPU detected\x1b[0m ") == Record("Duplicate GPU detected")


@pytest.mark.parametrize("junk", ["x" * 100_000, " " * 100_000, "a:1:2 [0] " * 10_000, "[" * 50_000, "-> " * 30_000])
def test_long_lines_take_no_time(junk: str) -> None:
    assert len(read_records(f"{junk} NCCL INFO y")) <= 1
    read_records(f"n1:1:2 [0] NCCL INFO {junk}")
    read_records(junk)
