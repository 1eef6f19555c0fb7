"""The one door into the core: ``serve`` for the command line, ``LLM`` for scripts. Wires, decides nothing."""

from __future__ import annotations

import dataclasses
import faulthandler
import time
from dataclasses import dataclass

from msgspec.structs import replace

from aphro_core import stderr
from aphro_core.config import ServerConfig
from aphro_core.errors import first_cause
from aphro_core.frontend.recovery_budget import RecoveryBudget
from aphro_core.frontend.supervisor import engine_environment
from aphro_core.keeper.interruption import interruptible
from aphro_core.keeper.keeper import Kept, keep
from aphro_core.lifeline import STACKS_SIGNAL
from aphro_core.prepare import EngineOptions, Prepared, prepare
from aphro_core.reporter import Reporter
from aphro_core.server.bind import bind, url_of
from aphro_core.spawn import open_fork_server


@dataclass(frozen=True, kw_only=True)
class ServeOptions(EngineOptions):
    """EngineOptions, and the HTTP edge."""

    host: str = "127.0.0.1"
    port: int = 2242
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    max_queued_requests: int = 1024
    queue_timeout: float = 600.0
    request_timeout: float = 3600.0
    drain_seconds: float = 30.0
    json_ready: str | None = None


def serve(options: ServeOptions, reporter: Reporter) -> int:
    """Serve until SIGINT or SIGTERM (then drain; a second one ends at once). Returns the exit code.

    Raises AphroError: whatever forbids a start, or the first cause of the engine's death; StartInterruptedError
    where a signal came before it served.
    """
    stderr.never_block()
    server_config = ServerConfig(
        host=options.host,
        port=options.port,
        api_keys=options.api_keys,
        allowed_origins=options.allowed_origins,
        allowed_methods=options.allowed_methods,
        allowed_headers=options.allowed_headers,
        allow_credentials=options.allow_credentials,
        max_queued_requests=options.max_queued_requests,
        queue_timeout_seconds=options.queue_timeout,
        request_timeout_seconds=options.request_timeout,
        drain_seconds=options.drain_seconds,
        json_ready=options.json_ready,
    )
    sockets = bind(server_config.host, server_config.port)  # a busy port is known before anything loads
    try:
        with interruptible("model, host and nodes were being looked at, nothing had been started"):
            prepared = _with_url(prepare(options, reporter), url_of(sockets))
        server_config = replace(server_config, max_num_seqs=prepared.config.scheduler.max_num_seqs)
        budget = RecoveryBudget(options.max_recoveries, time.monotonic)
        starting = interruptible("the processes below this one were being started")
        with starting, open_fork_server(engine_environment(prepared.config)) as fork_server:
            from aphro_core import serving  # only now: beside the fork server's imports, which take longer

            def run_api(kept: Kept) -> int:
                faulthandler.register(STACKS_SIGNAL, all_threads=True)  # for the keeper, when this process hangs
                try:
                    return serving.run(options, server_config, prepared, sockets, kept, reporter)
                finally:
                    kept.leave()

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
