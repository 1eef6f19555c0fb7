"""``aphro bench``: how fast a running server answers, whoever made it."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from aphro_cli import server_options as srv
from aphro_cli.console import Console, open_console, render_table, run_reported
from aphro_core.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from aphro_core.client.bench_report import BenchReport
    from aphro_core.client.load import Load
    from aphro_core.client.workload import Planned

EXAMPLES: Final = """\b
Examples:
  aphro bench                                            32 requests, 8 at once, 128 tokens in and out
  aphro bench node1:8000 --requests 512 --concurrency 64 --input-length 32-1024
  aphro bench --rate 4 --requests 240                    arrivals at random, 4 a second on average
  aphro bench https://example.org/v1 --endpoint chat --no-ignore-eos --model name
  aphro bench --json > bench.json                        for scripts; --save FILE adds a row a request
"""
_BUSY_SHARE: Final = 0.8

Requests = Annotated[int, typer.Option("--requests", "-n", min=1, help="How many.")]
Concurrency = Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Requests at once, at most.")]
Rate = Annotated[
    float | None, typer.Option("--rate", metavar="R", help="Arrivals a second, at random; default: all at once.")
]
InputLength = Annotated[str, typer.Option("--input-length", metavar="TOKENS", help="Of each prompt; N or A-B.")]
OutputLength = Annotated[str, typer.Option("--output-length", metavar="TOKENS", help="Of each answer; N or A-B.")]
EndpointOption = Annotated[
    Literal["completions", "chat"], typer.Option("--endpoint", help="/v1/completions or /v1/chat/completions.")
]
IgnoreEos = Annotated[
    bool,
    typer.Option("--ignore-eos/--no-ignore-eos", help="Answers of the full length; OpenAI itself does not know it."),
]
Temperature = Annotated[float, typer.Option("--temperature", min=0, help="0: the likeliest token each time.")]
WarmUp = Annotated[int, typer.Option("--warm-up", min=0, help="Requests before, one by one, that do not count.")]
Seed = Annotated[int, typer.Option("--seed", help="Of lengths, arrivals and prompts.")]
Save = Annotated[
    str | None, typer.Option("--save", metavar="FILE", help="Write the report there too, with a row a request.")
]


def bench(
    url: srv.Url = srv.DEFAULT_URL,
    requests: Requests = 32,
    concurrency: Concurrency = 8,
    rate: Rate = None,
    input_length: InputLength = "128",
    output_length: OutputLength = "128",
    endpoint: EndpointOption = "completions",
    ignore_eos: IgnoreEos = True,
    temperature: Temperature = 0.0,
    warm_up: WarmUp = 1,
    seed: Seed = 0,
    save: Save = None,
    model: srv.ModelName = None,
    api_key: srv.ApiKey = None,
    timeout: srv.Timeout = 120.0,
    as_json: srv.Json = False,
) -> None:
    """Measure how fast a running server answers."""
    console = open_console("info", term=os.environ.get("TERM", ""))

    def work() -> int:
        from aphro_core.client.address import parse_base_url
        from aphro_core.client.load import Load, Target
        from aphro_core.client.workload import parse_lengths, plan_requests

        inputs = parse_lengths(input_length, "--input-length")
        outputs = parse_lengths(output_length, "--output-length")
        arrivals = math.inf if rate is None else rate
        if not arrivals > 0:
            raise UsageError(f"--rate is {rate}, allowed: more than 0", hint="leave it out to send all at once")
        if save is not None and not os.access(Path(save).absolute().parent, os.W_OK):
            raise UsageError(f"--save {save} cannot be written", hint="name a file in a writable folder")
        base_url = parse_base_url(url)
        target = Target(base_url, endpoint, model, srv.first_key(api_key), timeout, temperature, ignore_eos)
        load = Load(target, concurrency=concurrency, rate=arrivals, seed=seed)
        planned = plan_requests(requests, arrivals, inputs, outputs, seed)
        warm = plan_requests(warm_up, math.inf, inputs, outputs, seed - 1)
        report, is_whole = _measure(load, warm, planned, console)
        settings = {
            "url": base_url,
            "model": load.model,
            "endpoint": endpoint,
            "concurrency": concurrency,
            "rate": rate,
            "input_length": str(inputs),
            "output_length": str(outputs),
            "ignore_eos": ignore_eos,
            "temperature": temperature,
            "seed": seed,
        }
        _publish({"settings": settings, **report.to_json()}, report, load, save, as_json)
        for warning in _doubts(report, load):
            console.warn(warning)
        return ExitCode.INTERRUPTED if not is_whole else ExitCode.SERVER if report.errors else ExitCode.OK

    raise typer.Exit(run_reported(console, work))


def _measure(load: Load, warm: list[Planned], planned: list[Planned], console: Console) -> tuple[BenchReport, bool]:
    """(the report, whether it is of all requests): Ctrl-C reports what is done by then."""
    import anyio

    from aphro_core.client.bench_report import build_report
    from aphro_core.errors import AphroError, first_cause

    def on_end() -> None:
        console.progress("bench", len(load.records), len(planned), "requests")

    is_whole = True
    cpu = time.process_time()
    try:
        anyio.run(load.run, warm, planned, on_end)
    except KeyboardInterrupt:
        if not load.records:
            raise
        is_whole = False
    except BaseExceptionGroup as group:
        cause = first_cause(group)
        raise cause if isinstance(cause, (AphroError, KeyboardInterrupt)) else group from None
    console.close()
    return build_report(load.records, len(planned), time.process_time() - cpu), is_whole


def _publish(record: dict[str, Any], report: BenchReport, load: Load, save: str | None, as_json: bool) -> None:
    if save is not None:
        from aphro_core.client.bench_report import rows_of

        Path(save).write_text(json.dumps({**record, "records": rows_of(load.records)}, indent=1) + "\n")
    typer.echo(json.dumps(record, indent=2) if as_json else "\n".join(render_report(record["settings"], report)))


def render_report(settings: dict[str, Any], report: BenchReport) -> list[str]:
    """At most 80 columns, but for the names of server and model."""
    from aphro_core.client.bench_report import LATENCIES
    from aphro_core.client.percentiles import SHARES

    rate = f", {settings['rate']:g} a second" if settings["rate"] else ""
    lines = [
        f"{settings['model']} at {settings['url']}, /{settings['endpoint']}",
        f"{report.num_requests} requests, {settings['concurrency']} at once{rate}, "
        f"{settings['input_length']} -> {settings['output_length']} tokens",
        f"{report.num_whole} answered in {report.seconds:.2f} s: {report.requests_per_second:.2f} requests/s",
        f"{report.prompt_tokens:,} prompt and {report.output_tokens:,} output tokens",
        f"{report.output_tokens_per_second:,.1f} output tokens/s, {report.total_tokens_per_second:,.1f} in all",
        "",
    ]
    names = ("mean", *SHARES, "max")
    rows = [
        (title, *(_milliseconds(getattr(found, name)) for name in names))
        for key, title in LATENCIES.items()
        if (found := report.latencies[key]) is not None
    ]
    lines += render_table("latency in ms", ("", *names), rows) if rows else ["nothing was answered"]
    lines += [f"{count} failed: {error}" for error, count in report.errors.items()]
    return lines


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f}" if seconds < 1 else f"{seconds * 1000:.0f}"


def _doubts(report: BenchReport, load: Load) -> list[str]:
    """What makes the figures less than they seem."""
    doubts = []
    if report.client_cpu_share > _BUSY_SHARE:
        doubts.append(
            f"this client used {report.client_cpu_share:.0%} of a core: it may be what was measured; "
            f"fewer streams, or several clients"
        )
    if report.num_whole and not report.prompt_tokens:
        doubts.append("the server does not count tokens in streams (stream_options): tokens/s are unknown")
    elif not load.has_exact_prompts:
        doubts.append("prompts are words, about a token each: prompt tokens are those that the server counted")
    return doubts
