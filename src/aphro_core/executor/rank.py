"""One rank as its engine holds it: the process, however it was launched, and the channel to it."""

from __future__ import annotations

import math
import signal
import socket
import time
from dataclasses import dataclass
from typing import Protocol

from aphro_core.channel import Channel
from aphro_core.messages.steps import FromWorker, StartWorker, ToWorker, WorkerFailed, WorkerLoaded


class Process(Protocol):
    """A started worker as its launcher knows it; ``exit_code`` is negative after a signal, None while it runs.

    ``is_lost``: its host, or the way there, is gone. ``was_short``: another host has killed for want of memory.
    """

    @property
    def pid(self) -> int: ...

    @property
    def is_lost(self) -> bool: ...

    @property
    def was_short(self) -> bool: ...

    @property
    def exit_code(self) -> int | None: ...

    def poll(self) -> bool:
        """Whether it has ended."""

    async def wait(self) -> None: ...

    def send_signal(self, number: signal.Signals) -> None: ...

    def describe_end(self) -> str: ...

    def close(self) -> None: ...


WorkerChannel = Channel[ToWorker, FromWorker]


@dataclass(frozen=True)
class Launched:
    """A process that waits for its StartWorker. ``host`` is "" for this one."""

    process: Process
    channel: WorkerChannel
    start: StartWorker
    host: str = ""


class WorkerHandle:
    """One rank: its process and the engine's end of its channel."""

    def __init__(self, launched: Launched) -> None:
        self.rank = launched.start.rank
        self.process = launched.process
        self.channel = launched.channel
        self.host = launched.host or socket.gethostname()
        self.is_remote = bool(launched.host)
        self.loaded: WorkerLoaded | None = None
        self.failed: WorkerFailed | None = None
        self.heard_at = time.monotonic()
        self.has_come = False  # to where the ranks meet
        self.is_ready = False
        self.is_gone = False
        self.gone_at = math.inf
