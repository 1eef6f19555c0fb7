"""One served model: engine process, tokenizer and frontend wired together, for the server and for ``LLM`` alike."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread

from aphro_core.errors import AphroError
from aphro_core.frontend.frontend import Frontend
from aphro_core.frontend.supervisor import EngineProcess, open_engine
from aphro_core.frontend.tokenizer import Tokenizer, open_tokenizer
from aphro_core.messages.requests import EngineProgress, EngineReady, FromEngine, StepOutputs
from aphro_core.prepare import EngineOptions, Prepared
from aphro_core.reporter import Reporter


class Session:
    """A starting, then serving, then perhaps dead model."""

    def __init__(self, prepared: Prepared, engine: EngineProcess, frontend: Frontend, reporter: Reporter) -> None:
        self.prepared = prepared
        self.engine = engine
        self.frontend = frontend
        self.ready: EngineReady | None = None
        self._reporter = reporter
        self._settled = anyio.Event()
        self._started_at = time.monotonic()

    async def wait_ready(self) -> EngineReady:
        """Return when the model serves. Raises the first cause if it never will."""
        await self._settled.wait()
        if self.ready is None:
            assert self.engine.failure is not None
            raise self.engine.failure
        return self.ready

    async def wait_dead(self) -> AphroError:
        """Return why the engine died."""
        await self.engine.dead.wait()
        assert self.engine.failure is not None
        return self.engine.failure

    def take_message(self, message: FromEngine) -> None:
        match message:
            case StepOutputs():
                self.frontend.on_outputs(message)
            case EngineProgress():
                self._report_progress(message)
            case EngineReady():
                self.ready = message
                self._report_capacity(message)
                self.frontend.on_engine_ready(message)
                self._settled.set()

    def take_death(self, failure: AphroError) -> None:
        self.frontend.on_engine_dead(failure)
        self._settled.set()

    def _report_progress(self, progress: EngineProgress) -> None:
        text = f"rank {progress.rank}: {progress.phase}"
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
        self._reporter.line(f"Engine ready after {time.monotonic() - self._started_at:.1f} s.")


@asynccontextmanager
async def open_session(
    prepared: Prepared, options: EngineOptions, reporter: Reporter, *, max_queued_requests: int
) -> AsyncIterator[Session]:
    """Start the engine, and read the tokenizer meanwhile. Nothing of either is left when the block is left."""
    async with open_engine(prepared.config) as engine:
        tokenizer = (
            None if options.skip_tokenizer_init else await anyio.to_thread.run_sync(_open_tokenizer, prepared, options)
        )
        frontend = Frontend(
            engine,
            tokenizer,
            served_name=prepared.config.model.served_name,
            vocab_size=prepared.spec.vocab_size,
            max_model_len=prepared.config.model.max_model_len,
            eos_token_ids=prepared.spec.eos_token_ids,
            max_queued_requests=max_queued_requests,
        )
        session = Session(prepared, engine, frontend, reporter)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(engine.watch, session.take_message, session.take_death)
            yield session
            tasks.cancel_scope.cancel()


def _open_tokenizer(prepared: Prepared, options: EngineOptions) -> Tokenizer:
    template = Path(options.chat_template).read_text() if options.chat_template else None
    return open_tokenizer(Path(prepared.config.model.path), chat_template=template)
