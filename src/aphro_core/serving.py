"""The API process: HTTP around a session, from its start to its end, with what it tells the keeper."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from aphro_core.config import ServerConfig
from aphro_core.errors import StartInterruptedError
from aphro_core.host import process_age
from aphro_core.keeper.heartbeat import BEAT_SECONDS
from aphro_core.keeper.keeper import Kept
from aphro_core.messages.requests import EngineReady
from aphro_core.prepare import EngineOptions, Prepared
from aphro_core.reporter import Reporter
from aphro_core.server.app import build_app
from aphro_core.server.bind import url_of
from aphro_core.server.serve import Server
from aphro_core.session import Session, open_session


def run(
    options: EngineOptions,
    config: ServerConfig,
    prepared: Prepared,
    sockets: Sequence[socket.socket],
    kept: Kept,
    reporter: Reporter,
) -> int:
    """Serve on ``sockets`` until it has drained. Raises AphroError, perhaps in a group: why no engine will come."""
    return anyio.run(_serve, options, config, prepared, sockets, kept, reporter)


async def _serve(
    options: EngineOptions,
    config: ServerConfig,
    prepared: Prepared,
    sockets: Sequence[socket.socket],
    kept: Kept,
    reporter: Reporter,
) -> int:
    opened = open_session(
        prepared,
        options,
        reporter,
        max_queued_requests=config.max_queued_requests,
        fork_server=kept.fork_server,
        is_replacement=kept.is_replacement,
        orphan=kept.engine,
        hand_on=kept.hand_on,
        began_at=None if kept.is_replacement else time.monotonic() - process_age(kept.keeper_pid),
    )
    stopping = _Stopping(kept, reporter)
    async with _beating(kept), stopping.on_signals(), opened as session, anyio.create_task_group() as tasks:
        server = Server(build_app(session.frontend, config), sockets, config)
        stopping.hand(session, server)
        tasks.start_soon(_announce, session, server, config, prepared, kept, reporter)
        await server.run()
        tasks.cancel_scope.cancel()
    return 0


@asynccontextmanager
async def _beating(kept: Kept) -> AsyncIterator[None]:
    """The keeper replaces a process whose loop does not run."""

    async def beat() -> None:
        while True:
            kept.beat()
            await anyio.sleep(BEAT_SECONDS)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(beat)
        yield
        tasks.cancel_scope.cancel()


async def _announce(
    session: Session, server: Server, config: ServerConfig, prepared: Prepared, kept: Kept, reporter: Reporter
) -> None:
    """Say that it serves; when the engine dies, let open streams end with their error, then raise the first cause."""
    ready = await session.wait_ready()
    url, model = url_of(server.sockets), prepared.config.model.served_name
    if config.json_ready:
        try:
            _write_ready(Path(config.json_ready), url, ready, kept, prepared.config.cache.block_size)
        except OSError as error:
            if not kept.is_replacement:
                raise
            reporter.line(f"{config.json_ready} cannot be written again: {error}; the one of before stays.")
    kept.mark_ready()
    gc.collect()
    gc.freeze()  # a fifth of a streamed token's time went into looking at what lives for ever
    if not kept.is_replacement:
        session.report_ready()
    reporter.ready(url, model, _curl(url, model, bool(config.api_keys), session.frontend.tokenizer is not None))
    raise await session.wait_dead()


class _Stopping:
    """What SIGINT and SIGTERM do: end a start, drain a server, and end it at once."""

    def __init__(self, kept: Kept, reporter: Reporter) -> None:
        self._has_served = kept.is_replacement
        self._reporter = reporter
        self._served: tuple[Session, Server] | None = None

    def hand(self, session: Session, server: Server) -> None:
        """What there is to end, once there is."""
        self._served = session, server

    @asynccontextmanager
    async def on_signals(self) -> AsyncIterator[None]:
        """Raises StartInterruptedError, in a group, where the start ends."""
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._take_all, signals)
                yield
                tasks.cancel_scope.cancel()

    async def _take_all(self, signals: AsyncIterator[signal.Signals]) -> None:
        async for number in signals:
            self._take(signal.Signals(number).name)

    def _take(self, name: str) -> None:
        if self._served is None:
            raise StartInterruptedError(name, "the tokenizer was being read")
        session, server = self._served
        if session.ready is None and not self._has_served:
            raise StartInterruptedError(name, session.phase)
        if server.is_draining or session.ready is None:
            self._reporter.line(f"{name}: stopping at once.")
            server.stop_now()
        else:
            self._reporter.line(f"{name}: finishing open requests (a second signal stops at once).")
            server.drain()


def _write_ready(file: Path, url: str, ready: EngineReady, kept: Kept, block_size: int) -> None:
    """The ready record for scripts, written whole or not at all. ``pid`` is the process to signal."""
    workers = [
        {"rank": loaded.rank, "pid": loaded.pid, "host": loaded.host, "device": loaded.device} for loaded in ready.ranks
    ]
    record = {
        "url": url,
        "pid": kept.keeper_pid,
        "api_pid": os.getpid(),
        "workers": workers,
        "num_blocks": ready.num_blocks,
        "tokens": ready.num_blocks * block_size,
    }
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(record) + "\n")
    partial.replace(file)


def _curl(url: str, model: str, has_key: bool, has_tokenizer: bool) -> str:
    """A line that can be pasted and answers."""
    key = " -H 'Authorization: Bearer YOUR_API_KEY'" if has_key else ""
    prompt: dict[str, object]
    if has_tokenizer:
        route, prompt = "chat/completions", {"messages": [{"role": "user", "content": "Hello!"}]}
    else:
        route, prompt = "completions", {"prompt": [1, 2, 3]}
    body = {"model": model, **prompt, "max_tokens": 32}
    return f"curl {url}/v1/{route} -H 'Content-Type: application/json'{key} -d '{json.dumps(body)}'"
