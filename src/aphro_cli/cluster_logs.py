"""``aphro cluster logs``: every node's log at once, each line with where it is from."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import typer

from aphro_core.cluster.asking import follow_log, membership, read_status
from aphro_core.cluster.messages import AskLog
from aphro_core.errors import ClusterError, ExitCode

if TYPE_CHECKING:
    from aphro_cli.console import Console
    from aphro_core.cluster.membership import Membership
    from aphro_core.cluster.messages import Node


def print_logs(console: Console, rank: int | None, num_lines: int, follow: bool) -> int:
    """All nodes at once while they are followed, else one after the other. Raises ClusterError where no node has it."""
    here = membership()
    nodes = [row.node for row in read_status(here).rows]
    request = AskLog(rank, num_lines, follow)
    problems: list[str] = []
    printers = [
        threading.Thread(target=_print_log, args=(console, here, node, request, problems), daemon=True)
        for node in nodes
    ]
    for printer in printers:
        printer.start()
        if not follow:
            printer.join()
    for printer in printers:
        while printer.is_alive():
            printer.join(0.2)  # Ctrl-C is heard in between
    if len(problems) == len(nodes):
        hint = "aphro cluster status shows which models run" if rank is not None else "aphro cluster status"
        raise ClusterError(problems[0] if len(problems) == 1 else f"no node has that: {'; '.join(problems)}", hint=hint)
    return ExitCode.OK


def _print_log(console: Console, here: Membership, node: Node, request: AskLog, problems: list[str]) -> None:
    where = node.name if request.rank is None else f"{node.name} rank {request.rank}"
    try:
        for lines in follow_log(here, node, request):
            if lines:
                typer.echo("\n".join(f"[{where}] {line}" for line in lines))
    except ClusterError as error:
        problems.append(error.message)
        if request.rank is None:
            console.warn(f"{node.name}: {error.message}")
