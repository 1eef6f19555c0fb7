"""One served model: engine process, tokenizer and frontend wired together, for the server and for ``LLM`` alike."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup

from aphro_core.errors import AphroError
from aphro_core.estimate.balance import RankBalance
from aphro_core.estimate.measured import COLUMNS, compare_memory
from aphro_core.frontend.frontend import Frontend
from aphro_core.frontend.recovery_budget import RecoveryBudget
from aphro_core.frontend.start_phases import StartPhases
from aphro_core.frontend.supervisor import EngineLostError, EngineProcess, Supervisor, engine_environment
from aphro_core.frontend.tokenizer import Tokenizer, open_tokenizer
from aphro_core.held_engine import HeldEngine
from aphro_core.messages.requests import (
    EngineProgress,
    EnginePulse,
    EngineReady,
    FromEngine,
    StepFailed,
    StepOutputs,
)
from aphro_core.parallel.link_cost import tensor_link_warning
from aphro_core.prepare import EngineOptions, Prepared, expect_memory
from aphro_core.reporter import Reporter
from aphro_core.spawn import ForkServer, open_fork_server
from aphro_core.templates.renderer import ChildRenderer

_LOG: Final = logging.getLogger(__name__)


class Session:
    """A starting, then serving, then perhaps dead model. Engines come and go in it; the first one is waited for."""

    def __init__(
        self,
        prepared: Prepared,
        frontend: Frontend,
        reporter: Reporter,
        tasks: TaskGroup,
        *,
        is_replacement: bool = False,
        began_at: float | None = None,
    ) -> None:
        self._is_replacement = is_replacement
        self.prepared = prepared
        self.frontend = frontend
        self.ready: EngineReady | None = None
        self.failure: AphroError | None = None
        self._reporter = reporter
        self._tasks = tasks
        self._settled = anyio.Event()
        self._dead = anyio.Event()
        self._expected: tuple[RankBalance, ...] | None = None
        self._begin(began_at)

    def _begin(self, began_at: float | None = None) -> None:
        now = time.monotonic()
        self._phases = StartPhases(now if began_at is None else began_at, now)
        self.phase = "processes were being started"  # where the engine is that starts

    async def wait_ready(self) -> EngineReady:
        """Return when the model serves. Raises the first cause if it never will."""
        await self._settled.wait()
        if self.ready is None:
            assert self.failure is not None
            raise self.failure
        return self.ready

    async def expect(self) -> None:
        """What this start may take of the memory, to be compared with what it takes. Beside the processes' imports:
        nvidia-smi has been seen to answer after seconds."""
        expected = await anyio.to_thread.run_sync(expect_memory, self.prepared, self._reporter, abandon_on_cancel=True)
        if expected is not None and self._phases.has_ranks:  # what they have would count as other programs'
            self._reporter.line("No estimate to compare with: the ranks were faster than the question what is free.")
        else:
            self._expected = expected

    def report_ready(self) -> None:
        """It serves: say how long that took, and where the seconds went."""
        now = time.monotonic()
        self._reporter.line(f"Ready after {now - self._phases.began_at:.1f} s: {self._phases.describe(now)}.")

    async def wait_dead(self) -> AphroError:
        """Return why no engine will come any more."""
        await self._dead.wait()
        assert self.failure is not None
        return self.failure

    def take_message(self, message: FromEngine, engine: EngineProcess) -> None:
        match message:
            case StepOutputs():
                self.frontend.on_outputs(message)
            case EnginePulse():
                self.frontend.on_pulse(message)
            case EngineProgress():
                self.frontend.metrics.starting.take(message)
                self._phases.take(message.phase, time.monotonic())
                self._report_progress(message)
            case EngineReady():
                self._take_ready(message, engine)
            case StepFailed():
                self._reporter.line(f"a step failed: {message.message}; the engine goes on without its culprit")
                _LOG.warning("a step failed: %s\n%s", message.message, message.detail)
                self.frontend.on_step_failed(message)
                self._tasks.start_soon(partial(self.frontend.resume, engine, after_failed_step=True))

    def _take_ready(self, ready: EngineReady, engine: EngineProcess) -> None:
        self._phases.take_ready(time.monotonic())
        if self.ready is None and not self._is_replacement:
            self._report_capacity(ready)
        else:
            num_open = self.frontend.num_open
            seconds = time.monotonic() - self._phases.began_at
            self._reporter.line(f"Engine ready again after {seconds:.1f} s: {num_open} open requests go on.")
        self.ready = ready
        self.frontend.on_engine_ready(ready)
        self._tasks.start_soon(self.frontend.resume, engine)
        self._settled.set()

    def take_loss(self, lost: EngineLostError, *, is_final: bool) -> None:
        if is_final:
            self.failure = lost
            self.frontend.on_engine_dead(lost)
            self._settled.set()
            self._dead.set()
            return
        self._begin()
        self._reporter.line(f"{lost.message}; starting another engine, open requests wait.")
        for note in getattr(lost, "__notes__", ()):
            _LOG.warning("of the engine that died:\n%s", note)
        self.frontend.on_engine_lost(lost.seq_ids, is_external=lost.is_external)

    def _report_progress(self, progress: EngineProgress) -> None:
        text = f"rank {progress.rank}: {progress.phase}"
        self.phase = f"{text}, {progress.done / progress.total:.0%}" if progress.total > 1 else text
        self._reporter.progress(f"{progress.rank}:{progress.phase}", progress.done, progress.total, text)

    def _report_capacity(self, ready: EngineReady) -> None:
        """The lines that operators and their scripts look for."""
        config, spec, gib = self.prepared.config, self.prepared.spec, 2**30
        shards = self.prepared.plan.ranks
        rows = [
            (
                str(loaded.rank),
                loaded.host,
                str(loaded.pid),
                loaded.device,
                f"{shard.layers.start}-{shard.layers.stop - 1}",
                f"{len(shard.heads)}/{len(shard.kv_heads)}",
                f"{loaded.weights_bytes / gib:.2f} GiB",
                f"{loaded.num_blocks * loaded.block_bytes / gib:.2f} GiB",
            )
            for loaded, shard in zip(ready.ranks, shards, strict=True)
        ]
        columns = ("rank", "host", "pid", "device", "layers", "heads/KV", "weights", "KV fits")
        parallel = config.parallel
        title = f"{spec.architecture}: tp {parallel.tensor_parallel_size} x pp {parallel.pipeline_parallel_size}"
        self._reporter.table(title, columns, rows)
        if self._expected is not None:
            compared = compare_memory(self._expected, ready.ranks)
            self._reporter.table("Estimate / measurement", COLUMNS, compared)
        if ready.max_model_len < config.model.max_model_len:
            self._reporter.line(
                f"Auto-fit max_model_len: reduced from {config.model.max_model_len} to {ready.max_model_len} to fit in "
                f"the available memory"
            )
        kind = "GPU" if config.device == "cuda" else "CPU"
        tokens = ready.num_blocks * config.cache.block_size
        limiting = min(ready.ranks, key=lambda loaded: loaded.num_blocks)
        allows = f"rank {limiting.rank} limits (its memory would hold {limiting.num_blocks})"
        self._reporter.line(f"# {kind} blocks: {ready.num_blocks}")
        self._reporter.line(
            f"{kind} KV cache size: {tokens:,} tokens ({ready.num_blocks} blocks x {config.cache.block_size}); {allows}"
        )
        self._reporter.line(
            f"Maximum concurrency for {ready.max_model_len:,} tokens per request: {tokens / ready.max_model_len:.2f}x"
        )
        if warning := tensor_link_warning(self.prepared.plan, ready.ranks):
            self._reporter.line(warning)
        for loaded in ready.ranks:
            if loaded.bytes_fetched is not None:
                fetched, read = loaded.bytes_fetched / gib, loaded.bytes_read / gib
                self._reporter.line(
                    f"Rank {loaded.rank} read {read:.2f} GiB of the model; {fetched:.2f} GiB came from this host, and "
                    f"stay in ~/.cache/aphro/from-head on {loaded.host}."
                )


@asynccontextmanager
async def open_session(
    prepared: Prepared,
    options: EngineOptions,
    reporter: Reporter,
    *,
    max_queued_requests: int,
    fork_server: ForkServer | None = None,
    is_replacement: bool = False,
    orphan: HeldEngine | None = None,
    hand_on: Callable[[HeldEngine], None] = lambda _: None,
    began_at: float | None = None,
) -> AsyncIterator[Session]:
    """Start the engine and read the tokenizer. Nothing of either is left when the block is left.

    ``fork_server`` None: one of its own. ``is_replacement`` of an API process that served: requests wait for the
    engine, instead of being refused, and ``orphan`` is the engine it had. ``hand_on`` is told of each that serves.
    ``began_at``: when the command began (``time.monotonic``), None: now.
    """
    config = prepared.config
    began_at = time.monotonic() if began_at is None else began_at
    with ExitStack() as stack:
        if fork_server is None:
            fork_server = stack.enter_context(open_fork_server(engine_environment(config)))
        renderer = ChildRenderer(fork_server)
        stack.callback(renderer.close)
        async with anyio.create_task_group() as tasks:
            frontend = Frontend(
                None,
                served_name=config.model.served_name,
                vocab_size=prepared.spec.vocab_size,
                max_model_len=config.model.max_model_len,
                eos_token_ids=prepared.spec.eos_token_ids,
                max_queued_requests=max_queued_requests,
                takes_requests=is_replacement,
            )
            session = Session(prepared, frontend, reporter, tasks, is_replacement=is_replacement, began_at=began_at)
            budget = RecoveryBudget(options.max_recoveries, time.monotonic)
            supervisor = Supervisor(config, fork_server, budget, session, orphan=orphan, hand_on=hand_on)
            tasks.start_soon(supervisor.run)
            if not is_replacement:
                tasks.start_soon(session.expect)
            if not options.skip_tokenizer_init:
                parts = (prepared, options, renderer)  # a signal is not answered seconds later, when it has been read
                frontend.use_tokenizer(await anyio.to_thread.run_sync(_open_tokenizer, *parts, abandon_on_cancel=True))
            yield session
            tasks.cancel_scope.cancel()


def _open_tokenizer(prepared: Prepared, options: EngineOptions, renderer: ChildRenderer) -> Tokenizer:
    template = Path(options.chat_template).read_text() if options.chat_template else None
    return open_tokenizer(Path(prepared.config.model.path), chat_template=template, render=renderer.render)
