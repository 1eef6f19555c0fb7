"""The only printer: what the operator reads on stderr, as plain lines in a log and with progress bars on a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import IO, TYPE_CHECKING, Final, Literal

from aphro_core.errors import AphroError, ExitCode

if TYPE_CHECKING:
    import rich.console
    import rich.progress

LogLevel = Literal["debug", "info", "warning", "error"]

_LEVELS: Final[dict[LogLevel, int]] = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_QUIET_SECONDS: Final = 2.0  # between two progress lines of one piece of work
_QUIET_SHARE: Final = 0.1  # of that work, gained since its last line
_HEARTBEAT_SECONDS: Final = 30.0  # slow work speaks at least this often


class Console:
    """A ``Reporter`` for logs: one timestamped line a message, no escape codes, progress in a few lines.

    Errors and warnings carry no timestamp, so that ``error:`` and ``try:`` start their lines. A closed or full stderr
    loses text and never stops a server.
    """

    def __init__(
        self, stream: IO[str], level: LogLevel = "info", *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._level = _LEVELS[level]
        self._clock = clock
        self._reported: dict[str, tuple[float, float]] = {}  # key -> when it last had a line, and the share then

    def line(self, text: str) -> None:
        if self._level <= _LEVELS["info"]:
            for part in text.split("\n"):
                self._write(f"{self._stamp()}{part}")

    def progress(self, key: str, done: int, total: int, text: str) -> None:
        share = min(done / total, 1.0) if total > 0 else 1.0
        if total == 1 and share == 1.0 and self._was_quick(key):
            self._reported[key] = (self._clock(), share)
        elif self._is_due(key, share):
            self._reported[key] = (self._clock(), share)
            in_one_go = " ..." if share < 1 else ": done"
            self.line(f"{text}: {share:.0%}" if total > 1 else f"{text}{in_one_go}")

    def _was_quick(self, key: str) -> bool:
        """Of work in one go: that it is over need not be said."""
        return key in self._reported and self._clock() - self._reported[key][0] < _QUIET_SECONDS

    def _is_due(self, key: str, share: float) -> bool:
        if key not in self._reported:
            return True
        when, last = self._reported[key]
        quiet = self._clock() - when
        if share < last:
            return True  # the same work began again
        if share == 1.0:
            return last < 1.0
        return quiet >= _HEARTBEAT_SECONDS or (quiet >= _QUIET_SECONDS and share - last >= _QUIET_SHARE)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.line("\n".join(render_table(title, columns, rows)))

    def ready(self, url: str, model: str, curl: str) -> None:
        self.line(f"ready: {model} answers at {url}\ntry: {curl}")

    def warn(self, text: str) -> None:
        if self._level <= _LEVELS["warning"]:
            self._write(f"warning: {text}")

    def error(self, message: str, hint: str | None, details: str = "") -> None:
        """What happened, then what to do; ``details`` (a traceback) are shown at level debug, before them."""
        self.close()
        if details and self._level <= _LEVELS["debug"]:
            self._write(details.rstrip())
        self._write(f"error: {message}")
        if hint:
            self._write(f"try: {hint}")

    def close(self) -> None:
        """Leave nothing that moves on the screen."""

    def _stamp(self) -> str:
        return f"{datetime.now():%Y-%m-%d %H:%M:%S} "

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more; tokens go on
            self._stream.write(printable(text) + "\n")
            self._stream.flush()


class TerminalConsole(Console):
    """A ``Reporter`` for a person: no timestamps, and work that takes long is one moving bar each."""

    def __init__(self, screen: rich.console.Console, level: LogLevel = "info") -> None:
        super().__init__(screen.file, level)
        self._screen = screen
        self._bars: rich.progress.Progress | None = None
        self._tasks: dict[str, rich.progress.TaskID] = {}

    def progress(self, key: str, done: int, total: int, text: str) -> None:
        if self._level > _LEVELS["info"]:
            return
        bars = self._bars or self._start_bars()
        if key not in self._tasks:
            self._tasks[key] = bars.add_task(printable(text), total=None)
        if total > 1 or done >= total:  # work in one go has no share: its bar pulses until it is done
            bars.update(self._tasks[key], completed=done if total > 0 else 1, total=max(total, 1))
        if bars.finished:
            self.close()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._drop_open_bars()
        super().table(title, columns, rows)

    def ready(self, url: str, model: str, curl: str) -> None:
        self._drop_open_bars()
        super().ready(url, model, curl)

    def _drop_open_bars(self) -> None:
        """Results are in: work that never said that it was done must not look as if it were waited for."""
        if self._bars is not None:
            for task in self._bars.tasks:
                self._bars.update(task.id, visible=task.finished)
        self.close()

    def close(self) -> None:
        if self._bars is not None:
            with contextlib.suppress(OSError, ValueError):  # the terminal is gone
                self._bars.stop()
        self._bars = None
        self._tasks = {}

    def _start_bars(self) -> rich.progress.Progress:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        self._bars = Progress(*columns, console=self._screen)
        self._bars.start()
        return self._bars

    def _stamp(self) -> str:
        return ""

    def _write(self, text: str) -> None:
        # soft_wrap: a line that is copied from the screen must not have gained line breaks
        style = "bold red" if text.startswith("error:") else "bold" if text.startswith(("ready:", "try:")) else None
        with contextlib.suppress(OSError, ValueError):
            self._screen.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)


def open_console(level: LogLevel, stream: IO[str] | None = None, *, term: str = "") -> Console:
    """The console for ``stream`` (stderr): moving bars only where somebody sees them move and no debug log cuts in."""
    stream = stream or sys.stderr
    if not stream.isatty() or term == "dumb" or level == "debug":
        return Console(stream, level)
    from rich.console import Console as Screen

    return TerminalConsole(Screen(file=stream), level)


def has_style(stream: IO[str]) -> bool:
    """Whether colours and the like may go there: a terminal that is not dumb, and ``NO_COLOR`` not set."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def run_reported(console: Console, work: Callable[[], int]) -> int:
    """Run ``work`` and return its exit code; an error becomes a message, the next step and its documented code.

    A reader that has closed our stdout (``aphro ... | head``) wanted no more: that ends with 0, silently.
    """
    try:
        return work()
    except KeyboardInterrupt:
        console.error("interrupted", None)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush complains
        return ExitCode.OK
    except AphroError as error:
        console.error(error.message, error.hint, "\n".join(getattr(error, "__notes__", ())))
        return error.exit_code
    except Exception as error:
        hint = "again with --log-level debug for the traceback, and report it: this is a fault of aphro"
        console.error(f"unexpected {type(error).__name__}: {error}", hint, traceback.format_exc())
        return ExitCode.INTERNAL
    finally:
        console.close()


def render_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; figures end where their column ends."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    is_figure = [
        all(cell[:1].isdigit() or cell == "-" for cell in column) and bool(rows) for column in zip(*rows, strict=True)
    ]
    is_figure = is_figure or [False] * len(columns)

    def render_row(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, is_figure, strict=True)
        )
        return ("  " + "  ".join(padded)).rstrip()

    return [title, render_row(columns), *map(render_row, rows)]


def printable(text: str) -> str:
    """``text`` with control characters spelled out: a checkpoint's name must not move the cursor."""
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)
