"""``aphro top``: what running servers do, live on a terminal, as lines elsewhere."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

from aphro_cli import server_options as srv
from aphro_cli.console import open_console, run_reported
from aphro_core.errors import ExitCode

if TYPE_CHECKING:
    from aphro_core.client.watch import Look

EXAMPLES: Final = """\b
Examples:
  aphro top                              the server on this host, every 2 seconds
  aphro top node1 node2:8000             several servers on one page
  aphro top --count 1                    one look; code 9 if a server is not ready
  aphro top | tee top.log                plain lines where the output is no terminal
  aphro top --json --count 5 | jq .load  an object a look
"""

Urls = Annotated[
    list[str] | None,
    typer.Argument(metavar="[URL...]", help=f"The servers; default: {srv.DEFAULT_URL}.", show_default=False),
]
Interval = Annotated[float, typer.Option("--interval", "-i", min=0.1, help="Seconds between two looks.")]
Count = Annotated[int | None, typer.Option("--count", min=1, help="Looks, then end; default: until Ctrl-C.")]


def top(
    urls: Urls = None,
    interval: Interval = 2.0,
    count: Count = None,
    api_key: srv.ApiKey = None,
    timeout: srv.Timeout = 5.0,
    as_json: srv.Json = False,
) -> None:
    """Show what running servers do, live."""
    console = open_console("info", term=os.environ.get("TERM", ""))

    def work() -> int:
        import anyio

        from aphro_core.client.address import parse_base_url
        from aphro_core.client.watch import Watch

        base_urls = dict.fromkeys(parse_base_url(url) for url in urls or [srv.DEFAULT_URL])
        watch = Watch(list(base_urls), api_key=srv.first_key(api_key), timeout=timeout)
        last: list[Look] = []
        with ExitStack() as stack:
            paint = _painter(stack, interval, as_json)

            def show(looks: list[Look]) -> None:
                last[:] = looks
                paint(looks)

            try:
                anyio.run(watch.run, interval, count, show)
            except KeyboardInterrupt:
                return ExitCode.OK  # how a page that has no end is left
        return ExitCode.OK if all(look.phase == "ready" and not look.error for look in last) else ExitCode.SERVER

    raise typer.Exit(run_reported(console, work))


def _painter(stack: ExitStack, interval: float, as_json: bool) -> Callable[[list[Look]], None]:
    """How looks are shown: JSON, a page that is painted over, or lines."""
    from aphro_cli.top_view import look_to_json, render_line, render_page

    def write_json(looks: list[Look]) -> None:
        when = datetime.now().astimezone().isoformat(timespec="seconds")
        for look in looks:
            typer.echo(json.dumps(look_to_json(look, when)))

    def write_lines(looks: list[Look]) -> None:
        for look in looks:
            typer.echo(render_line(look, f"{datetime.now():%H:%M:%S}"))
        sys.stdout.flush()

    if as_json:
        return write_json
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return write_lines
    from rich.console import Console as Screen
    from rich.live import Live
    from rich.text import Text

    screen = Screen()
    live = stack.enter_context(Live(console=screen, screen=True, auto_refresh=False, vertical_overflow="crop"))

    def paint(looks: list[Look]) -> None:
        lines = render_page(looks, max(screen.width, 80), f"{datetime.now():%H:%M:%S}", interval)
        page = Text("\n".join(lines), no_wrap=True, overflow="crop")
        page.highlight_regex(r"\b(unreachable|recovering|stalled|dead|not ready)\b", "bold red")
        page.highlight_regex(r"\bready\b", "green")
        live.update(page, refresh=True)

    return paint
