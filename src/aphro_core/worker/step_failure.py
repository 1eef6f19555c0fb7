"""A step that failed, as the engine is told of it, and which exceptions leave a rank fit for the next step."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

from aphro_core.messages.steps import StepFailure, StepResult


def failed_step(step_id: int, error: Exception, seq_ids: Sequence[int] | None = None) -> StepResult:
    """``seq_ids`` may be the reason; None: any of the step's. The traceback goes along, for the log alone."""
    detail = "".join(traceback.format_exception(error))
    suspects = None if seq_ids is None else list(seq_ids)
    failure = StepFailure(f"{type(error).__name__}: {error}"[:500], suspects, detail[-8000:])
    return StepResult(step_id, [], failure=failure)


def is_survivable(error: Exception) -> bool:
    """Whether device and group still compute: memory that ran out, or a plain exception, but no error of CUDA itself.

    After an illegal address or a failed kernel every later call of that process fails too.
    """
    text = str(error)
    if is_echo(error):
        return False
    is_out_of_memory = isinstance(error, MemoryError) or "out of memory" in text
    return is_out_of_memory or not ("CUDA" in text or "cuda" in text or "NCCL" in text)


def is_echo(error: BaseException) -> bool:
    """Whether the error only says that a peer of the group is gone (Gloo and NCCL word it in these ways)."""
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out waiting", "NCCL", "gloo")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
