"""A step that was launched: what a worker hands out at once, and its result when the device is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from aphro_core.errors import AphroError, ExitCode
from aphro_core.messages.steps import PromptLogprobs, SampledToken, StepPlan, StepResult
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
    """A step on a GPU: its tokens are on the way into pinned memory, and an event says when they are there."""

    def __init__(
        self, plan: StepPlan, seq_ids: Sequence[int | None], tokens: Tensor, prompt_logprobs: list[PromptLogprobs]
    ) -> None:
        """``tokens`` [rows] int64 on the device, -1 where none could be drawn; None in ``seq_ids``: not wanted."""
        self._plan = plan
        self._seq_ids = seq_ids
        self._prompt_logprobs = prompt_logprobs
        self._event: torch.cuda.Event | None = None
        if tokens.is_cuda:
            # the allocator keeps freed pinned memory until the copies out of and into it are done
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._tokens = tokens.clone()

    def result(self) -> StepResult:
        if self._event is not None:
            self._event.synchronize()
        token_ids: list[int] = self._tokens.tolist()
        drawn = [
            SampledToken(seq_id, token_id)
            for seq_id, token_id in zip(self._seq_ids, token_ids, strict=True)
            if seq_id is not None
        ]
        if bad := [token.seq_id for token in drawn if token.token_id < 0]:
            others = f" (and {len(bad) - 1} more sequences of this step)" if len(bad) > 1 else ""
            message = f"sequence {bad[0]} has no token to draw: its logits are not finite{others}"
            return failed_step(self._plan, SamplingError(message, bad, hint="try --dtype float32 or bfloat16"), bad)
        return StepResult(self._plan.step_id, drawn, self._prompt_logprobs)


def empty_result(plan: StepPlan) -> FinishedStep:
    return FinishedStep(StepResult(step_id=plan.step_id, sampled=[]))


class SamplingError(AphroError):
    """Rows for which no token can be chosen; ``seq_ids`` are theirs, the other rows of the step are sound."""

    exit_code = ExitCode.ENGINE

    def __init__(self, message: str, seq_ids: list[int], *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.seq_ids = seq_ids
