"""The ranks of a group for programs that drive it without an engine: rank 0 here, each other one in its own process."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from aphro_core.channel import BlockingChannel
from aphro_core.config import EngineConfig
from aphro_core.engine.entry import fit_cache
from aphro_core.messages import codec
from aphro_core.messages.steps import (
    AllocateCache,
    FromWorker,
    StartWorker,
    StepPlan,
    StopWorker,
    ToWorker,
    WorkerFailed,
    WorkerLoaded,
    WorkerProgress,
    WorkerReady,
)
from aphro_core.worker import entry
from aphro_core.worker.step import LaunchedStep
from aphro_core.worker.worker import Worker

_Channel = BlockingChannel[ToWorker, FromWorker]


class Ranks:
    """Called as a :class:`Worker` is; tensor parallel on GPUs, so that rank 0 alone answers."""

    def __init__(self, config: EngineConfig, store: str, others: list[_Channel]) -> None:
        self.worker = Worker(StartWorker(config, 0, 0, store, 0), lambda progress: None)
        self._config, self._store, self._others = config, store, others
        self.loaded: list[WorkerLoaded] = []

    def load(self) -> None:
        for rank, channel in enumerate(self._others, 1):
            channel.send(StartWorker(self._config, rank, rank, self._store, 0))
        self.loaded = [self.worker.load()]
        for channel in self._others:
            loaded = _answer(channel)
            assert isinstance(loaded, WorkerLoaded)
            self.loaded.append(loaded)

    def allocate(self, num_blocks: int | None = None) -> tuple[int, int]:
        """As many blocks as fit unless somebody says; their number, and the longest sequence's tokens."""
        fitting, max_model_len = fit_cache(self._config, self.loaded)
        num_blocks = num_blocks or fitting
        for channel in self._others:
            channel.send(AllocateCache(num_blocks))
        self.worker.allocate(num_blocks)
        for channel in self._others:
            assert isinstance(_answer(channel), WorkerReady)
        return num_blocks, max_model_len

    def launch(self, plan: StepPlan) -> LaunchedStep | None:
        for channel in self._others:
            channel.send(plan)
        return self.worker.launch(plan)

    def stop(self) -> None:
        for channel in self._others:
            channel.send(StopWorker())


def _answer(channel: _Channel) -> FromWorker:
    while isinstance(answer := channel.receive(), WorkerProgress):
        pass
    if isinstance(answer, WorkerFailed):
        raise RuntimeError(f"rank {answer.rank}: {answer.message}\n{answer.traceback}")
    return answer


@contextmanager
def open_ranks(config: EngineConfig) -> Iterator[Ranks]:
    """All of them started, nothing loaded. They end with this process, too."""
    store_fd = os.memfd_create("aphro-store")  # open to the end: the group looks for it when it is dropped
    channels, processes = [], []
    context = multiprocessing.get_context("spawn")
    for _ in range(1, config.parallel.world_size):
        ours, theirs = socket.socketpair()
        processes.append(context.Process(target=entry.main, args=(theirs,), daemon=True))
        processes[-1].start()
        theirs.close()
        channels.append(_Channel(ours, codec.engine_side_of_worker()))
    ranks = Ranks(config, f"/proc/{os.getpid()}/fd/{store_fd}", channels)
    try:
        yield ranks
        ranks.stop()
    finally:
        ranks.worker.close()
        for process in processes:
            process.join(timeout=10)
            process.kill()
