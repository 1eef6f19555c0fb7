"""Whatever a log is made of: the scan ends, keeps little, and claims no rank that does not stand there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aphro_core.doctor.nccl_log import facts
from aphro_core.doctor.nccl_log.facts import LogFacts
from aphro_core.doctor.nccl_log.scan import Scan, _Way
from aphro_core.doctor.nccl_log.verdict import judge
from tests.core.doctor.logs import LOGS, read, scan

WHOLE = "".join(LOGS.values()).encode()
PIECES = [line.encode() for text in LOGS.values() for line in text.splitlines()]
PREFIXES = [
    b"",
    b"(RayWorkerWrapper pid=1, ip=10.0.0.2) ",
    b"[rank0]: ",
    b"\x1b[36m",
    b"2026-01-01T00:00:00.1Z ",
    b"[1,0]<stdout>:",
]


OUTSIDE_WORLD = {"torch", "anyio", "os", "sys", "socket", "subprocess", "threading", "time", "pathlib", "gzip"}


def test_reading_a_log_touches_nothing_else() -> None:
    folder = Path(facts.__file__).parent
    for path in folder.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        assert not {module.split(".")[0] for module in modules} & OUTSIDE_WORLD, path
        ours = [module for module in modules if module.startswith("aphro")]
        assert all(module.startswith(("aphro_core.doctor.nccl_log", "aphro_core.doctor.finding")) for module in ours)


def check(data: bytes) -> None:
    report = read(data)
    assert report.verdict in {"pass", "warn", "fail", "inconclusive"}
    pairs = {(int(a), int(b)) for a, b in re.findall(rb"(\d+)(?:\[[^\]\s]*\])? -> (\d+)", data)}
    assert all((path.src, path.dst) in pairs or path.dst == -1 for path in report.paths)
    assert all(1 <= line.line <= data.count(b"\n") + 1 for finding in report.findings for line in finding.evidence)


@given(st.binary(max_size=2000))
def test_random_bytes(data: bytes) -> None:
    check(data)


@given(
    st.lists(
        st.sampled_from([*PIECES, b"NCCL INFO ", b" -> ", b" via ", b"NET/", b"\n", b"\r", b"[", b":1:2 [0] "]),
        max_size=60,
    )
)
def test_pieces_in_any_order(pieces: list[bytes]) -> None:
    check(b"".join(pieces))


@given(st.integers(0, len(WHOLE)), st.integers(0, len(WHOLE)))
def test_truncated_anywhere(start: int, stop: int) -> None:
    check(WHOLE[start:stop])


@given(st.lists(st.tuples(st.sampled_from(PREFIXES), st.sampled_from(PIECES), st.integers(0, 200)), max_size=30))
def test_cut_and_interleaved_lines(lines: list[tuple[bytes, bytes, int]]) -> None:
    check(b"\n".join(prefix + piece[:length] for prefix, piece, length in lines))


CHANNELS = b"".join(
    b"%sn1:1%d:2 [0] NCCL INFO Channel %02d/0 : %d[0] -> %d[0] [send] via NET/IB/%d/GDRDMA\n"
    % (stamp, rank, channel, rank, rank + 1, rank % 2)
    for stamp in (b"", b"2026-01-01T00:00:00.1Z ")
    for rank in range(4)
    for channel in range(16)
)


@pytest.mark.parametrize("way", list(_Way))
@pytest.mark.parametrize("block_bytes", [700, 1 << 20])
def test_every_way_of_reading_finds_the_same(way: _Way, block_bytes: int) -> None:
    data = b"a line like no other\n".join([WHOLE, CHANNELS, WHOLE.replace(b"\n", b"\r\n"), CHANNELS])
    found = LogFacts()
    reader = Scan(found)

    def blocks() -> Iterator[bytes]:
        for at in range(0, len(data), block_bytes):
            reader._way = way
            yield data[at : at + block_bytes]

    reader.read_file("log", blocks())
    expected = scan(data)
    assert judge(found) == judge(expected)
    assert (found.num_lines, found.num_torn, found.num_folded) == (
        expected.num_lines,
        expected.num_torn,
        expected.num_folded,
    )
    counts = {key: (pair.count, pair.first.line) for key, pair in found.pairs.items()}
    assert counts == {key: (pair.count, pair.first.line) for key, pair in expected.pairs.items()}
    assert found.num_records == expected.num_records


@settings(max_examples=30)
@given(st.integers(1, 300))
def test_block_size_does_not_matter(block_bytes: int) -> None:
    assert judge(scan(WHOLE, block_bytes=block_bytes)) == judge(scan(WHOLE))


@given(st.binary(max_size=300), st.integers(0, len(WHOLE)))
def test_foreign_bytes_inside(junk: bytes, at: int) -> None:
    check(WHOLE[:at] + junk + WHOLE[at:])


def test_memory_does_not_grow_with_the_log() -> None:
    seen = scan(
        b"".join(b"n%d:%d:1 [0] NCCL INFO NCCL_X%d set by environment to %d\n" % (i, i, i, i) for i in range(20_000))
    )
    assert len(seen.notes["env"]) <= 256
    assert all(len(note.hosts) <= 64 for notes in seen.notes.values() for note in notes.values())


def test_a_file_without_line_breaks() -> None:
    check(b"n1:1:2 [0] NCCL INFO x " * 100_000)
