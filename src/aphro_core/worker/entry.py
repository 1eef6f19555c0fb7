"""The one door into a worker process, whoever launched it: take StartWorker, serve plans, report why it ended."""

from __future__ import annotations

import faulthandler
import os
import socket
import traceback
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

from aphro_core.channel import BlockingChannel, ChannelClosedError
from aphro_core.errors import AphroError, ExitCode
from aphro_core.lifeline import STACKS_SIGNAL, exit_on_hangup
from aphro_core.messages import codec
from aphro_core.messages.steps import (
    AllocateCache,
    FromWorker,
    StartWorker,
    StepPlan,
    StopWorker,
    ToWorker,
    WorkerFailed,
    WorkerReady,
)
from aphro_core.worker.step_failure import is_echo

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

    from aphro_core.worker.fetched_model import Fetch


class WorkerChannel(Protocol):
    def send(self, message: FromWorker) -> None: ...

    def receive(self) -> ToWorker: ...


def main(sock: socket.socket) -> int:
    """Serve the engine at the other end of ``sock`` until it says stop or is gone. Returns the exit code.

    The caller ends the process with it at once: the teardown of process groups would wait for peers that end, too.
    """
    faulthandler.register(STACKS_SIGNAL, all_threads=True)  # what it does when it hangs, in a collective too
    channel = BlockingChannel[FromWorker, ToWorker](sock, codec.worker_side())
    exit_on_hangup(channel.fileno(), grace_seconds=0.5)
    return run(channel, serve)


def run(channel: WorkerChannel, serve: Callable[[WorkerChannel, StartWorker], None]) -> int:
    """Take StartWorker, ``serve``, and report why it ended. Returns the exit code."""
    rank = -1
    try:
        start = channel.receive()
        assert isinstance(start, StartWorker)
        rank = start.rank
        serve(channel, start)
    except ChannelClosedError:
        return 1  # the engine is gone: no peer to say goodbye to, and collectives would only wait
    except BaseException as error:
        _report(channel, rank, error)
        return int(ExitCode.ENGINE)
    return 0


def serve(
    channel: WorkerChannel,
    start: StartWorker,
    open_store: Callable[[], Store] | None = None,
    fetch: Fetch | None = None,
) -> None:
    """``open_store`` and ``fetch``: for ranks on other hosts, where they meet and where a model comes from."""
    from aphro_core.worker.results import Results, freeze_heap
    from aphro_core.worker.worker import Worker

    worker = Worker(start, channel.send, open_store, fetch)
    channel.send(worker.load())
    with Results(channel.send, partial(_fail, channel, start.rank), worker.enter_thread) as results:
        while True:
            match channel.receive():
                case StepPlan() as plan:
                    step = worker.launch(plan)
                    if step is not None:
                        results.put(step)
                    worker.settle()
                case AllocateCache(num_blocks=num_blocks):
                    worker.allocate(num_blocks)
                    channel.send(WorkerReady(rank=start.rank))
                    freeze_heap()
                case StopWorker():
                    return
                case unexpected:
                    raise ValueError(f"{type(unexpected).__name__} has no place here")


def _fail(channel: WorkerChannel, rank: int, error: BaseException) -> None:
    _report(channel, rank, error)
    os._exit(int(ExitCode.ENGINE))  # the main thread waits for a plan or in a collective


def _report(channel: WorkerChannel, rank: int, error: BaseException) -> None:
    known = error if isinstance(error, AphroError) else None
    failed = WorkerFailed(
        rank=rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        message=known.message if known else f"{type(error).__name__}: {error}",
        hint=known.hint if known else None,
        exit_code=int(known.exit_code if known else ExitCode.ENGINE),
        traceback="" if known else "".join(traceback.format_exception(error)),
        secondary=is_echo(error),
    )
    try:
        channel.send(failed)
    except ChannelClosedError:
        traceback.print_exception(error)
