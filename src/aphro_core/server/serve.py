"""hypercorn on our sockets, and the end of it: drain what is open, then cut what is left, each within its deadline."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, cast

import anyio
import hypercorn
import hypercorn.asyncio

from aphro_core.config import ServerConfig
from aphro_core.errors import first_cause
from aphro_core.server import http1
from aphro_core.server.app import App
from aphro_core.server.bind import BACKLOG, bind, url_of

__all__ = ["Server", "bind", "url_of"]

_KEEP_ALIVE_SECONDS: Final = 75
_GRACE_SECONDS: Final = 0.75  # for an answer that is decided already to reach the network
_TELL_SECONDS: Final = 10.0
_ACCEPT_SECONDS: Final = 0.1
_LOG: Final = logging.getLogger(__name__)


class Server:
    """Serves ``app`` on ``sockets`` from :meth:`run` until it is told to stop, then closes them.

    :meth:`drain` refuses new requests and lets open ones finish for ``config.drain_seconds``; :meth:`stop_now` ends
    them with an error. Both return at once; :meth:`run` returns when all has ended. hypercorn's own graceful shutdown
    is not relied on: from Python 3.12 on it waits for an open stream whatever its timeout says.
    """

    def __init__(self, app: App, sockets: Sequence[socket.socket], config: ServerConfig) -> None:
        self.sockets = sockets
        self._app = app
        self._drain_seconds = config.drain_seconds
        self._stopping = anyio.Event()
        self._stopping_now = anyio.Event()
        self._closing = anyio.Event()
        self._closed = anyio.Event()

    @property
    def is_draining(self) -> bool:
        return self._stopping.is_set()

    def drain(self) -> None:
        """Begin an orderly end."""
        self._app.gate.close()
        self._stopping.set()

    def stop_now(self) -> None:
        """Begin an end that waits for nobody."""
        self.drain()
        self._stopping_now.set()

    async def run(self) -> None:
        """Serve. Cancelling it is a stop too: open requests have a moment to end by themselves."""
        asyncio.get_running_loop().set_exception_handler(_ConnectionErrors().take)
        http = anyio.CancelScope(shield=True)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._serve_http, http)
            try:
                await self._stopping.wait()
                await self._drain()
            finally:
                with anyio.CancelScope(shield=True):
                    await self._close()
                    http.cancel()

    async def _drain(self) -> None:
        with anyio.move_on_after(self._drain_seconds):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_then_cancel, self._app.gate.wait_empty, tasks.cancel_scope)
                tasks.start_soon(_then_cancel, self._stopping_now.wait, tasks.cancel_scope)

    async def _close(self) -> None:
        gate = self._app.gate
        gate.close()
        if not self._stopping.is_set():  # cancelled: if the engine died, its requests are about to say so themselves
            with anyio.move_on_after(_GRACE_SECONDS):
                await gate.wait_empty()
        if gate.num_open:
            _LOG.warning("ending %d open requests", gate.num_open)
        gate.end_all()
        with anyio.move_on_after(_GRACE_SECONDS):
            await gate.wait_empty()
        self._closing.set()
        for sock in self.sockets:
            sock.close()
        with anyio.move_on_after(_GRACE_SECONDS):
            await self._closed.wait()
        if not self._closed.is_set():
            _LOG.warning("cutting connections whose clients do not read")

    async def _serve_http(self, scope: anyio.CancelScope) -> None:
        """Shielded: a cancelled run still answers what it has open."""
        app = cast(Any, self._app)  # hypercorn has types of its own for ASGI messages
        try:
            with scope:
                await hypercorn.asyncio.serve(app, self._config(), shutdown_trigger=self._closing.wait)
        except asyncio.InvalidStateError:  # how hypercorn's own shutdown takes being cut short
            if not scope.cancel_called:
                raise
        finally:
            self._closed.set()
        if not self._closing.is_set():
            raise RuntimeError("hypercorn ended without being told to")

    def _config(self) -> hypercorn.Config:
        http1.install()
        # where no descriptor was left asyncio looks again after a second, and then at one backlog's worth
        asyncio.constants.ACCEPT_RETRY_DELAY = _ACCEPT_SECONDS  # type: ignore[attr-defined]
        # a line for each write to a client that has left: strangers would fill the log
        asyncio.constants.LOG_THRESHOLD_FOR_CONNLOST_WRITES = sys.maxsize  # type: ignore[attr-defined]
        config = hypercorn.Config()
        # duplicates: hypercorn closes what it is given
        config.bind = [f"fd://{os.dup(sock.fileno())}" for sock in self.sockets]
        config.backlog = BACKLOG
        config.keep_alive_timeout = _KEEP_ALIVE_SECONDS
        config.keep_alive_max_requests = 2**31
        config.graceful_timeout = _GRACE_SECONDS / 2
        config.include_server_header = False  # a stranger need not know what we are built on
        config.accesslog = None
        config.errorlog = _LOG
        return config


class _ConnectionErrors:
    """What asyncio cannot hand to anybody."""

    def __init__(self) -> None:
        self._told_at = -_TELL_SECONDS

    def take(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "out of system resource" not in context["message"]:
            _take_connection_error(loop, context)
        elif loop.time() - self._told_at >= _TELL_SECONDS:  # asyncio says so for every place in the backlog
            self._told_at = loop.time()
            _LOG.warning("no file descriptor is left for connections: they wait (raise `ulimit -n`)")


def _take_connection_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An end of one connection that hypercorn does not catch: a line at most, and nothing that the client wrote."""
    message, error = context["message"], context.get("exception")
    if error is None or not ("client_connected_cb" in message or "connection_made" in message):
        loop.default_exception_handler(context)
        return
    cause = first_cause(error)
    level = logging.DEBUG if isinstance(cause, (OSError, asyncio.CancelledError)) else logging.WARNING
    _LOG.log(level, "a connection was dropped: %s", type(cause).__name__)


async def _then_cancel(wait: Callable[[], Awaitable[object]], scope: anyio.CancelScope) -> None:
    await wait()
    scope.cancel()
