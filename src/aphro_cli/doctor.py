"""``aphro doctor``: why nodes are slow or do not talk, and what to type."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, Literal

import typer

from aphro_cli.console import Console, open_console, run_reported
from aphro_core.errors import UsageError

EXAMPLES: Final = """\b
Examples:
  aphro doctor                                      check this host
  aphro doctor --hosts node1,node2 --ib             check both, what differs, and the traffic between them
  aphro doctor --only shm.size,limit.memlock        some checks; net.* is all of a group
  aphro doctor --nccl-log train.log                 what a log says, root cause first
  kubectl logs pod | aphro doctor --nccl-log -      from standard input
  aphro doctor --nccl-log /tmp/nccl/ --ib --json    all files of a folder, for scripts
  aphro doctor explain log.ib-timeout               what a finding means
  aphro doctor --hosts node1,node2 --bundle b.tgz   all of it in one file, without secrets

\b
Exit codes: 0 nothing wrong, or nothing shown; 1 a warning; 2 a failure, or a wrong option.
"""

Words = Annotated[
    list[str] | None, typer.Argument(metavar="[explain ID...] [FILE...]", help="explain and ids, or further logs.")
]
NcclLog = Annotated[
    list[str] | None,
    typer.Option("--nccl-log", metavar="FILE", help="A log with NCCL's output (NCCL_DEBUG=INFO), a folder, or -."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Only = Annotated[list[str] | None, typer.Option("--only", metavar="ID,...", help="Run these checks; net.* is a group.")]
Skip = Annotated[list[str] | None, typer.Option("--skip", metavar="ID,...", help="Leave these checks out.")]
Ib = Annotated[
    bool, typer.Option("--ib", help="Check InfiniBand, RoCE and EFA too; TCP sockets in a log are a failure then.")
]
Hosts = Annotated[
    list[str] | None, typer.Option("--hosts", metavar="HOST,...", help="Check these hosts by ssh: [user@]host[:port].")
]
OfCluster = Annotated[
    bool, typer.Option("--cluster", help="Check every node of the cluster that this host has joined, by ssh.")
]
Model = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="Its sizes are what the live check measures.")
]
TensorParallelSize = Annotated[
    int | None,
    typer.Option("--tensor-parallel-size", "-tp", min=1, help="Ranks of a group in the live check; default: all."),
]
PipelineParallelSize = Annotated[
    int | None,
    typer.Option("--pipeline-parallel-size", "-pp", min=1, help="Stages: -tp x -pp GPUs must be there."),
]
Device = Annotated[Literal["auto", "cuda", "cpu"], typer.Option("--device", help="Where the live check's data is.")]
Bundle = Annotated[
    str | None, typer.Option("--bundle", metavar="FILE", help="Write findings, versions and logs into one .tgz file.")
]


def doctor(
    words: Words = None,
    nccl_log: NcclLog = None,
    as_json: AsJson = False,
    only: Only = None,
    skip: Skip = None,
    of_cluster: OfCluster = False,
    ib: Ib = False,
    hosts: Hosts = None,
    model: Model = None,
    tensor_parallel_size: TensorParallelSize = None,
    pipeline_parallel_size: PipelineParallelSize = None,
    device: Device = "auto",
    bundle: Bundle = None,
) -> None:
    """Say why nodes are slow or do not talk, and what to type."""
    console = open_console("info", term=os.environ.get("TERM", ""))

    def work() -> int:
        if words and words[0] == "explain":
            return _explain(words[1:], as_json)
        if words and not nccl_log:
            hint = "aphro doctor --nccl-log FILE for a log, or aphro doctor explain ID"
            raise UsageError(f"what is {words[0]!r}?", hint=hint)
        if of_cluster and hosts:
            raise UsageError("--cluster and --hosts both name hosts", hint="leave one of them out")
        from aphro_core.doctor.diagnosis import Questions, diagnose

        asked = Questions(
            logs=tuple([*nccl_log, *(words or ())] if nccl_log else ()),
            only=_split(only),
            skip=_split(skip),
            hosts=_cluster_hosts() if of_cluster else _split(hosts),
            ib=ib,
            model=model,
            tp=tensor_parallel_size,
            pp=pipeline_parallel_size,
            device=device,
            bundle=bundle,
        )
        diagnosis = diagnose(asked, _progress(console))
        console.close()
        _print(diagnosis, as_json)
        return diagnosis.exit_code

    raise typer.Exit(run_reported(console, work))


def _cluster_hosts() -> tuple[str, ...]:
    """The addresses of the nodes that are in. Raises ClusterError where this host is in no cluster."""
    from aphro_core.cluster.asking import membership, read_status

    return tuple(row.node.address for row in read_status(membership()).rows if row.state == "in")


def _split(values: Sequence[str] | None) -> tuple[str, ...]:
    return tuple(word.strip() for value in values or () for word in value.split(",") if word.strip())


def _progress(console: Console) -> Callable[[str, int, int], None]:
    def progress(text: str, done: int, size: int) -> None:
        if size:
            console.progress(text, done, size, text)
        else:
            console.line(text)

    return progress


def _print(diagnosis: Any, as_json: bool) -> None:
    from aphro_cli.doctor_text import render_checks, render_report
    from aphro_core.doctor.diagnosis import to_json

    if as_json:
        typer.echo(json.dumps(to_json(diagnosis), indent=2))
        return
    lines = render_report(diagnosis.log) if diagnosis.log else []
    if diagnosis.checks or not diagnosis.log:
        lines += render_checks(diagnosis.checks, diagnosis.verdict)
    typer.echo("\n".join(lines))


def _explain(ids: list[str], as_json: bool) -> int:
    from aphro_core.doctor.explain import explain, known_ids

    if not ids:
        typer.echo(json.dumps(known_ids()) if as_json else "\n".join(known_ids()))
        return 0
    texts = {id: explain(id) for id in ids}
    typer.echo(json.dumps(texts) if as_json else "\n".join(texts.values()).rstrip())
    return 0
