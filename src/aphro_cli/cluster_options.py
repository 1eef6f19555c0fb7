"""The options of ``aphro cluster``, each with its help."""

from __future__ import annotations

from typing import Annotated

import typer

Head = Annotated[
    str,
    typer.Option("--head", metavar="IP[:PORT]", help="The head's address, as up printed it there.", show_default=False),
]
Advertise = Annotated[
    str | None, typer.Option("--advertise", metavar="IP", help="This host's address for the others; default: by route.")
]
Interface = Annotated[
    str | None, typer.Option("--interface", metavar="NAME", help="The interface whose address the others use.")
]
Port = Annotated[int, typer.Option("--port", help="The first of the cluster's 120 ports, the same on every node.")]
Devices = Annotated[
    int | None,
    typer.Option("--devices", metavar="N", min=0, help="Ranks that this host takes; default: its GPUs, else 1."),
]
Dashboard = Annotated[bool, typer.Option("--dashboard", help="Start Ray's dashboard, on 127.0.0.1 of the head.")]
Environment = Annotated[
    list[str] | None,
    typer.Option(
        "--env", "-e", metavar="NAME[=VALUE]", help="For ranks: of all nodes (up), of this one (join). NAME: from here."
    ),
]
Token = Annotated[
    str | None,
    typer.Option("--token", metavar="TOKEN", help="Other users of this host can read it: better one of the other two."),
]
TokenFile = Annotated[
    str | None, typer.Option("--token-file", metavar="FILE", help="File with the token; -: from standard input.")
]
AllowSkew = Annotated[bool, typer.Option("--allow-skew", help="Join with other versions than the head's all the same.")]
WaitTimeout = Annotated[
    float, typer.Option("--wait-timeout", metavar="SECONDS", min=0, help="How long to wait for the head to be up.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Expect = Annotated[
    int | None, typer.Option("--expect", metavar="N", min=1, help="End with code 10 unless N nodes are in.")
]
Rank = Annotated[int | None, typer.Option("--rank", metavar="R", min=0, help="What this rank printed, on its node.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C.")]
Lines = Annotated[int, typer.Option("--lines", "-n", metavar="N", min=0, help="Lines of each node.")]
