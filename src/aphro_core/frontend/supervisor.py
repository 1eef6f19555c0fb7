"""Starts the engine process, hands its messages on, and knows when and why it died."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import anyio
import anyio.abc

from aphro_core import host
from aphro_core.channel import Channel, ChannelClosedError
from aphro_core.config import EngineConfig
from aphro_core.errors import AphroError, EngineDeadError, ExitCode
from aphro_core.messages import codec
from aphro_core.messages.requests import EngineFailed, FromEngine, StartEngine, StopEngine, ToEngine

_STOP_SECONDS: Final = 5.0  # for the engine to end its workers and itself before it is killed


class EngineProcess:
    """The running engine: send it messages; ``failure`` says why it died once ``dead`` is set."""

    def __init__(self, process: anyio.abc.Process, channel: Channel[ToEngine, FromEngine]) -> None:
        self.dead = anyio.Event()
        self.failure: AphroError | None = None
        self._process = process
        self._channel = channel

    @property
    def pid(self) -> int:
        return self._process.pid

    async def send(self, message: ToEngine) -> None:
        """Raises EngineDeadError once the engine is gone."""
        try:
            await self._channel.send(message)
        except ChannelClosedError:
            raise self.failure or EngineDeadError("the engine process is gone") from None

    async def watch(self, on_message: Callable[[FromEngine], None], on_death: Callable[[AphroError], None]) -> None:
        """Hand every message to ``on_message`` until the engine is gone, then tell ``on_death`` why, once."""
        failed: EngineFailed | None = None
        try:
            while True:
                message = await self._channel.receive()
                if isinstance(message, EngineFailed):
                    failed = message
                else:
                    on_message(message)
        except ChannelClosedError:
            pass
        with anyio.move_on_after(_STOP_SECONDS):
            await self._process.wait()
        self.failure = self._explain(failed)
        self.dead.set()
        on_death(self.failure)

    def _explain(self, failed: EngineFailed | None) -> AphroError:
        if failed is not None:
            error = AphroError(failed.message, hint=failed.hint, exit_code=ExitCode(failed.exit_code))
            if failed.detail:
                error.add_note(failed.detail)
            return error
        code = self._process.returncode
        end = "hangs" if code is None else f"exited with code {code}"
        if code is not None and code < 0:
            end = f"was killed by signal {-code} ({signal.Signals(-code).name})"
        return EngineDeadError(
            f"the engine process (pid {self.pid}) {end}",
            hint="if memory was short the kernel's log says so: dmesg | grep -i oom",
        )

    async def stop(self) -> None:
        """End the engine: asked first, killed after a while, reaped in the end."""
        try:
            with anyio.move_on_after(_STOP_SECONDS):
                await self._channel.send(StopEngine())
                await self._process.wait()
        except ChannelClosedError:
            with anyio.move_on_after(_STOP_SECONDS):
                await self._process.wait()
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        await self._channel.aclose()


@asynccontextmanager
async def open_engine(config: EngineConfig) -> AsyncIterator[EngineProcess]:
    """Start an engine process for ``config``. Nothing of it is left when the block is left."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "aphro_core.engine.entry", str(theirs.fileno()), str(os.getpid())]
    # a session of its own: Ctrl-C in the terminal is for the API process alone, which then drains
    process = await anyio.open_process(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2,  # talk goes to stderr: stdout belongs to data
        stderr=None,
        env=engine_environment(config),
        start_new_session=True,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    engine = EngineProcess(process, await Channel.over(ours, codec.api_side_of_engine()))
    try:
        await engine.send(StartEngine(config=config))
        yield engine
    finally:
        with anyio.CancelScope(shield=True):
            await engine.stop()


def engine_environment(config: EngineConfig) -> dict[str, str]:
    """The environment of engine and workers: OpenMP has to be told before torch is loaded. The user's values win."""
    environment = dict(os.environ)
    cores = host.num_cores()
    spare = 1 if cores > 2 else 0  # for the API process
    threads = max(1, (cores - spare) // config.parallel.world_size) if config.device == "cpu" else 1
    defaults = {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo",  # one host: the mesh of ranks must not listen where others can reach it
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**defaults, **environment}
