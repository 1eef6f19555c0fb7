"""``LLM``: the same engine without a server, for scripts. Blocking, and done when its block is left."""

from __future__ import annotations

import atexit
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal

from aphro_core.errors import RequestError, UsageError, first_cause
from aphro_core.messages.requests import EngineStats
from aphro_core.prepare import EngineOptions, prepare
from aphro_core.reporter import Reporter, SilentReporter
from aphro_core.request import CompletionOutput, Request, RequestOutput, SamplingParams
from aphro_core.session import Session, open_session

Prompt = str | Sequence[int] | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model on this host's devices, those of ``hosts`` or of a cluster, by vLLM's names.

    ``LLM("model", tensor_parallel_size=2).generate(["Hello"], SamplingParams(max_tokens=8))``. Every keyword of
    :class:`aphro_core.prepare.EngineOptions` is taken; ``distributed_executor_backend`` is ``backend``. Use it as a
    context manager, or call :meth:`close`: engine and workers end there. Raises AphroError when the model cannot start.
    """

    def __init__(
        self,
        model: str,
        *,
        distributed_executor_backend: str | None = None,
        reporter: Reporter | None = None,
        **options: Any,
    ) -> None:
        if distributed_executor_backend not in (None, "mp", "ssh", "ray"):
            raise UsageError(
                f"distributed_executor_backend is {distributed_executor_backend!r}, allowed: None, 'mp', 'ssh', 'ray'",
                hint="LLM(..., distributed_executor_backend='mp')",
            )
        unknown = sorted(set(options) - set(EngineOptions.__dataclass_fields__))
        if unknown:
            raise UsageError(f"LLM() does not know {', '.join(unknown)}", hint=_allowed_options())
        engine_options = EngineOptions(model=model, backend=distributed_executor_backend or "auto", **options)  # type: ignore[arg-type]
        reporter = reporter or SilentReporter()
        prepared = prepare(engine_options, reporter)
        self._closing = ExitStack()
        try:
            self._portal: BlockingPortal = self._closing.enter_context(start_blocking_portal())
            opened = open_session(prepared, engine_options, reporter, max_queued_requests=2**31)
            self._session: Session = self._closing.enter_context(self._portal.wrap_async_context_manager(opened))
            self._portal.call(self._session.wait_ready)
            self._session.report_ready()
        except BaseException:
            self.close()
            raise
        atexit.register(self.close)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prompt_token_ids: Sequence[Sequence[int]] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt: text, token ids, or ``{"prompt": ...}`` / ``{"prompt_token_ids": ...}``.

        One SamplingParams for all or one a prompt. The answers are in the order of the prompts; those that may get the
        most tokens are begun first. ``use_tqdm`` shows a progress bar on a terminal. Raises RequestError for a wrong
        prompt or parameter, before anything is started.
        """
        listed = _as_list(prompts if prompt_token_ids is None else prompt_token_ids)
        texts_and_ids = [self._encode(prompt) for prompt in listed]
        return self._run(texts_and_ids, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of ``{"role", "content"}``) or several, through the model's chat template."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        tokenizer = self._session.frontend.tokenizer
        if tokenizer is None:
            raise RequestError("chat needs a tokenizer, and this model was opened without one", field="messages")
        template_args = dict(chat_template_kwargs or {})
        texts_and_ids: list[tuple[str | None, Sequence[int]]] = [
            (None, tokenizer.encode_chat(list(one), add_generation_prompt=add_generation_prompt, **template_args))  # type: ignore[arg-type]
            for one in conversations
        ]
        return self._run(texts_and_ids, sampling_params, use_tqdm)

    def get_tokenizer(self) -> Any:
        """The tokenizer (None with ``skip_tokenizer_init``)."""
        return self._session.frontend.tokenizer

    def stats(self) -> EngineStats:
        """The engine's gauges and counters as of its last step."""
        return self._session.frontend.stats

    def close(self) -> None:
        """End engine and workers. May be called twice."""
        atexit.unregister(self.close)
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _encode(self, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        if isinstance(prompt, Mapping):
            prompt = prompt["prompt_token_ids"] if "prompt_token_ids" in prompt else prompt["prompt"]
        if not isinstance(prompt, str):
            return None, list(prompt)  # type: ignore[arg-type]
        tokenizer = self._session.frontend.tokenizer
        if tokenizer is None:
            raise RequestError("this model was opened without a tokenizer: give prompts as token ids", field="prompt")
        return prompt, tokenizer.encode(prompt)

    def _run(
        self,
        prompts: Sequence[tuple[str | None, Sequence[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if not isinstance(sampling_params, Sequence):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise RequestError(
                f"{len(sampling_params)} sampling params for {len(prompts)} prompts, allowed: one, or one a prompt",
                field="sampling_params",
            )
        requests = [
            Request(request_id=uuid4().hex, prompt=text, prompt_token_ids=ids, sampling=params)
            for (text, ids), params in zip(prompts, sampling_params, strict=True)
        ]
        return self._portal.call(_collect_all, self._session, requests, use_tqdm)


async def _collect_all(session: Session, requests: Sequence[Request], show_progress: bool) -> list[RequestOutput]:
    outputs = [
        RequestOutput(
            request.request_id,
            request.prompt,
            list(request.prompt_token_ids),
            [CompletionOutput(index) for index in range(request.sampling.n)],
        )
        for request in requests
    ]
    with _progress_bar(len(requests), show_progress) as advance:
        try:
            async with anyio.create_task_group() as tasks:
                for index in _longest_first(requests):
                    tasks.start_soon(_collect, session, requests[index], outputs[index], advance)
        except BaseExceptionGroup as group:
            raise first_cause(group) from None
    return outputs


def _longest_first(requests: Sequence[Request]) -> list[int]:
    """Nobody waits for one of them before the others: the call ends with the last one, and a long one that begins late
    ends in steps of few rows, which cost as much as steps of many (longest processing time first, Graham 1969)."""
    most_tokens = [request.sampling.max_tokens for request in requests]
    lengths = [math.inf if most is None else most for most in most_tokens]
    return sorted(range(len(requests)), key=lengths.__getitem__, reverse=True)


async def _collect(session: Session, request: Request, output: RequestOutput, advance: Callable[[], None]) -> None:
    async with session.frontend.stream(request, is_whole=True) as deltas:
        async for delta in deltas:
            output.extend(delta)
    advance()


@contextmanager
def _progress_bar(total: int, show: bool) -> Iterator[Callable[[], None]]:
    """Yields what to call when one more is done; draws only on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield lambda: None
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Processed prompts", total=total)
        yield lambda: progress.advance(task)


def _as_list(prompts: Any) -> list[Prompt]:
    if prompts is None:
        raise RequestError("no prompts given", field="prompts")
    if isinstance(prompts, (str, Mapping)) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]
    return list(prompts)


def _allowed_options() -> str:
    return f"allowed: {', '.join(EngineOptions.__dataclass_fields__)}"
