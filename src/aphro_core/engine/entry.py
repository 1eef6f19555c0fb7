"""The one door into an engine process: take StartEngine, build the engine, serve, report the cause of an end."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from contextlib import suppress

import anyio
import msgspec

from aphro_core.channel import Channel, ChannelClosedError
from aphro_core.config import EngineConfig
from aphro_core.engine.engine import Engine
from aphro_core.errors import AphroError, ExitCode, MemoryBudgetError, first_cause
from aphro_core.executor.executor import open_executor
from aphro_core.lifeline import die_with_parent, exit_on_hangup
from aphro_core.messages import codec
from aphro_core.messages.requests import (
    EngineFailed,
    EngineProgress,
    EngineReady,
    FromEngine,
    StartEngine,
    ToEngine,
)
from aphro_core.messages.steps import WorkerLoaded, WorkerProgress
from aphro_core.parallel.memory import max_useful_blocks
from aphro_core.scheduler.scheduler import Scheduler

ApiChannel = Channel[FromEngine, ToEngine]


def main() -> int:
    """``python -m aphro_core.engine.entry FD PARENT_PID``, FD a connected Unix socket. Returns the exit code."""
    fd, parent_pid = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # the API process says when to stop; a stray SIGTERM to the process group must not cut a drain short
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sock = socket.socket(fileno=fd)
    exit_on_hangup(sock.fileno(), grace_seconds=2.0)
    return anyio.run(_serve, sock)


async def _serve(sock: socket.socket) -> int:
    api: ApiChannel = await Channel.over(sock, codec.engine_side_of_api())
    try:
        start = await api.receive()
        assert isinstance(start, StartEngine)
        await _run_engine(api, start.config)
        return 0
    except BaseException as group:
        failed = _describe(first_cause(group))
    with suppress(ChannelClosedError):  # the API process may be gone, and with it whoever would read this
        await api.send(failed)
    return failed.exit_code


async def _run_engine(api: ApiChannel, config: EngineConfig) -> None:
    send_progress, receive_progress = anyio.create_memory_object_stream[WorkerProgress](1024)

    async def forward_progress() -> None:
        async for progress in receive_progress:
            await api.send(EngineProgress(**msgspec.structs.asdict(progress)))

    def on_progress(progress: WorkerProgress) -> None:
        try:
            send_progress.send_nowait(progress)
        except anyio.WouldBlock:
            return  # a later figure of the same phase follows

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forward_progress)
        async with open_executor(config, on_progress) as executor:
            num_blocks, max_model_len = fit_cache(config, executor.ranks)
            await executor.allocate(num_blocks)
            scheduler = Scheduler(
                config.scheduler,
                num_blocks=num_blocks,
                block_size=config.cache.block_size,
                max_model_len=max_model_len,
                max_in_flight=config.parallel.pipeline_parallel_size,
                enable_prefix_caching=config.cache.enable_prefix_caching,
            )
            await api.send(EngineReady(num_blocks=num_blocks, max_model_len=max_model_len, ranks=executor.ranks))
            timeout = config.distributed_timeout_seconds
            await Engine(api, executor, scheduler, step_timeout_seconds=timeout).run()
        tasks.cancel_scope.cancel()


def fit_cache(config: EngineConfig, ranks: list[WorkerLoaded]) -> tuple[int, int]:
    """(blocks that every rank allocates, longest request in tokens).

    Blocks are the smallest number over the ranks, and no more than requests could ever use. Raises
    MemoryBudgetError when a request of max_model_len does not fit, unless the length may follow the memory.
    """
    cache, max_model_len = config.cache, config.model.max_model_len
    useful = max_useful_blocks(config.scheduler.max_num_seqs, max_model_len, cache.block_size)
    limiting = min(ranks, key=lambda loaded: loaded.num_blocks)
    num_blocks = cache.num_blocks or min(limiting.num_blocks, useful)
    tokens = num_blocks * cache.block_size
    if tokens >= max_model_len:
        return num_blocks, max_model_len
    if config.model.fit_max_model_len and tokens > 0:
        return num_blocks, tokens
    raise _does_not_fit(config, limiting, num_blocks)


def _does_not_fit(config: EngineConfig, limiting: WorkerLoaded, num_blocks: int) -> MemoryBudgetError:
    block_size, max_model_len, gib = config.cache.block_size, config.model.max_model_len, 2**30
    tokens = num_blocks * block_size
    needed = -(-max_model_len // block_size) * limiting.block_bytes / gib
    available = num_blocks * limiting.block_bytes / gib
    return MemoryBudgetError(
        f"To serve at least one request with the models's max seq len ({max_model_len}), ({needed:.2f} GiB KV cache is "
        f"needed, which is larger than the available KV cache memory ({available:.2f} GiB). "
        f"Based on the available memory, the estimated maximum model length is {tokens}. Rank {limiting.rank} limits: "
        f"{limiting.weights_bytes / gib:.2f} GiB of weights, {limiting.activation_bytes / gib:.2f} GiB of activations.",
        hint=f"--max-model-len {tokens}" if tokens else "a higher memory utilization, or more ranks (-tp, -pp)",
    )


def _describe(error: BaseException) -> EngineFailed:
    if isinstance(error, AphroError):
        notes = "".join(getattr(error, "__notes__", []))
        return EngineFailed(error.message, error.hint, int(error.exit_code), notes)
    detail = "".join(traceback.format_exception(error))
    return EngineFailed(f"{type(error).__name__}: {error}", None, int(ExitCode.ENGINE), detail)


if __name__ == "__main__":
    exit_code = main()
    sys.stderr.flush()
    os._exit(exit_code)  # a step that still computes on the worker's thread must not hold the process
