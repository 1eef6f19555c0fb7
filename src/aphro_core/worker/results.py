"""Waits for launched steps on a thread of its own, in order, so that whoever launches never waits."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from aphro_core.messages.steps import StepResult
from aphro_core.worker.step import LaunchedStep


class Results:
    """``put`` a step; ``send`` gets its result. Leaving the block ends the thread, once what was put is done."""

    def __init__(
        self,
        send: Callable[[StepResult], None],
        errors: Callable[[BaseException], None],
        enter_thread: Callable[[], None],
    ) -> None:
        """All are called on the thread, ``enter_thread`` first; ``errors`` with whatever a result raised, after which
        none follows."""
        self._enter_thread = enter_thread
        self._send = send
        self._errors = errors
        self._steps: SimpleQueue[LaunchedStep | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="step-results", daemon=True)

    def put(self, step: LaunchedStep) -> None:
        self._steps.put(step)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._steps.put(None)
        self._thread.join(timeout=0.0 if error is not None else 1.0)

    def _run(self) -> None:
        self._enter_thread()
        while (step := self._steps.get()) is not None:
            try:
                self._send(step.result())
            except BaseException as error:
                self._errors(error)
                return


def freeze_heap() -> None:
    """What lives now lives for ever: the collector need not look at it again in every pass."""
    gc.collect()
    gc.freeze()
