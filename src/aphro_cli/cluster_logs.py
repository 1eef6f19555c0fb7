"""``aphro cluster logs``: every node's log at once, each line with where it is from."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

import typer

from aphro_core.cluster.asking import follow_log, membership, read_status
from aphro_core.cluster.messages import AskLog
from aphro_core.errors import ClusterError, ExitCode

if TYPE_CHECKING:
    from aphro_cli.console import Console
    from aphro_core.cluster.membership import Membership
    from aphro_core.cluster.messages import Node

_LOOK_SECONDS: Final = 2.0  # for nodes that join, and ranks that start, while others are followed


class _Printer:
    """One node's log, printed by a thread. ``problem``: why it ended, or never began."""

    def __init__(self, console: Console, here: Membership, node: Node, request: AskLog) -> None:
        self.problem = ""
        self.has_begun = False
        self._thread = threading.Thread(target=self._print, args=(console, here, node, request), daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        self._thread.join(seconds)

    def _print(self, console: Console, here: Membership, node: Node, request: AskLog) -> None:
        where = node.name if request.rank is None else f"{node.name} rank {request.rank}"
        try:
            for lines in follow_log(here, node, request):
                self.has_begun = True
                if lines:
                    typer.echo("\n".join(f"[{where}] {line}" for line in lines))
        except ClusterError as error:
            self.problem = error.message
            if request.rank is None:
                console.warn(f"{node.name}: {error.message}")


def print_logs(console: Console, rank: int | None, num_lines: int, follow: bool) -> int:
    """One node after the other, or all at once and those that join later. Raises ClusterError where no node has it."""
    here = membership()
    printers: dict[str, _Printer] = {}
    request = AskLog(rank, num_lines, follow)
    for row in read_status(here).rows:
        printers[row.node.id] = _Printer(console, here, row.node, request)
        if not follow:
            printers[row.node.id].wait()
    while follow:
        _wait(printers)
        _raise_if_none(printers, rank)
        _look_again(console, here, request, printers)
    _raise_if_none(printers, rank)
    return ExitCode.OK


def _wait(printers: dict[str, _Printer]) -> None:
    """In short steps: Ctrl-C is heard in between."""
    until = time.monotonic() + _LOOK_SECONDS
    while time.monotonic() < until and any(printer.is_alive for printer in printers.values()):
        next(printer for printer in printers.values() if printer.is_alive).wait(0.2)


def _look_again(console: Console, here: Membership, request: AskLog, printers: dict[str, _Printer]) -> None:
    """Follow nodes that have joined, and those that have a log by now: a rank moves where its host fails."""
    try:
        rows = read_status(here).rows
    except ClusterError:
        return  # those that are followed go on, and in the end they say who is gone
    for row in rows:
        known = printers.get(row.node.id)
        if known is None or not (known.has_begun or known.is_alive):
            printers[row.node.id] = _Printer(console, here, row.node, request)


def _raise_if_none(printers: dict[str, _Printer], rank: int | None) -> None:
    problems = [printer.problem for printer in printers.values() if printer.problem and not printer.is_alive]
    if len(problems) == len(printers):
        hint = "aphro cluster status shows which models run" if rank is not None else "aphro cluster status"
        raise ClusterError(problems[0] if len(problems) == 1 else f"no node has that: {'; '.join(problems)}", hint=hint)
