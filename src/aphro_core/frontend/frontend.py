"""Takes requests, keeps the truth about each while the engine computes, and gives back streams of text."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Final

import anyio

from aphro_core.errors import AphroError, EngineDeadError, OverloadedError, RequestError, RequestFailedError
from aphro_core.frontend.answer import Answer
from aphro_core.frontend.detokenizer import Detokenizer, TextRules
from aphro_core.frontend.limits import ModelLimits
from aphro_core.frontend.live_choice import LiveChoice, OpenRequest
from aphro_core.frontend.metrics import Health, Metrics, Phase
from aphro_core.frontend.recovery import EngineLink, Recovery
from aphro_core.frontend.request_table import RequestTable, Row
from aphro_core.frontend.tokenizer import Tokenizer
from aphro_core.messages.requests import (
    AbortSequences,
    EnginePulse,
    EngineReady,
    EngineStats,
    SequenceOutput,
    StepFailed,
    StepOutputs,
)
from aphro_core.request import FinishReason, OutputDelta, Request

_RETRY_STARTING: Final = 5  # seconds, what a client is told while the engine starts
_SILENT_SECONDS: Final = 1.25  # an engine sends a pulse every quarter of a second


class Frontend:
    """All of it runs on one event loop. The session hands in what engines say and how they end (``on_...``).

    The table keeps what every request has got, so that an engine may die: the next one is told all that is open, and
    streams go on behind their last token. Meanwhile requests are taken, and wait.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        served_name: str,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: Sequence[int],
        max_queued_requests: int,
        takes_requests: bool = False,
        clock: Callable[[], float] = time.monotonic,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(63),
    ) -> None:
        """``eos_token_ids`` are the model's; those of the tokenizer join them. ``clock`` gives seconds.

        ``takes_requests``: before the first engine is there they wait for it, instead of being refused.
        """
        self.tokenizer: Tokenizer | None = None
        self.served_name = served_name
        self.metrics = Metrics(served_name, clock)
        self._limits = ModelLimits(vocab_size, max_model_len, tuple(eos_token_ids))
        self.use_tokenizer(tokenizer)
        self._clock = clock
        self._draw_seed = draw_seed
        self._table = RequestTable(max_queued_requests)
        self._live: dict[int, LiveChoice] = {}  # by seq_id
        self._aborts: list[int] = []  # seq_ids that the engine is still to be told to forget
        self._recovery = Recovery(self._table, self._live.__contains__, self._give_up, clock)
        self._was_ready = takes_requests
        self._pulse_at = clock()
        self._stalled = ""
        self._failure: AphroError | None = None

    def use_tokenizer(self, tokenizer: Tokenizer | None) -> None:
        """From now on; what ends an answer there ends it here too."""
        self.tokenizer = tokenizer
        ends = dict.fromkeys([*self._limits.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())])
        known = tuple(end for end in ends if 0 <= end < self.vocab_size)
        self._limits = replace(self._limits, eos_token_ids=known)

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

    @property
    def num_open(self) -> int:
        """Requests that are not answered yet."""
        return len(self._recovery.open_rows)

    def health(self) -> Health:
        """Ready: an engine takes requests, its loop runs, and if it computes a step, the step advances."""
        step, age = self.stats.step, self.metrics.seconds_since_step
        if self._failure is not None:
            return Health("dead", False, self._failure.message, step, age)
        if self._recovery.engine is None:
            phase: Phase = "recovering" if self._was_ready else "starting"
            return Health(phase, False, "the engine is being started", step, age)
        silent = self._clock() - self._pulse_at
        if silent > _SILENT_SECONDS or self._stalled:
            return Health("stalled", False, self._stalled or f"the engine is silent for {silent:.1f} s", step, age)
        return Health("ready", True, f"{len(self._table)} requests open", step, age)

    def check_admission(self) -> None:
        """Raises what ``stream`` would raise of any request now, before the work of tokenising it."""
        if self._failure is not None:
            raise self._dead()
        if not self._was_ready:
            raise OverloadedError("the engine is starting", retry_after=_RETRY_STARTING, draining=True)
        self._table.check_room()

    @asynccontextmanager
    async def stream(self, request: Request, *, is_whole: bool = False) -> AsyncIterator[AsyncIterator[OutputDelta]]:
        """``async with frontend.stream(request) as deltas``: each choice's last delta has a ``finish_reason``.

        ``is_whole``: a choice has only that one, with everything, and nobody is woken for single tokens.

        Leaving the block early aborts what is not finished. Raises RequestError, OverloadedError, RequestFailedError
        or EngineDeadError, the last two also out of the iterator.
        """
        self.check_admission()
        if self._recovery.suspects.is_refused(request):
            raise RequestError("the engine died under this request before, and it is not taken again")
        opened = self._open(request, is_whole)
        engine = self._recovery.engine  # of the moment in which the row is opened: a later one finds it in the table
        try:
            if engine is not None:
                await self._recovery.send_row(engine, opened.row)
            yield opened.answer
        finally:
            self._close(opened)
            await self._send_aborts()

    # --- what the engine says ---

    def on_engine_ready(self, ready: EngineReady) -> None:
        """An engine is there; it takes requests once :meth:`resume` has told it of the open ones."""
        self._failure = None
        self.metrics.take_engine(ready)
        self._limits = replace(self._limits, max_model_len=ready.max_model_len)

    async def resume(self, engine: EngineLink, *, after_failed_step: bool = False) -> None:
        """Tell an engine that knows nothing of every open request; from then on it takes requests."""
        await self._recovery.resume(engine, after_failed_step=after_failed_step)
        self._pulse_at = self._clock()
        self._was_ready |= self._recovery.engine is engine

    def on_pulse(self, pulse: EnginePulse) -> None:
        self._pulse_at = self._clock()
        self._stalled = pulse.stalled

    def on_step_failed(self, failed: StepFailed) -> None:
        """A step failed and the engine lives: it has forgotten everything, and :meth:`resume` is next."""
        self._lose_engine()
        self.metrics.take_failed_step()
        self._recovery.step_failed(failed.seq_ids)

    def on_engine_lost(self, seq_ids: Sequence[int] | None, *, is_external: bool) -> None:
        """The engine has died, another one will come. ``seq_ids`` were in its steps; None: all that it had may be."""
        self._lose_engine()
        self.metrics.take_recovery()
        self._recovery.engine_lost(seq_ids, is_external=is_external)

    def on_engine_dead(self, failure: AphroError) -> None:
        """No engine will come any more: every open stream ends in this error."""
        self._lose_engine()
        self._recovery.detach()
        self._failure = failure
        for opened in {id(live.request): live.request for live in self._live.values()}.values():
            opened.answer.fail(self._dead())
        self._live.clear()

    def _lose_engine(self) -> None:
        self._stalled = ""
        self._aborts.clear()  # nobody knows those sequences any more

    def on_outputs(self, outputs: StepOutputs) -> None:
        """Record a step, then speak: one call a step, a few microseconds a token."""
        now = self._clock()
        intervals: dict[float, int] = {}
        gains, num_tokens = outputs.gains, 0
        for output in gains.outputs:
            num_tokens += self._take(output, now, intervals)
        for seq_id, token_id in zip(gains.seq_ids, gains.token_ids, strict=True):
            num_tokens += self._take(SequenceOutput(seq_id, [token_id]), now, intervals)
        self.metrics.take_step(outputs.stats, now, num_tokens, intervals)

    def _take(self, output: SequenceOutput, now: float, intervals: dict[float, int]) -> int:
        """The number of tokens that count."""
        self._recovery.take_output(output.seq_id)
        live = self._live.get(output.seq_id)
        if live is None:  # aborted while the engine computed it
            return 0
        if output.token_ids:
            self._count_latency(live, now, intervals)
        delta = live.take(output)
        live.request.answer.put(delta, shows=live.shows(delta))
        if delta.finish_reason is not None:
            if output.finish_reason is None:  # a stop string, of which the engine knows nothing
                self._aborts.append(output.seq_id)
            self._finish(live, delta.finish_reason, now)
        return len(delta.token_ids)

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

    def _open(self, request: Request, is_whole: bool) -> OpenRequest:
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
        opened = OpenRequest(row, Answer(len(row.choices), self._send_aborts), since=now, is_whole=is_whole)
        for choice in row.choices:
            detokenizer = None if rules is None else Detokenizer(rules)
            self._live[choice.seq_id] = LiveChoice(choice, opened, detokenizer, token_text, now)
        self.metrics.take_request(len(row.choices))
        return opened

    def _close(self, opened: OpenRequest) -> None:
        self._recovery.forget(opened.row)
        for seq_id in self._table.close(opened.row):
            self.metrics.take_finished("abort")
            if self._live.pop(seq_id, None) is not None:
                self._aborts.append(seq_id)

    async def _send_aborts(self) -> None:
        """Tell the engine what to forget; whoever waits or leaves next does it, since a step only notes it."""
        engine = self._recovery.engine
        if self._aborts and engine is not None:
            seq_ids, self._aborts = self._aborts, []
            # half a message would damage all that follow; an engine that is gone has forgotten everything
            with anyio.CancelScope(shield=True), suppress(AphroError):
                await engine.send(AbortSequences(seq_ids))

    def _give_up(self, row: Row, error: RequestFailedError) -> None:
        opened = [live.request for choice in row.choices if (live := self._live.pop(choice.seq_id, None))]
        if opened:
            opened[0].answer.fail(error)

    def _dead(self) -> EngineDeadError:
        """A new error for each stream, so that each has its own traceback."""
        failure = self._failure
        assert failure is not None
        error = EngineDeadError(failure.message, hint=failure.hint, exit_code=failure.exit_code)
        error.__cause__ = failure
        return error
