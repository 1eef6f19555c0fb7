"""``aphro top``: pages of any width, lines, JSON, and servers that come and go."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from aphro_cli.main import app
from aphro_cli.top_view import render_line, render_page
from aphro_core.client.metrics_text import Load, RankRow
from aphro_core.client.watch import Look
from aphro_core.errors import ExitCode
from aphro_core.frontend.metrics import Metrics
from aphro_core.messages.requests import EngineReady, EngineStats
from aphro_core.messages.steps import WorkerLoaded
from tests.core.server.fake_frontend import FakeFrontend, FakeHealth
from tests.core.server.loopback import loopback

GIB = 2**30
BUSY = Load(128, 4096, 0.987, 123456, 123456.7, 98765.4, 12.34, 0.987, 12, 3)
RANKS = tuple(RankRow(rank, "node-with-a-long-name", f"cuda:{rank}", 70 * GIB, 60 * GIB) for rank in range(8))
LOOKS = [
    Look("http://127.0.0.1:2242", "ready", "model", BUSY, RANKS),
    Look("http://a-host-with-a-very-long-name.example.org:65535", "recovering", "model", BUSY, RANKS[:3:2]),
    Look("http://node2:2242", "unreachable", error="no server answers at http://node2:2242: " + "because " * 30),
]


def metrics(num_tokens: int = 0) -> Metrics:
    """Those of a server with two ranks that has made ``num_tokens`` tokens."""
    found = Metrics("model")
    ranks = [WorkerLoaded(rank, 1, "vm", "cpu", GIB, 0, GIB, 2**20, 1024, 0) for rank in (0, 1)]
    found.take_engine(EngineReady(512, 4096, ranks))
    found.take_request(1)
    found.take_first_token(10, 0.2)
    found.take_step(EngineStats(1, 1, 0, 128, 0, 0, 0), 1.0, num_tokens, {0.03: 5})
    return found


def top(*words: object) -> Any:
    return CliRunner().invoke(app, ["top", *map(str, words)], env={"APHRO_API_KEY": None})


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_page_fits(width: int) -> None:
    lines = render_page(LOOKS, width, "12:34:56", 2.0)
    assert max(map(len, lines)) <= width
    page = "\n".join(lines)
    assert "\x1b" not in page
    for shown in (
        "98.7%",
        "123457",
        "12.3s",
        "987ms",
        "recovering",
        "unreachable",
        "0-7",
        "480.00 GiB",
        "cuda:0 to cuda:7",
        "0,2",
    ):
        assert shown in page, shown
    assert ("█" in page) == (width > 80)
    assert "127.0.0.1:2242: engines died and replaced since its start: 3" in page


def test_lines_have_no_more_than_they_know() -> None:
    unknown = Load(*[None] * 10)
    assert render_line(Look("http://x:1", "ready", None, unknown), "12:00:00") == (
        "12:00:00 x:1 ready running - waiting - kv - output -/s prompt -/s first - between -"
    )
    assert render_line(Look("http://x:1", "dead", error="gone\x1b[2J"), "12:00:00") == "12:00:00 x:1 dead: gone\\x1b[2J"


class Scraped:
    """Metrics of a server that makes 50 tokens between the first scrape and the second."""

    content_type = Metrics.content_type

    def __init__(self) -> None:
        self._renderings = [metrics().render(), metrics(50).render()]

    def render(self) -> bytes:
        return self._renderings.pop(0)


def test_rates_and_devices_of_a_server() -> None:
    """The second look sees what came between the two."""
    with loopback(FakeFrontend(metrics=Scraped())) as server:  # type: ignore[arg-type]
        result = top(server.url, "--count", 2, "--interval", 0.4, "--json")
    assert result.exit_code == 0, result.stderr
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["load"]["output_rate"] is None
    assert 50 / 10 < second["load"]["output_rate"] <= 50 / 0.2  # a busy machine looks later, and then sooner
    assert (second["phase"], second["model"]) == ("ready", "model")
    assert (second["load"]["running"], second["load"]["kv_share"]) == (1, 0.25)
    assert second["ranks"][1] == {
        "rank": 1, "host": "vm", "device": "cpu", "weights_bytes": GIB, "kv_bytes": 512 * 2**20
    }  # fmt: skip


def test_several_servers_in_a_pipe() -> None:
    with loopback(FakeFrontend(metrics=metrics())) as one, loopback(  # type: ignore[arg-type]
        FakeFrontend(state=FakeHealth("recovering", ready=False))
    ) as two:  # fmt: skip
        result = top(one.url, two.url, "127.0.0.1:1", one.url, "--count", 1)
    assert result.exit_code == ExitCode.SERVER
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert " ready running 1 waiting 0 kv 25.0% output -/s" in lines[0]
    assert " recovering " in lines[1]
    assert " 127.0.0.1:1 unreachable: no server answers" in lines[2]
    assert "\x1b" not in result.stdout


def test_a_key_is_asked_for() -> None:
    with loopback(api_keys=("secret",)) as server:
        refused = top(server.url, "--count", 1)
        assert (refused.exit_code, "answered 401" in refused.stdout) == (ExitCode.SERVER, True)
        assert top(server.url, "--count", 1, "--api-key", "secret").exit_code == 0


def on_terminal(*words: str, **environment: str) -> tuple[int, str]:
    """Runs it on a pseudo-terminal of 80 columns until it ends; SIGINT after the first page."""
    fd, child = pty.openpty()
    command = [sys.executable, "-m", "aphro_cli.main", "top", *words]
    variables = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24", **environment}
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=variables, start_new_session=True)
    os.close(child)
    screen, is_told = "", False
    while True:
        try:
            screen += os.read(fd, 65536).decode(errors="replace")
        except OSError:  # the other end is closed
            break
        if "next" in screen and "vm" in screen and not is_told:
            process.send_signal(signal.SIGINT)
            is_told = True
    os.close(fd)
    return process.wait(10), screen


def test_on_a_terminal() -> None:
    with loopback(FakeFrontend(metrics=metrics())) as server:  # type: ignore[arg-type]
        code, screen = on_terminal(server.url, NO_COLOR="")
        plain_code, plain = on_terminal(server.url, NO_COLOR="1")
        dumb_code, dumb = on_terminal(server.url, "--count", "1", TERM="dumb")
    assert (code, plain_code, dumb_code) == (0, 0, 0), screen + plain + dumb
    assert screen.startswith("\x1b[?1049h")
    assert screen.rstrip().endswith(("\x1b[?25h", "\x1b[?1049l"))
    assert "\x1b[32m" in screen
    assert "\x1b[32m" not in plain
    assert "\x1b" not in dumb


def test_a_reader_that_has_enough() -> None:
    """``aphro top | head -1``: no traceback, no failure, no process that stays."""
    with loopback(FakeFrontend(metrics=metrics())) as server:  # type: ignore[arg-type]
        command = [sys.executable, "-m", "aphro_cli.main", "top", server.url, "--interval", "0.1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stderr is not None
        assert " ready " in process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == 0
        assert process.stderr.read() == ""
        process.stderr.close()
