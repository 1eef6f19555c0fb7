"""What ``aphro top`` shows: a page as wide as the terminal, or one line a server where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from aphro_cli.console import printable, render_table

if TYPE_CHECKING:
    from aphro_core.client.metrics_text import RankRow
    from aphro_core.client.watch import Look

_BAR: Final = 20
_SERVERS: Final = ("server", "state", "run", "wait", "KV", "out/s", "in/s", "first", "next")
_NODES: Final = ("server", "node", "ranks", "devices", "weights", "KV cache")


def render_page(looks: Sequence[Look], width: int, when: str, interval: float) -> list[str]:
    """Lines of at most ``width`` columns (80 and up): the servers, their nodes, and what is wrong."""
    bar = min(max(width - 80, 0), _BAR)
    lines = [f"aphro top  {when}, every {interval:g} s; Ctrl-C ends"]
    lines += _table(_SERVERS, [_row(look, bar) for look in looks], width)
    nodes = [
        (_name(look), _cut(node, max(width - 64, 16)), *row) for look in looks for node, *row in node_rows(look.ranks)
    ]
    lines += ["", *_table(_NODES, nodes, width)] if nodes else []
    troubles = [f"  {_name(look)}: {text}" for look in looks for text in _troubles(look)]
    lines += ["", *troubles] if troubles else []
    return [_cut(line, width) for line in lines]


def _table(columns: Sequence[str], rows: Sequence[tuple[str, ...]], width: int) -> list[str]:
    """The first column, names of servers, gives way where the others need the room."""
    others = [max(map(len, column)) for column in zip(columns[1:], *(row[1:] for row in rows), strict=True)]
    left = max(width - sum(others) - 2 * len(columns), 8)
    return render_table("", columns, [(_cut(row[0], left), *row[1:]) for row in rows])[1:]


def _row(look: Look, bar: int) -> tuple[str, ...]:
    load = look.load
    if load is None:
        return (_name(look), look.phase, *["-"] * 7)
    return (
        _name(look),
        look.phase,
        _count(load.running),
        _count(load.waiting),
        _share(load.kv_share, bar),
        _rate(load.output_rate),
        _rate(load.prompt_rate),
        _seconds(load.first_token),
        _seconds(load.between_tokens),
    )


def node_rows(ranks: Sequence[RankRow]) -> list[tuple[str, ...]]:
    """(node, ranks, devices, weights, KV cache), a row a node."""
    rows: list[tuple[str, ...]] = []
    for host in dict.fromkeys(row.host for row in ranks):
        own = [row for row in ranks if row.host == host]
        numbers, devices = [row.rank for row in own], list(dict.fromkeys(row.device for row in own))
        is_run = len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1))
        named = f"{numbers[0]}-{numbers[-1]}" if is_run else ",".join(map(str, numbers))
        shown = ", ".join(devices) if len(devices) <= 2 else f"{devices[0]} to {devices[-1]}"
        weights, cache = sum(row.weights_bytes for row in own), sum(row.kv_bytes for row in own)
        rows.append((printable(host), named, printable(shown), _gib(weights), _gib(cache)))
    return rows


def _troubles(look: Look) -> list[str]:
    texts = [printable(look.error)] if look.error else []
    if look.load is not None and look.load.recoveries:
        texts.append(f"engines died and replaced since its start: {look.load.recoveries}")
    if look.load is not None and look.load.preemptions:
        texts.append(f"preemptions, for the cache was full: {look.load.preemptions}")
    return texts


def render_line(look: Look, when: str) -> str:
    """One look in one line, for a log or a pipe."""
    start = f"{when} {_name(look)} {look.phase}"
    load = look.load
    if load is None:
        return f"{start}: {printable(look.error or '')}"
    return (
        f"{start} running {_count(load.running)} waiting {_count(load.waiting)} kv {_share(load.kv_share, 0)} "
        f"output {_rate(load.output_rate)}/s prompt {_rate(load.prompt_rate)}/s "
        f"first {_seconds(load.first_token)} between {_seconds(load.between_tokens)}"
    )


def look_to_json(look: Look, when: str) -> dict[str, Any]:
    """Stable keys; null is what the server does not tell."""
    return {"time": when, **asdict(look)}


def _name(look: Look) -> str:
    return printable(look.url.removeprefix("http://"))


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _share(value: float | None, bar: int) -> str:
    if value is None:
        return "-"
    filled = round(min(max(value, 0.0), 1.0) * bar)
    return f"{value:.1%}" + (f" {'█' * filled}{'░' * (bar - filled)}" if bar else "")


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f}ms" if value < 1 else f"{value:.1f}s"


def _gib(value: int) -> str:
    return f"{value / 2**30:.2f} GiB"
