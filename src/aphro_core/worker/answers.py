"""Tokens on their way to the host: lines of pinned memory that steps in flight write, and events that say when."""

from __future__ import annotations

import threading
from typing import Final

import numpy as np
import torch

_LINES: Final = 64  # far more than there are steps in flight


class Answer:
    """The tokens of one step. ``place`` is that of its first row among all lines."""

    def __init__(self, place: int, line: np.ndarray, event: torch.cuda.Event | None) -> None:
        self.place = place
        self._line, self._event = line, event
        self._count = 0
        self._tokens: list[int] | None = None
        self._lock = threading.Lock()

    def expect(self, count: int) -> None:
        """All has been launched that writes ``count`` tokens."""
        self._count = count
        if self._event is not None:
            self._event.record()

    def read(self) -> list[int]:
        """Waits for them. On any thread, any number of times."""
        with self._lock:
            if self._tokens is None:
                if self._event is not None:
                    self._event.synchronize()
                self._tokens = self._line[: self._count].tolist()
            return self._tokens


class Answers:
    def __init__(self, max_rows: int, device: torch.device) -> None:
        is_gpu = device.type == "cuda"
        self.memory = torch.zeros(_LINES, max_rows, dtype=torch.int64, pin_memory=is_gpu)
        self._lines = list(self.memory.numpy())
        self._events: list[torch.cuda.Event | None] = [
            torch.cuda.Event() if is_gpu else None  # type: ignore[no-untyped-call]
            for _ in range(_LINES)
        ]
        self._taken: list[Answer | None] = [None] * _LINES
        self._next = 0

    def take(self) -> Answer:
        """The next line, below the one before, as the device goes on by itself; its last step is read if nobody has."""
        at = self._next
        self._next = (at + 1) % _LINES
        if (last := self._taken[at]) is not None:
            last.read()
        answer = self._taken[at] = Answer(at * self.memory.shape[1], self._lines[at], self._events[at])
        return answer
