"""How the core tells a person what it does: a Protocol that the console implements, and one that says nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Reporter(Protocol):
    """Talk for the operator; everything goes to stderr, machine-readable data never does."""

    def line(self, text: str) -> None:
        """One line that stays."""

    def progress(self, key: str, done: int, total: int, text: str) -> None:
        """``done`` of ``total`` of the work named ``key`` is finished (a later figure replaces it)."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A small table."""

    def ready(self, url: str, model: str, curl: str) -> None:
        """The server answers at ``url``; ``curl`` is a line that can be pasted."""


class SilentReporter:
    """For callers that want no talk (tests, ``LLM`` with ``quiet=True``)."""

    def line(self, text: str) -> None: ...

    def progress(self, key: str, done: int, total: int, text: str) -> None: ...

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None: ...

    def ready(self, url: str, model: str, curl: str) -> None: ...
