"""``--verify full``: every byte of every host's model files is compared before anything loads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from aphro_core.checkpoint.digests import digest_files
from aphro_core.checkpoint.model_files import model_files
from aphro_core.executor.host_checks import check_digests
from aphro_core.messages.steps import WorkerProgress

PHASE: Final = "comparing model files"
Say = Callable[[int, int], None]  # bytes done, in all


@dataclass(frozen=True)
class OtherHost:
    """A host that has files of its own: its first rank, and what asks it for SHA-256 by file name."""

    name: str
    rank: int
    digest: Callable[[Say], Awaitable[dict[str, str]]]


async def verify_full(hosts: Sequence[OtherHost], path: str, on_progress: Callable[[WorkerProgress], None]) -> None:
    """All hosts at once; progress under each one's first rank. Raises ModelError that names host and file."""
    if not hosts:
        return
    found: dict[str, dict[str, str]] = {}

    async def ask(host: OtherHost) -> None:
        def say(done: int, total: int) -> None:
            on_progress(WorkerProgress(host.rank, PHASE, done, total))

        found[host.name] = await host.digest(say)
        say(1, 1)

    async with anyio.create_task_group() as tasks:
        for host in hosts:
            tasks.start_soon(ask, host)
        ours = await anyio.to_thread.run_sync(digest_files, model_files(Path(path)), lambda *_: None)
    for name, theirs in found.items():
        check_digests(name, path, theirs, ours)
