"""A step that was launched: what a worker hands out at once, and its result when the device is done."""

from __future__ import annotations

from typing import Protocol

from aphro_core.errors import AphroError, ExitCode
from aphro_core.messages.steps import PromptLogprobs, StepResult
from aphro_core.worker.answers import Answer
from aphro_core.worker.step_failure import failed_step


class LaunchedStep(Protocol):
    def result(self) -> StepResult:
        """Wait for the step if need be, then its answer. Called once, on any thread."""


class FinishedStep:
    """A step whose answer is known already."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


class RunningStep:
    """A step on a GPU: its tokens are on their way."""

    def __init__(
        self,
        step_id: int,
        seq_ids: list[int],
        answer: Answer,
        prompt_logprobs: list[PromptLogprobs],
        wanted: list[int] | None = None,
    ) -> None:
        """``answer``: the tokens of the sequences ``seq_ids``, -1 where none could be drawn.

        ``wanted``: which of them are, by index; None: all.
        """
        self._step_id = step_id
        self._seq_ids = seq_ids
        self._answer = answer
        self._wanted = wanted
        self._prompt_logprobs = prompt_logprobs

    def result(self) -> StepResult:
        seq_ids, token_ids = self._seq_ids, self._answer.read()
        if self._wanted is not None:
            seq_ids, token_ids = [seq_ids[i] for i in self._wanted], [token_ids[i] for i in self._wanted]
        if token_ids and min(token_ids) < 0:
            return self._without_tokens([i for i, token in zip(seq_ids, token_ids, strict=True) if token < 0])
        return StepResult(self._step_id, token_ids, prompt_logprobs=self._prompt_logprobs)

    def _without_tokens(self, bad: list[int]) -> StepResult:
        others = f" (and {len(bad) - 1} more sequences of this step)" if len(bad) > 1 else ""
        message = f"sequence {bad[0]} has no token to draw: its logits are not finite{others}"
        return failed_step(self._step_id, SamplingError(message, bad, hint="try --dtype float32 or bfloat16"), bad)


def empty_result(step_id: int) -> FinishedStep:
    return FinishedStep(StepResult(step_id, []))


class SamplingError(AphroError):
    """Rows for which no token can be chosen; ``seq_ids`` are theirs, the other rows of the step are sound."""

    exit_code = ExitCode.ENGINE

    def __init__(self, message: str, seq_ids: list[int], *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.seq_ids = seq_ids
