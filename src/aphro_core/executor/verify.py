"""``--verify full``: every byte of every host's model files is compared before anything loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec

from aphro_core.checkpoint.digests import DigestProgress, digest_files
from aphro_core.checkpoint.model_files import model_files
from aphro_core.errors import ModelError
from aphro_core.executor.host_checks import check_digests
from aphro_core.executor.nodes import Node, Nodes
from aphro_core.messages.steps import WorkerProgress
from aphro_core.remote.local import LocalHost

PHASE = "comparing model files"


async def verify_full(nodes: Nodes, path: str, on_progress: Callable[[WorkerProgress], None]) -> None:
    """All hosts at once; progress under each one's first rank. Hosts that fetch the model have nothing to compare.

    Raises ModelError that names host and file.
    """
    found: dict[str, dict[str, str]] = {}

    async def ask(index: int, node: Node) -> None:
        rank = next(rank for rank, place in enumerate(nodes.places) if place.host == index)

        def say(done: int, total: int) -> None:
            on_progress(WorkerProgress(rank, PHASE, done, total))

        found[node.slots.name] = await _digests_of(node, path, say)
        say(1, 1)

    others = {
        index: node for index, node in nodes.by_index.items() if not (node.fetches or isinstance(node.host, LocalHost))
    }
    if not others:
        return
    async with anyio.create_task_group() as tasks:
        for index, node in others.items():
            tasks.start_soon(ask, index, node)
        ours = await anyio.to_thread.run_sync(digest_files, model_files(Path(path)), lambda *_: None)
    for name, theirs in found.items():
        check_digests(name, path, theirs, ours)


async def _digests_of(node: Node, path: str, say: Callable[[int, int], None]) -> dict[str, str]:
    async with node.host.start(node.host.python, "-m", "aphro_core.checkpoint.digests", path) as process:
        while (line := await process.receive_line()) is not None:
            try:
                progress = msgspec.json.decode(line, type=DigestProgress)
            except msgspec.MsgspecError:
                continue  # a login script that speaks
            if progress.digests is not None:
                return progress.digests
            say(progress.done_bytes, progress.total_bytes)
        raise ModelError(
            f"{node.slots.name} could not read {path}: {process.stderr_tail or 'its process ended'}",
            hint=f"read it there: sha256sum {path}",
        )
