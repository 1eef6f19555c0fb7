"""One choice on its way: what the engine gained for it becomes tokens of its row, then text, then a delta."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from aphro_core.frontend.answer import Answer
from aphro_core.frontend.detokenizer import Detokenizer
from aphro_core.frontend.request_table import Choice, Row
from aphro_core.messages.requests import SequenceOutput
from aphro_core.messages.steps import TokenLogprobs
from aphro_core.request import Logprob, OutputDelta, PositionLogprobs


@dataclass(slots=True)
class OpenRequest:
    """A request whose stream is open, since the second ``since``. ``is_whole``: its reader wants choices that ended."""

    row: Row
    answer: Answer
    since: float
    is_whole: bool = False
    has_tokens: bool = False


@dataclass(slots=True)
class LiveChoice:
    """A choice that the engine works on. ``detokenizer`` None: the client wants no text."""

    choice: Choice
    request: OpenRequest
    detokenizer: Detokenizer | None
    token_text: Callable[[int], str] | None
    last_token_at: float

    def take(self, output: SequenceOutput) -> OutputDelta:
        """Record what the engine gained, then speak. A stop string ends the choice at the token that completed it."""
        choice, sampling = self.choice, self.request.row.request.sampling
        token_ids, logprobs = output.token_ids.copy(), output.logprobs  # a delta's list grows when it is merged
        choice.output_token_ids += token_ids
        delta = OutputDelta(choice.index, "", token_ids, finish_reason=output.finish_reason)
        if output.finish_reason == "stop":
            delta.stop_reason = self._stop_reason(output.stop_token_id)
        if self.detokenizer is not None:
            delta.text, num_taken = self._speak(self.detokenizer, output, sampling.include_stop_str_in_output)
            if self.detokenizer.stop_string is not None:
                delta.finish_reason, delta.stop_reason = "stop", self.detokenizer.stop_string
                delta.token_ids = token_ids[:num_taken]
                del choice.output_token_ids[len(choice.output_token_ids) - len(token_ids) + num_taken :]
        choice.finish_reason = delta.finish_reason
        if logprobs is not None:
            delta.logprobs = [self._position(entry) for entry in logprobs[: len(delta.token_ids)]]
        if choice.index == 0:  # the prompt is the same for all choices, so the first one speaks of it
            delta.num_cached_tokens = output.num_cached_tokens
            if output.prompt_logprobs is not None:
                delta.prompt_logprobs = [None, *map(self._position, output.prompt_logprobs)]
        return delta

    def shows(self, delta: OutputDelta) -> bool:
        """Whether the client would see anything of it; what it would not see may wait for the next delta."""
        if self.request.is_whole:
            return delta.finish_reason is not None
        has_news = delta.finish_reason is not None or delta.prompt_logprobs is not None
        return bool(delta.text) or has_news or self.detokenizer is None

    def _stop_reason(self, stop_token_id: int | None) -> int | None:
        """The stop token if the client asked for it, None for the model's own end of sequence."""
        return None if stop_token_id in self.request.row.eos_token_ids else stop_token_id

    def _position(self, entry: TokenLogprobs) -> PositionLogprobs:
        """The chosen token first, with its rank; the others are the most likely ones, in order."""
        position: PositionLogprobs = {}
        for rank, (token_id, logprob) in enumerate(zip(entry.token_ids, entry.logprobs, strict=True)):
            if token_id not in position:
                text = None if self.token_text is None else self.token_text(token_id)
                position[token_id] = Logprob(logprob, rank or entry.rank, text)
        return position

    @staticmethod
    def _speak(detokenizer: Detokenizer, output: SequenceOutput, include_stop: bool) -> tuple[str, int]:
        """(text, tokens that count): all of them, or up to the one that completed a stop string."""
        before, token_ids = detokenizer.num_tokens, output.token_ids
        # a stop token is counted but not shown
        hides_last = output.finish_reason == "stop" and not include_stop
        text = detokenizer.push(token_ids[:-1] if hides_last else token_ids)
        if detokenizer.stop_string is not None:
            return text, detokenizer.num_tokens - before
        if output.finish_reason is not None:
            text += detokenizer.finish()
        return text, len(token_ids)
