"""Several devices on this host: one process a rank, forked from a warm server that has torch imported."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio.to_thread

from aphro_core.channel import Channel
from aphro_core.config import EngineConfig
from aphro_core.executor.group import GroupExecutor, running
from aphro_core.executor.rank import Launched
from aphro_core.host import available_memory_bytes
from aphro_core.messages import codec
from aphro_core.messages.steps import FromWorker, StartWorker, ToWorker, WorkerProgress
from aphro_core.spawn import Spawner


@asynccontextmanager
async def open_multiprocess(
    config: EngineConfig, spawner: Spawner | None, on_progress: Callable[[WorkerProgress], None]
) -> AsyncIterator[GroupExecutor]:
    """Start one process a rank on this host and load the weights. Nothing of it is left when the block is left."""
    assert spawner is not None, "ranks are processes of their own"
    memory_bytes = int(available_memory_bytes() * config.cache.cpu_memory_utilization / config.parallel.world_size)
    # ranks meet in a file that has no name: nothing to clean up, and no other user can open it
    store_fd = os.memfd_create("aphro-store")
    store = f"/proc/{os.getpid()}/fd/{store_fd}"

    async def launch(rank: int) -> Launched:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await anyio.to_thread.run_sync(spawner.fork, "worker", f"aphro-rank-{rank}", theirs)
        channel = await Channel[ToWorker, FromWorker].over(ours, codec.engine_side_of_worker())
        start = StartWorker(
            config=config,
            rank=rank,
            local_rank=rank,
            store=store,
            memory_bytes=memory_bytes,
            num_ranks_here=config.parallel.world_size,
        )
        return Launched(process, channel, start)

    try:
        async with running(GroupExecutor(config, launch, on_progress)) as executor:
            yield executor
    finally:
        os.close(store_fd)
