"""Waits for launched steps on a thread of its own, in order, so that whoever launches never waits."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Final, Self

from aphro_core.messages.steps import StepResult
from aphro_core.worker.step import LaunchedStep

_END_SECONDS: Final = 1.0


class Results:
    """``put`` a step; ``send`` gets its result. Leaving the block, or ``end``, ends the thread once what was put is
    done."""

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

    def start(self) -> None:
        self._thread.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.end(_END_SECONDS)
        else:
            self._steps.put(None)

    def end(self, seconds: float) -> bool:
        """Wait for what was put, so many seconds at most. Whether all of it is done."""
        self._steps.put(None)
        if self._thread.ident is not None:  # it was started
            self._thread.join(seconds)
        return not self._thread.is_alive()

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
