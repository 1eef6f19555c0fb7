"""Keeps an engine running: starts it, hands its messages on, knows why it died, starts the next one within a budget."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from typing import Final, Protocol

import anyio
import anyio.to_thread
import msgspec

from aphro_core import host
from aphro_core.channel import Channel, ChannelClosedError
from aphro_core.config import EngineConfig
from aphro_core.errors import AphroError, EngineDeadError, ExitCode
from aphro_core.frontend.recovery_budget import WINDOW_SECONDS, RecoveryBudget
from aphro_core.held_engine import HeldEngine
from aphro_core.lifeline import STACKS_SIGNAL
from aphro_core.messages import codec
from aphro_core.messages.requests import EngineFailed, EngineReady, FromEngine, StartEngine, StopEngine, ToEngine
from aphro_core.spawn import ForkServer

_STOP_SECONDS: Final = 3.0  # for the engine to end its workers and itself before it is killed
_END_SECONDS: Final = 2.0  # from the last message of an engine to the end of its process
_STACKS_SECONDS: Final = 0.3  # for an engine that hangs to write its stacks
_LEAST_START_SECONDS: Final = 30.0  # for an engine that is started again, or a multiple of what the first one took
_START_FACTOR: Final = 5.0
_RECONNECT_SECONDS: Final = 4.0  # to a host of an engine that is started again: three times within half a minute
_RETRY_SECONDS: Final = 0.5  # about; before an engine is started again that did not even get ready
_LOOK_SECONDS: Final = 1.0  # whether an engine that starts is stopped
_STOPPED_LOOKS: Final = 3
_WAKE_SECONDS: Final = 0.5  # a second chance for the engine, should this process have been stopped itself


class EngineLostError(EngineDeadError):
    """An engine has died. ``seq_ids`` were in its steps; None: nobody knows."""

    def __init__(self, error: AphroError, seq_ids: list[int] | None = None, *, is_external: bool = False) -> None:
        super().__init__(error.message, hint=error.hint, exit_code=error.exit_code, is_external=is_external)
        self.seq_ids = seq_ids


class EngineProcess:
    """One running engine: send it messages, take what it says."""

    def __init__(self, held: HeldEngine, channel: Channel[ToEngine, FromEngine], config: EngineConfig) -> None:
        self.held = held
        self._process = held.child
        self._channel = channel
        self._config = config
        self._num_oom_kills = host.num_oom_kills()
        self._is_ready = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def expect_pulses(self) -> None:
        """From now on silence is a hang."""
        self._is_ready = True

    async def send(self, message: ToEngine) -> None:
        """Raises EngineDeadError once the engine is gone."""
        try:
            await self._channel.send(message)
        except ChannelClosedError:
            raise EngineDeadError("the engine process is gone") from None

    async def receive(self) -> FromEngine:
        """The next message. Raises EngineLostError when the engine has died, or has been silent for too long."""
        try:
            message = await self._receive()
        except ChannelClosedError:
            with anyio.move_on_after(_END_SECONDS):
                await self._process.wait()
            raise self._explain_end() from None
        if isinstance(message, EngineFailed):
            error = AphroError(message.message, hint=message.hint, exit_code=ExitCode(message.exit_code))
            lost = EngineLostError(error, message.seq_ids, is_external=message.is_external)
            lost.lost_host = message.lost_host
            if message.detail:
                lost.add_note(message.detail)
            raise lost
        self._is_ready |= isinstance(message, EngineReady)
        return message

    async def _receive(self) -> FromEngine:
        # an engine that serves sends a pulse several times a second, whatever it computes
        seconds = self._config.step_timeout_seconds if self._is_ready else self._config.start_timeout_seconds
        watch, waited = host.StopWatch(_STOPPED_LOOKS), 0.0
        while not self._is_ready and waited < seconds and not watch.is_stopped(self.pid):
            with anyio.move_on_after(_LOOK_SECONDS):
                return await self._channel.receive()
            waited += _LOOK_SECONDS
        for limit in (seconds, _WAKE_SECONDS) if self._is_ready else (_WAKE_SECONDS,):
            with anyio.move_on_after(limit):
                return await self._channel.receive()
        seconds = seconds if self._is_ready else waited
        self._is_ready = False  # it is not asked to stop any more
        state = host.process_state(self.pid)
        self._process.send_signal(STACKS_SIGNAL)
        await anyio.sleep(_STACKS_SECONDS)
        is_stopped = state is not None and state.state in ("T", "t")
        what = "is stopped (SIGSTOP)" if is_stopped else "hangs"
        error = EngineDeadError(f"the engine process (pid {self.pid}) {what}: silent for {seconds:g} s")
        raise EngineLostError(error, is_external=is_stopped)

    def _explain_end(self) -> EngineLostError:
        is_killed = self._process.exit_code == -signal.SIGKILL
        was_short = host.num_oom_kills() > self._num_oom_kills
        hint = "the kernel killed it because memory was short: dmesg | grep -i oom" if was_short else None
        error = EngineDeadError(f"the engine process (pid {self.pid}) {self._process.describe_end()}", hint=hint)
        return EngineLostError(error, is_external=is_killed and not was_short)

    async def stop(self) -> None:
        """Ask a serving engine to end itself and its workers. What remains is killed with the fork server's link."""
        if self._is_ready:
            try:
                with anyio.move_on_after(_STOP_SECONDS):
                    await self._channel.send(StopEngine())
                    await self._process.wait()
            except ChannelClosedError:
                pass
        await self._channel.aclose()


@asynccontextmanager
async def open_engine(config: EngineConfig, fork_server: ForkServer, epoch: int) -> AsyncIterator[EngineProcess]:
    """Start an engine process for ``config``. Nothing of it is left when the block is left."""
    link = await anyio.to_thread.run_sync(fork_server.open_link)
    with ExitStack() as stack:
        stack.callback(link.end)  # kills the engine, whose own link kills its workers
        workers = await anyio.to_thread.run_sync(link.open_link)
        door, its_door = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.callback(door.close)
        ours, theirs = socket.socketpair()
        with theirs, its_door:
            parts = (theirs, workers, its_door)
            process = await anyio.to_thread.run_sync(link.fork, "engine", "aphro-engine", *parts)
        workers.close()
        stack.callback(process.close)
        async with _talking(HeldEngine(epoch, process, link, door), ours, config) as engine:
            await engine.send(StartEngine(config=config, epoch=epoch))
            yield engine


@asynccontextmanager
async def adopt_engine(held: HeldEngine, config: EngineConfig) -> AsyncIterator[EngineProcess]:
    """Go on with an engine whose API process has died. It says that it is ready; then it knows of no request."""
    with ExitStack() as stack:
        stack.callback(held.end)
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                held.offer(theirs)
            except OSError as error:
                ours.close()
                raise EngineDeadError(f"the engine process (pid {held.child.pid}) cannot be taken over") from error
        async with _talking(held, ours, config) as engine:
            engine.expect_pulses()  # it has loaded long ago: one that hangs is found as soon as ever
            yield engine


@asynccontextmanager
async def _talking(held: HeldEngine, sock: socket.socket, config: EngineConfig) -> AsyncIterator[EngineProcess]:
    engine = EngineProcess(held, await Channel.over(sock, codec.api_side_of_engine()), config)
    try:
        yield engine
    finally:
        with anyio.CancelScope(shield=True):
            await engine.stop()


class Listener(Protocol):
    """Whoever lives through the deaths of engines."""

    def take_message(self, message: FromEngine, engine: EngineProcess) -> None: ...

    def take_loss(self, lost: EngineLostError, *, is_final: bool) -> None: ...


class Supervisor:
    """Runs engine after engine, each under its own epoch, until one fails that was never ready, or the budget ends."""

    def __init__(
        self,
        config: EngineConfig,
        fork_server: ForkServer,
        budget: RecoveryBudget,
        listener: Listener,
        *,
        orphan: HeldEngine | None = None,
        hand_on: Callable[[HeldEngine], None] = lambda _: None,
    ) -> None:
        """``orphan``: the engine of an API process that has died; ``hand_on`` is told of each engine that serves."""
        self._config = config
        self._fork_server = fork_server
        self._budget = budget
        self._listener = listener
        self._orphan = orphan
        self._hand_on = hand_on
        self._is_ready = False  # this engine
        self._num_not_forked = 0  # engines in a row for which there was no process
        self._was_ready = orphan is not None  # any engine
        self._started_at = 0.0
        self._all_hosts = config.parallel.hosts
        self._lost_hosts = set[str]()
        self.epoch = 0 if orphan is None else orphan.epoch

    async def run(self) -> None:
        """Returns when there will be no engine any more; the listener has been told why."""
        while True:
            lost = await self._run_engine()
            failure = self._final_failure(lost)
            self._listener.take_loss(failure or lost, is_final=failure is not None)
            if failure is not None:
                return
            self._leave_out(lost.lost_host)
            if not self._is_ready:  # what just failed may need a moment: memory that is being freed, a full table
                await anyio.sleep(_RETRY_SECONDS * 2 ** min(self._num_not_forked, 4) * (0.5 + random.random()))

    async def _run_engine(self) -> EngineLostError:
        self._is_ready = False
        self._started_at = anyio.current_time()
        try:
            async with self._open_engine() as engine:
                while True:
                    message = await engine.receive()
                    if isinstance(message, EngineReady):
                        self._take_ready(message)
                        self._hand_on(engine.held)
                    self._listener.take_message(message, engine)
        except EngineLostError as lost:
            self._num_not_forked = 0
            return lost
        except (
            AphroError,
            OSError,
        ) as error:  # there was no process to begin with: too little of something, for a while
            self._num_not_forked += 1
            if isinstance(error, AphroError):
                return EngineLostError(error, [])
            failure = EngineDeadError(f"no engine can be started: {error}", hint="raise `ulimit -n`")
            return EngineLostError(failure, [], is_external=True)

    def _open_engine(self) -> AbstractAsyncContextManager[EngineProcess]:
        if self._orphan is not None:
            orphan, self._orphan = self._orphan, None
            return adopt_engine(orphan, self._config)
        self.epoch += 1
        return open_engine(self._config, self._fork_server, self.epoch)

    def _take_ready(self, ready: EngineReady) -> None:
        """The next engine is to have the same cache, however much memory is free then."""
        seconds = anyio.current_time() - self._started_at
        limit = self._config.start_timeout_seconds
        if not self._was_ready:  # what has started once takes no half hour the next time
            limit = min(limit, max(_LEAST_START_SECONDS, _START_FACTOR * seconds))
        self._was_ready = self._is_ready = True
        cache = msgspec.structs.replace(self._config.cache, num_blocks=ready.num_blocks)
        model = msgspec.structs.replace(self._config.model, max_model_len=ready.max_model_len)
        parallel = msgspec.structs.replace(self._config.parallel, connect_timeout_seconds=_RECONNECT_SECONDS)
        self._config = msgspec.structs.replace(
            self._config, cache=cache, model=model, parallel=parallel, start_timeout_seconds=limit
        )

    def _leave_out(self, lost_host: str) -> None:
        """The next engine does not ask hosts that were lost, as long as the others have devices enough."""
        if not lost_host:
            return
        self._lost_hosts.add(lost_host)
        parallel = self._config.parallel
        rest = tuple(each for each in self._all_hosts if each.name not in self._lost_hosts)
        if sum(each.num_slots for each in rest) < parallel.world_size:
            self._lost_hosts.clear()  # it may be back
            rest = self._all_hosts
        self._config = msgspec.structs.replace(self._config, parallel=msgspec.structs.replace(parallel, hosts=rest))

    def _final_failure(self, lost: EngineLostError) -> EngineLostError | None:
        if not self._was_ready:
            return lost
        if self._budget.take():
            return None
        allowed = f"{self._budget.max_recoveries} in {WINDOW_SECONDS:g} s are allowed"
        error = AphroError(
            f"the engine died once more than it may be started again ({allowed}); the last cause: {lost.message}",
            hint=lost.hint or "--max-recoveries allows more",
            exit_code=ExitCode.RECOVERY,
        )
        final = EngineLostError(error, lost.seq_ids, is_external=lost.is_external)
        for note in getattr(lost, "__notes__", ()):
            final.add_note(note)
        return final


def engine_environment(config: EngineConfig) -> dict[str, str]:
    """The environment of engine and workers: OpenMP has to be told before torch is loaded. The user's values win."""
    environment = {**os.environ, **config.parallel.environment}
    if config.parallel.backend in ("ssh", "ray"):
        return environment  # each host has cores and interfaces of its own
    cores = host.num_cores()
    spare = 1 if cores > 2 else 0  # for the API process
    threads = max(1, (cores - spare) // config.parallel.world_size) if config.device == "cpu" else 1
    defaults = {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo",  # one host: the mesh of ranks must not listen where others can reach it
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**defaults, **environment}
