"""Start ``aphro run`` as an operator does, find everything it started, and see whether anything is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class ServerProcess:
    def __init__(self, process: subprocess.Popen[bytes], log: Path, record: dict[str, Any]) -> None:
        self.process = process
        self.log = log
        self.record = record
        self.url: str = record["url"]
        self.descendants = descendants_of(process.pid)

    def wait_all_gone(self, seconds: float) -> None:
        """Every process that the server ever had has ended."""
        deadline = time.monotonic() + seconds
        while alive := [pid for pid in [self.process.pid, *self.descendants] if is_running(pid)]:
            self.process.poll()
            assert time.monotonic() < deadline, f"still running: {[(pid, command_of(pid)) for pid in alive]}"
            time.sleep(0.02)

    def port_is_free(self) -> bool:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", int(self.url.rsplit(":", 1)[1])))
            except OSError:
                return False
        return True


def command(model: Path, arguments: Sequence[str], device: str = "cpu") -> list[str]:
    return [sys.executable, "-m", "aphro_cli.main", "run", str(model), "--device", device, *arguments]


@contextmanager
def running_server(
    folder: Path, model: Path, *arguments: str, seconds: float = 90.0, device: str = "cpu"
) -> Iterator[ServerProcess]:
    """A ready server on a free port; killed with all its children when the block is left."""
    ready, log = folder / "ready.json", folder / "server.log"
    ready.unlink(missing_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command(model, ["--port", "0", "--json-ready", str(ready), *arguments], device), stdout=out, stderr=out
        )
    deadline = time.monotonic() + seconds
    while not ready.exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    server = ServerProcess(process, log, json.loads(ready.read_text()))
    try:
        yield server
    finally:
        for pid in [process.pid, *server.descendants]:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait(10)


def descendants_of(pid: int) -> list[int]:
    children: dict[str, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rsplit(")", 1)[1].split()[1]
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(str(pid), ()))
    for each in found:  # which grows meanwhile
        found += children.get(str(each), ())
    return found


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""
