"""Lines of other hosts: in order where somebody reads, dropped and counted where nobody does, never waited for."""

from __future__ import annotations

import os
import time

import pytest

from aphro_core.executor.host_lines import HostLines


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_lines_arrive_in_order() -> None:
    reader, writer = os.pipe()
    lines = HostLines(writer)
    for number in range(100):
        lines.put(f"line {number} ü")
    await lines.drain(5)
    assert os.read(reader, 1 << 16).decode().splitlines() == [f"line {number} ü" for number in range(100)]
    os.close(reader)
    lines.put("nobody")
    await lines.drain(5)
    os.close(writer)


@pytest.mark.anyio
async def test_a_reader_that_stops_stops_nobody() -> None:
    reader, writer = os.pipe()
    lines = HostLines(writer)
    began = time.monotonic()
    for _ in range(10_000):
        lines.put("x" * 100)
    await lines.drain(0.2)
    assert time.monotonic() - began < 2
    arrived, dropped = _read_all(reader, lines)
    assert arrived > 4000
    assert dropped > 1000
    assert arrived + dropped == 10_000
    os.close(writer)


def _read_all(fd: int, lines: HostLines) -> tuple[int, int]:
    """(whole lines, lines that are said to be missing), up to the one that is put when there is room again."""
    arrived = dropped = 0
    with open(fd, encoding="utf-8") as read:
        while (line := read.readline()) != "last\n":
            arrived += line == "x" * 100 + "\n"
            if line.startswith("("):
                assert line.endswith(" lines of other hosts were dropped: nobody read them)\n")
                dropped += int(line.split()[0].strip("("))
            if arrived == 4000:
                lines.put("last")
    return arrived, dropped
