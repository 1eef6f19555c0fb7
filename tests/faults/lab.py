"""Where faults are made: a tiny model, servers with faults in them, their processes, and a history of their health."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.server_process import ServerProcess, command, descendants_of, is_running

HOOKS = Path(__file__).parent / "hooks"
SMALL = ("--skip-tokenizer-init", "--dtype", "float32", "--max-model-len", "1024", "--num-gpu-blocks-override", "512")
# prompts that meet a fault in every step of theirs; no ordinary prompt of load.py has these tokens
RAISE, MEMORY, NAN, EXIT, HANG, SLOW = range(125, 131)
MEMORY_OF_ONE = 4
FAULTS = (
    f"{RAISE}=raise,{MEMORY}=memory,{NAN}=nan,{EXIT}=exit,{HANG}=hang,{SLOW}=sleep0.2,{MEMORY_OF_ONE}=memory-of-one"
)


def write_model(folder: Path, **sizes: int) -> Path:
    from tests.tiny import write_tiny_checkpoint

    write_tiny_checkpoint(folder / "tiny-llama", "llama", max_position_embeddings=1024, **sizes)
    return folder / "tiny-llama"


class FaultyServer(ServerProcess):
    def pid_of(self, name: str) -> int:
        """Of ``aphro-api``, ``aphro-engine``, ``aphro-rank-0`` ...: the one that runs now."""
        deadline = time.monotonic() + 10
        while True:
            for pid in descendants_of(self.process.pid):
                if _comm(pid) == name and is_running(pid):
                    return pid
            assert time.monotonic() < deadline, f"no process {name}"
            time.sleep(0.005)

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> float:
        """Signal a process of the tree; the moment in which it was."""
        pid = self.pid_of(name)
        os.kill(pid, number)
        return time.monotonic()

    def all_processes(self) -> list[int]:
        return [self.process.pid, *descendants_of(self.process.pid)]

    def metric(self, name: str) -> float:
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith(f"aphro:{name}{{"):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {name}")

    def rss_bytes(self) -> int:
        return int(Path(f"/proc/{self.pid_of('aphro-api')}/statm").read_text().split()[1]) * 4096


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@dataclass
class Lab:
    """One model, many servers."""

    model: Path
    folder: Path
    starts: int = field(default=0)
    device: str = "cpu"

    @contextmanager
    def server(
        self,
        *arguments: str,
        faults: str = "",
        seconds: float = 60.0,
        small: bool = True,
        prefix: tuple[str, ...] = (),
    ) -> Iterator[FaultyServer]:
        """``prefix``: a command that executes the server's."""
        self.starts += 1
        ready, log = self.folder / f"ready{self.starts}.json", self.folder / f"server{self.starts}.log"
        process = self.start([*(SMALL if small else ()), *arguments], log, ready, faults, prefix)
        deadline = time.monotonic() + seconds
        while not ready.exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        server = FaultyServer(process, log, json.loads(ready.read_text()))
        try:
            yield server
        finally:
            end_all(server)

    def start(
        self, arguments: list[str], log: Path, ready: Path, faults: str = "", prefix: tuple[str, ...] = ()
    ) -> subprocess.Popen[bytes]:
        """A server that may never be ready."""
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        if faults:
            environment |= {"FAULTS": faults, "PYTHONPATH": f"{HOOKS}:{os.environ.get('PYTHONPATH', '')}"}
        with log.open("wb") as out:
            line = command(self.model, ["--port", "0", "--json-ready", str(ready), *arguments], self.device)
            return subprocess.Popen([*prefix, *line], stdout=out, stderr=out, env=environment)


def end_all(server: ServerProcess) -> None:
    for pid in [server.process.pid, *server.descendants]:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)
    server.process.wait(10)
    deadline = time.monotonic() + 5
    while any(is_running(pid) for pid in server.descendants) and time.monotonic() < deadline:
        time.sleep(0.01)


@contextmanager
def open_lab() -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="aphro-faults-") as name:
        folder = Path(name)
        yield Lab(write_model(folder), folder)


class Probe:
    """Asks ``/readyz`` all the time: (when, status, seconds it took)."""

    def __init__(self, url: str) -> None:
        self.history: list[tuple[float, int, float]] = []
        self._url = url
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Probe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(10)

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=5) as client:
            while not self._stopping.wait(0.02):
                began = time.monotonic()
                try:
                    status = client.get("/readyz").status_code
                except httpx.HTTPError:
                    status = 0
                self.history.append((began, status, time.monotonic() - began))

    def first(self, status: int, after: float) -> float:
        """Seconds after ``after`` until it first said so; infinity if never."""
        times = (when - after for when, found, _ in self.history if when >= after and found == status)
        return next(times, float("inf"))

    def slowest(self, after: float = 0.0) -> float:
        return max((took for when, _, took in self.history if when >= after), default=0.0)


def complete(url: str, prompt: list[int], max_tokens: int = 8, **more: Any) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **more}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)
