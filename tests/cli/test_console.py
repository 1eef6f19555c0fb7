"""What the operator reads: in a log without escape codes and without a flood, on a terminal with bars."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console as Screen

from aphro_cli.console import (
    Console,
    LogLevel,
    TerminalConsole,
    has_style,
    open_console,
    printable,
    render_table,
    run_reported,
)
from aphro_core.errors import ExitCode, ModelError

CURL = "curl http://127.0.0.1:2242/v1/chat/completions -d '" + "x" * 200 + "'"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plain(level: LogLevel = "info") -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(stream, level), stream


def terminal() -> tuple[TerminalConsole, io.StringIO]:
    stream = Terminal()
    return TerminalConsole(Screen(file=stream, force_terminal=True, width=60)), stream


def test_log_lines_have_timestamps_and_no_escapes() -> None:
    console, stream = plain()
    console.line("Device cpu: no GPU visible.")
    console.table("llama", ("rank", "heads"), [("0", "5/2"), ("1", "4/1")])
    console.ready("http://127.0.0.1:2242", "smollm2", CURL)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1 + 4 + 2
    assert [line for line in lines if not re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d .", line)] == []
    assert "\x1b" not in stream.getvalue()
    assert lines[-1].endswith(CURL)


def test_progress_in_a_log_is_a_few_lines() -> None:
    clock, stream = Clock(), io.StringIO()
    console = Console(stream, clock=clock)
    for step in range(1001):
        clock.now = step / 10  # 100 seconds in steps of 0.1 %
        console.progress("0:weights", step, 1000, "rank 0: weights")
    shares = re.findall(r"rank 0: weights: (\d+)%", stream.getvalue())
    assert shares == ["0", "10", "20", "30", "40", "50", "60", "70", "80", "90", "100"]


def test_slow_progress_still_speaks() -> None:
    clock, stream = Clock(), io.StringIO()
    console = Console(stream, clock=clock)
    for second in range(0, 121):
        clock.now = second
        console.progress("0:weights", second, 100_000, "weights")
    assert len(stream.getvalue().splitlines()) == 5  # at 0, 30, 60, 90 and 120 s


def test_finished_progress_is_said_once_and_work_may_begin_again() -> None:
    console, stream = plain()
    for done in (0, 10, 10, 10, 0, 10):
        console.progress("key", done, 10, "work")
    assert re.findall(r"(\d+)%", stream.getvalue()) == ["0", "100", "0", "100"]


def test_work_in_one_go_has_no_share() -> None:
    """Nor a line at its end where that comes soon: there are many ranks."""
    clock, stream = Clock(), io.StringIO()
    console = Console(stream, clock=clock)
    console.progress("meet", 0, 1, "rank 0: rendezvous")
    console.progress("quick", 0, 1, "rank 0: cache")
    clock.now = 1
    console.progress("quick", 1, 1, "rank 0: cache")
    clock.now = 5
    console.progress("meet", 1, 1, "rank 0: rendezvous")
    console.progress("empty", 0, 0, "nothing")
    console.progress("quick", 0, 1, "rank 0: cache")
    assert [line[20:] for line in stream.getvalue().splitlines()] == [
        "rank 0: rendezvous ...",
        "rank 0: cache ...",
        "rank 0: rendezvous: done",
        "nothing: done",
        "rank 0: cache ...",
    ]


def test_levels() -> None:
    said = {}
    for level in ("info", "warning", "error"):
        console, stream = plain(level)  # type: ignore[arg-type]
        console.line("talk")
        console.progress("key", 1, 1, "work")
        console.warn("careful")
        console.error("broken", "mend it")
        said[level] = stream.getvalue()
    assert "talk" in said["info"]
    assert said["warning"] == "warning: careful\nerror: broken\ntry: mend it\n"
    assert said["error"] == "error: broken\ntry: mend it\n"


def test_terminal_shows_bars_and_text_above_them() -> None:
    console, stream = terminal()
    console.progress("0", 1, 2, "rank 0: [weights]")
    console.line("a line between")
    console.progress("0", 2, 2, "rank 0: [weights]")
    text = stream.getvalue()
    assert "rank 0: [weights]" in text  # brackets are text, not markup
    assert "100%" in text
    assert "a line between" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is back


def test_bars_end_when_results_are_in() -> None:
    console, stream = terminal()
    console.progress("0", 0, 1, "never finished")
    console.progress("1", 5, 5, "finished")
    console.table("title", ("a",), [("1",)])
    console.ready("http://127.0.0.1:2242", "smollm2", CURL)
    end = stream.getvalue().rindex("\x1b[?25h")
    assert end < stream.getvalue().index("title")
    last_frame = stream.getvalue()[:end].rsplit("\x1b[2K", maxsplit=1)[-1]
    assert "finished" in last_frame
    assert "never" not in last_frame


def test_an_error_stops_the_bars() -> None:
    console, stream = terminal()
    console.progress("0", 1, 2, "rank 0")
    console.error("rank 0 died", "look")
    assert stream.getvalue().rindex("\x1b[?25h") < stream.getvalue().index("error: rank 0 died")


def test_terminal_leaves_lines_whole() -> None:
    console, stream = terminal()
    console.ready("http://127.0.0.1:2242", "smollm2", CURL)
    assert CURL in stream.getvalue()


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    console, stream = terminal()
    console.error("broken", None)
    assert "\x1b[1;31m" in stream.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    console, stream = terminal()
    console.error("broken", None)
    assert "31m" not in stream.getvalue()
    assert "error: broken" in stream.getvalue()


def test_bars_only_where_somebody_looks() -> None:
    assert isinstance(open_console("info", Terminal(), term="xterm"), TerminalConsole)
    assert not isinstance(open_console("info", Terminal(), term="dumb"), TerminalConsole)
    assert not isinstance(open_console("debug", Terminal(), term="xterm"), TerminalConsole)
    assert not isinstance(open_console("info", io.StringIO(), term="xterm"), TerminalConsole)


def test_a_closed_stream_stops_nothing() -> None:
    console, stream = plain()
    stream.close()
    console.line("nobody hears")
    console.error("nobody hears", None)


def test_control_characters_are_spelled_out() -> None:
    console, stream = plain()
    console.line("model \x1b[2Jname\r\x07")
    assert stream.getvalue().endswith("model \\x1b[2Jname\\r\\x07\n")
    assert printable("ä\tb\nc") == "ä\tb\nc"


def fail(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ModelError("no such model", hint="look"), ExitCode.MODEL, "error: no such model\ntry: look\n"),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED, "error: interrupted\n"),
        (KeyError("x"), ExitCode.INTERNAL, "error: unexpected KeyError: 'x'\ntry: again with --log-level debug"),
    ],
)
def test_errors_become_exit_codes(error: BaseException, code: ExitCode, text: str) -> None:
    console, stream = plain()
    assert run_reported(console, lambda: fail(error)) == code
    assert stream.getvalue().startswith(text)
    assert "Traceback" not in stream.getvalue()


def test_debug_shows_what_lies_behind() -> None:
    console, stream = plain("debug")
    assert run_reported(console, lambda: fail(KeyError("x"))) == 1
    assert stream.getvalue().startswith("Traceback")
    console, stream = plain("debug")
    error = ModelError("rank 1 died")
    error.add_note("Traceback of rank 1")
    run_reported(console, lambda: fail(error))
    assert stream.getvalue() == "Traceback of rank 1\nerror: rank 1 died\n"


def test_success_is_silent() -> None:
    console, stream = plain()
    assert run_reported(console, lambda: 0) == 0
    assert stream.getvalue() == ""


def test_tables_align() -> None:
    lines = render_table("title", ("rank", "device"), [("0", "cpu"), ("10", "cuda:7")])
    assert lines == ["title", "  rank  device", "     0  cpu", "    10  cuda:7"]
    assert render_table("empty", ("a", "b"), []) == ["empty", "  a  b"]


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_style_is_for_terminals_that_want_it(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert has_style(Terminal())
    assert not has_style(io.StringIO())
    monkeypatch.setenv(name, value)
    assert not has_style(Terminal())
