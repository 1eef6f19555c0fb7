"""Takes requests, keeps the truth about each while the engine computes, and gives back streams of text."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final, Protocol

import anyio

from aphro_core.errors import AphroError, EngineDeadError, OverloadedError, RequestError
from aphro_core.frontend.answer import Answer
from aphro_core.frontend.detokenizer import Detokenizer, TextRules
from aphro_core.frontend.limits import ModelLimits
from aphro_core.frontend.live_choice import LiveChoice, OpenRequest
from aphro_core.frontend.metrics import Health, Metrics
from aphro_core.frontend.request_table import RequestTable
from aphro_core.frontend.tokenizer import Tokenizer
from aphro_core.messages.requests import AbortSequences, EngineReady, EngineStats, StepOutputs, ToEngine
from aphro_core.request import FinishReason, OutputDelta, Request

_RETRY_STARTING: Final = 5  # seconds, what a client is told while the engine starts
_SEND_SECONDS: Final = 60  # the engine reads while it computes, so that this long is a hang


class EngineLink(Protocol):
    """The way to the engine. ``send`` raises AphroError once the engine is gone."""

    async def send(self, message: ToEngine) -> None: ...


class Frontend:
    """All of it runs on one event loop. The supervisor hands in what the engine says (``on_...``)."""

    def __init__(
        self,
        engine: EngineLink,
        tokenizer: Tokenizer | None,
        *,
        served_name: str,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: Sequence[int],
        max_queued_requests: int,
        clock: Callable[[], float] = time.monotonic,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(63),
    ) -> None:
        """``eos_token_ids`` are the model's; those of the tokenizer join them. ``clock`` gives seconds."""
        ends = dict.fromkeys([*eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())])
        self.tokenizer = tokenizer
        self.served_name = served_name
        self.metrics = Metrics(served_name, clock)
        self._limits = ModelLimits(vocab_size, max_model_len, tuple(end for end in ends if 0 <= end < vocab_size))
        self._engine = engine
        self._clock = clock
        self._draw_seed = draw_seed
        self._table = RequestTable(max_queued_requests)
        self._live: dict[int, LiveChoice] = {}  # by seq_id
        self._aborts: list[int] = []  # seq_ids that the engine is still to be told to forget
        self._is_ready = False
        self._failure: AphroError | None = None

    @property
    def max_model_len(self) -> int:
        return self._limits.max_model_len

    @property
    def vocab_size(self) -> int:
        return self._limits.vocab_size

    @property
    def stats(self) -> EngineStats:
        """The engine's gauges and counters as of its last step."""
        return self.metrics.stats or EngineStats(0, 0, 0, 0, 0, 0, 0)

    def health(self) -> Health:
        step, age = self.stats.step, self.metrics.seconds_since_step
        if self._failure is not None:
            return Health("dead", False, self._failure.message, step, age)
        if not self._is_ready:
            return Health("starting", False, "the engine is starting", step, age)
        return Health("ready", True, f"{len(self._table)} requests open", step, age)

    def check_admission(self) -> None:
        """Raises what ``stream`` would raise of any request now, before the work of tokenising it."""
        if self._failure is not None:
            raise self._dead()
        if not self._is_ready:
            raise OverloadedError("the engine is starting", retry_after=_RETRY_STARTING, draining=True)
        self._table.check_room()

    @asynccontextmanager
    async def stream(self, request: Request) -> AsyncIterator[AsyncIterator[OutputDelta]]:
        """``async with frontend.stream(request) as deltas``: each choice's last delta has a ``finish_reason``.

        Leaving the block early aborts what is not finished. Raises RequestError, OverloadedError or EngineDeadError,
        the last one also out of the iterator.
        """
        self.check_admission()
        opened = self._open(request)
        try:
            for choice in opened.row.choices:
                await self._send(opened.row.add_sequence(choice))
            yield opened.answer
        finally:
            self._close(opened)
            await self._send_aborts()

    # --- what the engine says ---

    def on_engine_ready(self, ready: EngineReady) -> None:
        self._is_ready, self._failure = True, None
        self.metrics.num_blocks = ready.num_blocks
        self._limits = replace(self._limits, max_model_len=ready.max_model_len)

    def on_engine_dead(self, failure: AphroError) -> None:
        """Every open stream ends in this error. What the table holds could start again in another engine."""
        self._is_ready = False
        self._failure = failure
        for opened in {id(live.request): live.request for live in self._live.values()}.values():
            opened.answer.fail(self._dead())
        self._live.clear()
        self._aborts.clear()

    def on_outputs(self, outputs: StepOutputs) -> None:
        """Record a step, then speak: one call a step, a few microseconds a token."""
        now = self._clock()
        num_tokens = 0
        intervals: dict[float, int] = {}
        for output in outputs.outputs:
            live = self._live.get(output.seq_id)
            if live is None:  # aborted while the engine computed it
                continue
            if output.token_ids:
                self._count_latency(live, now, intervals)
            delta = live.take(output)
            num_tokens += len(delta.token_ids)
            live.request.answer.put(delta, shows=live.shows(delta))
            if delta.finish_reason is not None:
                if output.finish_reason is None:  # a stop string, of which the engine knows nothing
                    self._aborts.append(output.seq_id)
                self._finish(live, delta.finish_reason, now)
        self.metrics.take_step(outputs.stats, now, num_tokens, intervals)

    def _count_latency(self, live: LiveChoice, now: float, intervals: dict[float, int]) -> None:
        opened = live.request
        if live.choice.output_token_ids:
            interval = now - live.last_token_at
            intervals[interval] = intervals.get(interval, 0) + 1
        elif not opened.has_tokens:
            opened.has_tokens = True
            self.metrics.take_first_token(len(opened.row.prompt_token_ids), now - opened.since)
        live.last_token_at = now

    def _finish(self, live: LiveChoice, reason: FinishReason, now: float) -> None:
        row = live.request.row
        del self._live[live.choice.seq_id]
        self.metrics.take_finished(reason)
        if row.is_finished:
            seconds = now - live.request.since
            self.metrics.take_answered(len(row.prompt_token_ids), row.num_output_tokens, seconds)

    # --- rows and messages ---

    def _open(self, request: Request) -> OpenRequest:
        max_tokens = self._limits.check(request)
        sampling, tokenizer = request.sampling, self.tokenizer
        if sampling.stop and (tokenizer is None or not sampling.detokenize):
            why = "the model was opened without a tokenizer" if tokenizer is None else "detokenize is false"
            raise RequestError(f"stop strings need text, and {why}: use stop_token_ids", field="stop")
        row = self._table.open(
            request,
            max_tokens=max_tokens,
            eos_token_ids=() if sampling.ignore_eos else self._limits.eos_token_ids,
            seed=self._draw_seed() if sampling.seed is None else sampling.seed,
        )
        rules = None
        if tokenizer is not None and sampling.detokenize:
            rules = TextRules.of(tokenizer, row.prompt_token_ids, sampling)
        token_text = None if tokenizer is None else tokenizer.token_text
        now = self._clock()
        opened = OpenRequest(row, Answer(len(row.choices), self._send_aborts), since=now)
        for choice in row.choices:
            detokenizer = None if rules is None else Detokenizer(rules)
            self._live[choice.seq_id] = LiveChoice(choice, opened, detokenizer, token_text, now)
        self.metrics.take_request(len(row.choices))
        return opened

    def _close(self, opened: OpenRequest) -> None:
        for seq_id in self._table.close(opened.row):
            self.metrics.take_finished("abort")
            if self._live.pop(seq_id, None) is not None:
                self._aborts.append(seq_id)

    async def _send_aborts(self) -> None:
        """Tell the engine what to forget; whoever waits or leaves next does it, since a step only notes it."""
        if self._aborts:
            seq_ids, self._aborts = self._aborts, []
            try:
                await self._send(AbortSequences(seq_ids))
            except EngineDeadError:
                return  # it has forgotten everything

    async def _send(self, message: ToEngine) -> None:
        # half a message would damage all that follow, so a client that leaves does not interrupt it
        with anyio.move_on_after(_SEND_SECONDS, shield=True):
            try:
                return await self._engine.send(message)
            except AphroError as error:
                self._failure = self._failure or error
                raise self._dead() from error
        self.on_engine_dead(
            EngineDeadError(
                f"the engine has not read a message for {_SEND_SECONDS} s",
                hint="its process hangs: look at it with `py-spy dump --pid PID`, then start again",
            )
        )
        raise self._dead()

    def _dead(self) -> EngineDeadError:
        """A new error for each stream, so that each has its own traceback."""
        failure = self._failure
        assert failure is not None
        error = EngineDeadError(failure.message, hint=failure.hint, exit_code=failure.exit_code)
        error.__cause__ = failure
        return error
