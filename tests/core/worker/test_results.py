"""Steps are waited for on a thread of its own: in order, and the first that fails ends it."""

from __future__ import annotations

import threading
from typing import Any

from aphro_core.messages.steps import StepResult
from aphro_core.worker.results import Results
from aphro_core.worker.step import FinishedStep


class SlowStep:
    def __init__(self, step_id: int, is_done: threading.Event) -> None:
        self._step_id, self._is_done = step_id, is_done

    def result(self) -> StepResult:
        assert self._is_done.wait(10)
        return StepResult(self._step_id, [])


class FailingStep:
    def result(self) -> StepResult:
        raise RuntimeError("the device is gone")


def test_results_come_in_order_and_nobody_waits_for_them() -> None:
    sent: list[Any] = []
    is_done, came = threading.Event(), threading.Event()

    def send(result: StepResult) -> None:
        sent.append((result.step_id, threading.current_thread().name))
        if result.step_id == 2:
            came.set()

    entered: list[str] = []
    with Results(send, sent.append, lambda: entered.append(threading.current_thread().name)) as results:
        results.put(SlowStep(1, is_done))
        results.put(FinishedStep(StepResult(2, [])))
        assert sent == []
        is_done.set()
        assert came.wait(10)
    assert sent == [(1, "step-results"), (2, "step-results")]
    assert entered == ["step-results"]


def test_a_failure_is_told_and_nothing_follows() -> None:
    sent: list[Any] = []
    failed = threading.Event()

    def fail(error: BaseException) -> None:
        sent.append(error)
        failed.set()

    with Results(sent.append, fail, lambda: None) as results:
        results.put(FailingStep())
        results.put(FinishedStep(StepResult(2, [])))
        assert failed.wait(10)
    assert [str(error) for error in sent] == ["the device is gone"]
