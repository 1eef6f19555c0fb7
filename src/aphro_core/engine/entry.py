"""The one door into an engine process: take StartEngine, build the engine, serve, report the cause of an end."""

from __future__ import annotations

import faulthandler
import socket
import time
import traceback
from contextlib import suppress
from pathlib import Path

import anyio
import msgspec

from aphro_core.channel import Channel
from aphro_core.checkpoint.model_files import check_unchanged
from aphro_core.config import EngineConfig
from aphro_core.engine.api_link import ApiLink
from aphro_core.engine.engine import Engine
from aphro_core.engine.step_watch import StepWatch
from aphro_core.errors import AphroError, EngineDeadError, ExitCode, MemoryBudgetError, first_cause
from aphro_core.executor.executor import Executor, open_executor
from aphro_core.lifeline import STACKS_SIGNAL, exit_on_hangup
from aphro_core.messages import codec
from aphro_core.messages.requests import (
    EngineFailed,
    EngineProgress,
    EngineReady,
    StartEngine,
)
from aphro_core.messages.steps import WorkerLoaded, WorkerProgress
from aphro_core.parallel.memory import max_useful_blocks
from aphro_core.scheduler.scheduler import Scheduler
from aphro_core.spawn import Spawner


def main(sock: socket.socket, link: socket.socket, door: socket.socket) -> int:
    """Serve the API process at the other end of ``sock``, and later ones that come through ``door``.

    ``link`` leads to the fork server. Returns the exit code. Once nobody holds the other end of the door this process
    ends, whatever it does.
    """
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    exit_on_hangup(door.fileno(), grace_seconds=0.5)
    return anyio.run(_serve, sock, Spawner(link), door)


async def _serve(sock: socket.socket, spawner: Spawner, door: socket.socket) -> int:
    api = ApiLink(await Channel.over(sock, codec.engine_side_of_api()), door)
    process = EngineProcess(api, spawner)
    try:
        await process.run()
        return 0
    except BaseException as group:
        failed = _describe(first_cause(group), process.in_flight)
    await api.send(failed)
    return failed.exit_code


class EngineProcess:
    """Builds what an engine is made of, once it is told which."""

    def __init__(self, api: ApiLink, spawner: Spawner) -> None:
        self._api = api
        self._spawner = spawner
        self._engine: Engine | None = None
        self._send_progress, self._receive_progress = anyio.create_memory_object_stream[WorkerProgress](1024)

    @property
    def in_flight(self) -> list[int]:
        """The sequences that were being computed, also after the end."""
        return self._engine.in_flight if self._engine else []

    async def run(self) -> None:
        start = await self._api.receive()
        assert isinstance(start, StartEngine)
        check_unchanged(Path(start.config.model.path), start.config.model.stamps)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._forward_progress)
            async with open_executor(start.config, self._spawner, self._take_progress) as executor:
                await self._run_engine(start.config, executor)
            tasks.cancel_scope.cancel()

    async def _run_engine(self, config: EngineConfig, executor: Executor) -> None:
        num_blocks, max_model_len = fit_cache(config, executor.ranks)
        await executor.allocate(num_blocks)

        def build_scheduler() -> Scheduler:
            return Scheduler(
                config.scheduler,
                num_blocks=num_blocks,
                block_size=config.cache.block_size,
                max_model_len=max_model_len,
                max_in_flight=config.parallel.pipeline_parallel_size + config.run_ahead,
                run_ahead=config.run_ahead,
                enable_prefix_caching=config.cache.enable_prefix_caching,
            )

        async def announce() -> None:
            await self._api.send(EngineReady(num_blocks=num_blocks, max_model_len=max_model_len, ranks=executor.ranks))

        watch = StepWatch(config.step_timeout_seconds, config.distributed_timeout_seconds, time.monotonic)
        self._engine = Engine(self._api, executor, build_scheduler, watch)
        await self._engine.run(announce)

    async def _forward_progress(self) -> None:
        async for progress in self._receive_progress:
            await self._api.send(EngineProgress(**msgspec.structs.asdict(progress)))

    def _take_progress(self, progress: WorkerProgress) -> None:
        with suppress(anyio.WouldBlock):  # a later figure of the same phase follows
            self._send_progress.send_nowait(progress)


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


def _describe(error: BaseException, seq_ids: list[int]) -> EngineFailed:
    if isinstance(error, AphroError):
        notes = "".join(getattr(error, "__notes__", []))
        is_external = isinstance(error, EngineDeadError) and error.is_external
        lost_host = error.lost_host if isinstance(error, EngineDeadError) else ""
        return EngineFailed(error.message, error.hint, int(error.exit_code), notes, is_external, seq_ids, lost_host)
    detail = "".join(traceback.format_exception(error))
    message = f"{type(error).__name__}: {error}"
    return EngineFailed(message, None, int(ExitCode.ENGINE), detail, seq_ids=seq_ids)
