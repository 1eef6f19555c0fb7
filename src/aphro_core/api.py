"""The one door into the core: ``serve`` for the command line, ``LLM`` for scripts. Wires, decides nothing."""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
from msgspec.structs import replace

from aphro_core import stderr
from aphro_core.config import ServerConfig
from aphro_core.errors import first_cause
from aphro_core.frontend.recovery_budget import RecoveryBudget
from aphro_core.frontend.supervisor import engine_environment
from aphro_core.keeper.heartbeat import BEAT_SECONDS
from aphro_core.keeper.keeper import Kept, keep
from aphro_core.lifeline import STACKS_SIGNAL
from aphro_core.llm import LLM
from aphro_core.messages.requests import EngineReady
from aphro_core.prepare import EngineOptions, Prepared, prepare
from aphro_core.reporter import Reporter
from aphro_core.request import SamplingParams
from aphro_core.server.app import build_app
from aphro_core.server.bind import bind, url_of
from aphro_core.server.serve import Server
from aphro_core.session import Session, open_session
from aphro_core.spawn import open_fork_server

__all__ = ["LLM", "EngineOptions", "SamplingParams", "ServeOptions", "serve"]


@dataclass(frozen=True, kw_only=True)
class ServeOptions(EngineOptions):
    """EngineOptions, and the HTTP edge."""

    host: str = "127.0.0.1"
    port: int = 2242
    api_keys: tuple[str, ...] = ()
    max_queued_requests: int = 1024
    queue_timeout: float = 600.0
    request_timeout: float = 3600.0
    drain_seconds: float = 30.0
    json_ready: str | None = None


def serve(options: ServeOptions, reporter: Reporter) -> int:
    """Serve until SIGINT or SIGTERM (then drain; a second one ends at once). Returns the exit code.

    Raises AphroError: whatever forbids a start, or the first cause of the engine's death.
    """
    stderr.never_block()
    server_config = ServerConfig(
        host=options.host,
        port=options.port,
        api_keys=options.api_keys,
        max_queued_requests=options.max_queued_requests,
        queue_timeout_seconds=options.queue_timeout,
        request_timeout_seconds=options.request_timeout,
        drain_seconds=options.drain_seconds,
        json_ready=options.json_ready,
    )
    sockets = bind(server_config.host, server_config.port)  # a busy port is known before anything loads
    try:
        prepared = _with_url(prepare(options, reporter), url_of(sockets))
        server_config = replace(server_config, max_num_seqs=prepared.config.scheduler.max_num_seqs)
        budget = RecoveryBudget(options.max_recoveries, time.monotonic)

        def run_api(kept: Kept) -> int:
            faulthandler.register(STACKS_SIGNAL, all_threads=True)  # for the keeper, when this process hangs
            try:
                return anyio.run(_serve, options, server_config, prepared, sockets, kept, reporter)
            finally:
                kept.leave()

        with open_fork_server(engine_environment(prepared.config)) as fork_server:
            return keep(run_api, fork_server, budget, reporter)
    except BaseExceptionGroup as group:
        raise first_cause(group) from group
    finally:
        for sock in sockets:
            sock.close()


def _with_url(prepared: Prepared, url: str) -> Prepared:
    """So that a cluster can say where its models answer."""
    parallel = prepared.config.parallel
    if parallel.ray is None:
        return prepared
    parallel = replace(parallel, ray=replace(parallel.ray, url=url))
    return dataclasses.replace(prepared, config=replace(prepared.config, parallel=parallel))


async def _serve(
    options: ServeOptions,
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
    )
    async with _beating(kept), opened as session, anyio.create_task_group() as tasks:
        server = Server(build_app(session.frontend, config), sockets, config)
        tasks.start_soon(_stop_on_signals, server, session, reporter)
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
    reporter.ready(url, model, _curl(url, model, bool(config.api_keys), session.frontend.tokenizer is not None))
    raise await session.wait_dead()


async def _stop_on_signals(server: Server, session: Session, reporter: Reporter) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for number in signals:
            name = signal.Signals(number).name
            if server.is_draining or session.ready is None:
                reporter.line(f"{name}: stopping at once.")
                server.stop_now()
            else:
                reporter.line(f"{name}: finishing open requests (a second signal stops at once).")
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
