"""What runs on each node as a Ray actor: says what is there, starts ranks, says how they ended. Ranks end with it."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Final

import msgspec

from aphro_core import host
from aphro_core.checkpoint.digests import DigestProgress, digest_files
from aphro_core.checkpoint.model_files import model_files
from aphro_core.cluster.membership import read_membership
from aphro_core.environment import host_specific
from aphro_core.executor.ray.admission import NotAdmittedError, join
from aphro_core.executor.ray.protocol import AgentReport, RankEnded, RankStart
from aphro_core.worker.host_report import report_host

_TAIL_BYTES: Final = 4000
_SAY_SECONDS: Final = 0.5
# Ray's own, among it the token; and OMP_NUM_THREADS, which Ray sets to its idea of this actor's share
_NOT_FOR_RANKS: Final = ("RAY_", "OMP_NUM_THREADS")


class Agent:
    """An async actor: its methods run on one thread that lives as long as it does, and its children die with that.

    What crosses Ray is bytes of our own messages.
    """

    def __init__(self) -> None:
        self._ranks: dict[int, asyncio.subprocess.Process] = {}

    async def report(self, model_path: str) -> bytes:
        membership = read_membership()
        report = AgentReport(
            report_host(model_path),
            host_specific(os.environ) | (membership.environment if membership else {}),
            membership.log_dir if membership else "",
        )
        return msgspec.json.encode(report)

    async def digest_files(self, model_path: str) -> AsyncIterator[bytes]:
        """How far it is, and in the end the digests."""
        done = (0, 0)

        def note(done_bytes: int, total_bytes: int) -> None:
            nonlocal done
            done = (done_bytes, total_bytes)

        task = asyncio.create_task(asyncio.to_thread(digest_files, model_files(Path(model_path)), note))
        while not (await asyncio.wait([task], timeout=_SAY_SECONDS))[0]:
            yield msgspec.json.encode(DigestProgress(*done))
        yield msgspec.json.encode(DigestProgress(*done, task.result()))

    async def run_rank(self, encoded: bytes) -> bytes:
        """From its start to its end."""
        start = msgspec.json.decode(encoded, type=RankStart)
        secret = bytes.fromhex(start.secret)
        try:
            joined = await asyncio.to_thread(join, start.address, start.port, start.rank, secret)
        except (OSError, NotAdmittedError) as error:
            where = f"{socket.gethostname()} cannot connect to the engine at {start.address}:{start.port}"
            return msgspec.json.encode(RankEnded(start.rank, 1, f"{where}: {error}"))
        num_oom_kills = host.num_oom_kills()
        with joined, tempfile.TemporaryFile() as stderr:
            process = await self._start(joined, stderr)
            joined.close()  # the rank alone holds it: it closes when the rank ends
            self._ranks[start.rank] = process
            exit_code = await process.wait()
            del self._ranks[start.rank]
            was_short = host.num_oom_kills() > num_oom_kills
            return msgspec.json.encode(RankEnded(start.rank, exit_code, _tail(stderr), was_short))

    async def kill_rank(self, rank: int) -> None:
        if rank in self._ranks:
            self._ranks[rank].kill()

    async def _start(self, joined: socket.socket, stderr: IO[bytes]) -> asyncio.subprocess.Process:
        """The worker that ssh starts, too: its frames go by what is its standard input and output."""
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "aphro_core.worker.remote_entry", str(os.getpid())),
            stdin=joined.fileno(),
            stdout=joined.fileno(),
            stderr=stderr,
            env={name: value for name, value in os.environ.items() if not name.startswith(_NOT_FOR_RANKS)},
            start_new_session=True,
        )


def _tail(file: IO[bytes]) -> str:
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode(errors="replace").strip()
