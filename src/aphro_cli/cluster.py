"""``aphro cluster``: several hosts become one, tell what they are, and end together."""

from __future__ import annotations

import getpass
import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import typer

from aphro_cli import cluster_options as opt
from aphro_cli.console import Console, open_console, run_reported
from aphro_cli.help_option import ShowHelp
from aphro_core.errors import ClusterError, ExitCode

if TYPE_CHECKING:
    from aphro_core.cluster.membership import Membership
    from aphro_core.cluster.messages import Node

UP_EXAMPLES: Final = """\b
Examples:
  aphro cluster up                               start the head here; prints what to type on the other hosts
  aphro cluster up --interface ib0 --devices 4   with the address of ib0, and four of this host's GPUs
  aphro cluster up -e NCCL_DEBUG=INFO -e HF_TOKEN   for the ranks of all nodes; HF_TOKEN as this shell has it
  aphro cluster up --devices 0                   a head that serves and computes nothing
"""
JOIN_EXAMPLES: Final = """\b
Examples:
  APHRO_CLUSTER_TOKEN=... aphro cluster join --head 10.0.0.1
  aphro cluster join --head 10.0.0.1 --token-file token
  ssh head cat .local/state/aphro/cluster/token | aphro cluster join --head 10.0.0.1 --token-file -
  aphro cluster join --head 10.0.0.1 --interface ib0 -e NCCL_SOCKET_IFNAME=ib0
  aphro cluster join --head 10.0.0.1 --wait-timeout 600   the head may come up later
"""
STATUS_EXAMPLES: Final = """\b
Examples:
  aphro cluster status               nodes, devices, memory, versions, models
  aphro cluster status --expect 3    code 10 unless three nodes are in
  aphro cluster status --json | jq '.nodes[].address'
"""
ENV_EXAMPLES: Final = """\b
Examples:
  aphro cluster env                  one column a node; what differs is marked with *
"""
LOGS_EXAMPLES: Final = """\b
Examples:
  aphro cluster logs                 what the members of all nodes did
  aphro cluster logs --rank 3 -f     what rank 3 prints, wherever it runs
"""
PORTS_EXAMPLES: Final = """\b
Examples:
  aphro cluster ports                every port, its purpose, who has it open, and the firewall's line
"""
DOWN_EXAMPLES: Final = """\b
Examples:
  aphro cluster down                 this host leaves; on the head, the whole cluster ends
"""

app = typer.Typer(
    name="cluster",
    help="Make several hosts one cluster.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)


@app.callback()
def cluster(show_help: ShowHelp = False) -> None:
    pass


@app.command("up", epilog=UP_EXAMPLES)
def up(
    advertise: opt.Advertise = None,
    interface: opt.Interface = None,
    port: opt.Port = 22420,
    devices: opt.Devices = None,
    dashboard: opt.Dashboard = False,
    env: opt.Environment = None,
    token: opt.Token = None,
    token_file: opt.TokenFile = None,
    as_json: opt.AsJson = False,
) -> None:
    """Start a cluster: this host becomes its head."""

    def work(console: Console) -> int:
        from aphro_core.cluster.cluster import Asked, start
        from aphro_core.cluster.membership import read_membership
        from aphro_core.cluster.token import given_token
        from aphro_core.environment import parse_assignments

        here = read_membership()
        if here is not None and here.role == "head":
            console.line("the cluster is up already; nothing was changed")
        else:
            asked = Asked(
                advertise=advertise,
                interface=interface,
                port=port,
                devices=devices,
                dashboard=dashboard,
                environment=parse_assignments(env or [], os.environ),
                token=given_token(token, token_file, os.environ),
            )
            here = start(asked, console)
        _print_head(here, as_json)
        return ExitCode.OK

    _run(work)


@app.command("join", epilog=JOIN_EXAMPLES)
def join(
    head: opt.Head,
    token: opt.Token = None,
    token_file: opt.TokenFile = None,
    advertise: opt.Advertise = None,
    interface: opt.Interface = None,
    devices: opt.Devices = None,
    env: opt.Environment = None,
    wait_timeout: opt.WaitTimeout = 120.0,
    allow_skew: opt.AllowSkew = False,
    as_json: opt.AsJson = False,
) -> None:
    """Join the cluster of a head; returns when this host is in."""

    def work(console: Console) -> int:
        from aphro_core.cluster.cluster import Asked, start
        from aphro_core.cluster.token import given_token
        from aphro_core.environment import parse_assignments

        asked = Asked(
            head=head,
            advertise=advertise,
            interface=interface,
            devices=devices,
            environment=parse_assignments(env or [], os.environ),
            token=given_token(token, token_file, os.environ) or _ask_for_token(),
            allow_skew=allow_skew,
            wait_seconds=wait_timeout,
        )
        _print_member(start(asked, console), as_json)
        return ExitCode.OK

    _run(work)


@app.command("status", epilog=STATUS_EXAMPLES)
def status(expect: opt.Expect = None, as_json: opt.AsJson = False) -> None:
    """Show the nodes: address, devices, memory, versions, heartbeats, models."""

    def work(console: Console) -> int:
        from aphro_cli.cluster_view import render_status, status_to_json
        from aphro_core.cluster.asking import membership, read_status
        from aphro_core.cluster.registry import num_in

        here = membership()
        now = read_status(here)
        found = num_in(now.rows)
        _print(as_json, lambda: status_to_json(here, now), lambda: render_status(here, now))
        if expect is not None and found < expect:
            hint = "aphro cluster logs, or join those that are missing"
            raise ClusterError(f"{found} of {expect} expected nodes are in", hint=hint)
        return ExitCode.OK

    _run(work)


@app.command("env", epilog=ENV_EXAMPLES)
def env(as_json: opt.AsJson = False) -> None:
    """Show what decides how ranks compute and talk, one column a node."""

    def work(console: Console) -> int:
        from aphro_cli.cluster_view import environment_to_json, render_environments
        from aphro_core.cluster.asking import read_environment

        found = _of_nodes(console, read_environment)
        _print(as_json, lambda: environment_to_json(found), lambda: render_environments(found))
        return ExitCode.OK

    _run(work)


@app.command("ports", epilog=PORTS_EXAMPLES)
def ports(as_json: opt.AsJson = False) -> None:
    """Show every port of the cluster, who has it open, and the firewall's line."""

    def work(console: Console) -> int:
        from aphro_cli.cluster_view import ports_to_json, render_ports
        from aphro_core.cluster.asking import membership, read_ports
        from aphro_core.cluster.ports import Layout

        found = _of_nodes(console, read_ports)
        layout = Layout(membership().head[1])
        _print(as_json, lambda: ports_to_json(layout, found), lambda: render_ports(layout, found))
        return ExitCode.OK

    _run(work)


@app.command("logs", epilog=LOGS_EXAMPLES)
def logs(rank: opt.Rank = None, follow: opt.Follow = False, lines: opt.Lines = 100) -> None:
    """Print what the members of all nodes, or one rank, have to say."""

    def work(console: Console) -> int:
        from aphro_cli.cluster_logs import print_logs

        try:
            return print_logs(console, rank, lines, follow)
        except KeyboardInterrupt:
            return ExitCode.OK  # how a log that has no end is left

    _run(work)


@app.command("down", epilog=DOWN_EXAMPLES)
def down() -> None:
    """Leave the cluster; on the head, end it on all nodes."""

    def work(console: Console) -> int:
        from aphro_core.cluster.cluster import down as end

        problems = end(console)
        for name, problem in problems.items():
            console.warn(f"{name}: {problem}")
        if problems:
            hint = "aphro cluster down there; a node that Ray gave up ends by itself"
            raise ClusterError(f"not told: {', '.join(problems)}", hint=hint)
        console.line("down: nothing is left")
        return ExitCode.OK

    _run(work)


def _run(work: Callable[[Console], int]) -> None:
    console = open_console("info", term=os.environ.get("TERM", ""))
    raise typer.Exit(run_reported(console, lambda: work(console)))


def _print(as_json: bool, to_json: Callable[[], Any], render: Callable[[], list[str]]) -> None:
    typer.echo(json.dumps(to_json(), indent=2) if as_json else "\n".join(render()))


def _ask_for_token() -> str | None:
    """Of a person, without showing it."""
    return getpass.getpass("the cluster's token: ").strip() or None if sys.stdin.isatty() else None


def _print_head(here: Membership, as_json: bool) -> None:
    from aphro_cli.cluster_view import head_to_json, render_head
    from aphro_core.cluster.asking import token_of

    token = token_of(here)
    _print(as_json, lambda: head_to_json(here), lambda: render_head(here, token))


def _print_member(here: Membership, as_json: bool) -> None:
    from aphro_cli.cluster_view import member_to_json, render_member

    _print(as_json, lambda: member_to_json(here), lambda: render_member(here))


def _of_nodes(console: Console, read: Callable[[Membership, Node], Any]) -> dict[str, Any]:
    """Node name -> its answer; who does not answer is named in a warning."""
    from aphro_core.cluster.asking import membership, read_status

    here = membership()
    found = {}
    for row in read_status(here).rows:
        try:
            found[row.node.name] = read(here, row.node)
        except ClusterError as error:
            console.warn(f"{row.node.name}: {error.message}")
    return found
