"""An estimate as text: tables, a bar a rank, and the sentences that an operator acts on."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Final

from aphro_cli.console import printable, render_table
from aphro_core.estimate.balance import RankBalance
from aphro_core.estimate.estimate import Estimate
from aphro_core.estimate.planner import Plan, closeness, shortage
from aphro_core.estimate.remedies import Remedy
from aphro_core.estimate.report import CONSTANTS_OF, assumptions
from aphro_core.estimate.speed import ceilings, host_load

GIB: Final = 2**30
_PARTS: Final = (("weights", "#", "█"), ("activations", "+", "▓"), ("other", "o", "▒"), ("KV cache", "=", "░"))


def render_estimate(found: Estimate, plans: Sequence[Plan], ways_out: Sequence[Remedy]) -> list[str]:
    """All lines, none wider than the terminal (80 to 120 columns) unless the output is piped."""
    lines = [*_wrapped(_head(found)), "", *_ranks(found), *_bars(found), "", *_capacity(found)]
    if found.verdict != "fits":
        lines += ["", *_not_fitting(found, ways_out)]
    if len(plans) > 1:
        lines += ["", *_plans(plans)]
    lines += ["", *_speed(found), *_notes(found)]
    return [printable(line) for line in lines]


def render_comparison(names: Sequence[str], founds: Sequence[Estimate]) -> list[str]:
    """Two estimates side by side."""
    rows = [("", *names)]
    rows += [
        ("tp x pp", *(f"{each.sizes.tp} x {each.sizes.pp}" for each in founds)),
        ("verdict", *(_verdict(each) for each in founds)),
        ("weights, limiting rank", *(_gib(each.limiting.weights_bytes) for each in founds)),
        ("activations", *(_gib(each.limiting.activation_bytes) for each in founds)),
        ("other", *(_gib(each.limiting.overhead_bytes) for each in founds)),
        ("KV cache", *(_gib(max(each.limiting.left_bytes, 0)) for each in founds)),
        ("KV bytes a token, all ranks", *(f"{ceilings(each).kv_bytes_per_token:,}" for each in founds)),
        ("blocks", *(f"{each.num_blocks:,}" for each in founds)),
        ("tokens", *(f"{each.tokens:,}" for each in founds)),
        ("maximum length", *(f"{each.sizes.max_model_len:,}" for each in founds)),
        ("requests of that length", *(f"{each.max_concurrency:.2f}" for each in founds)),
        ("largest request", *(f"{each.longest_request:,}" for each in founds)),
        ("decode ceiling, tokens/s", *(_rate(ceilings(each).decode_tokens_per_s) for each in founds)),
        ("prefill ceiling, tokens/s", *(_rate(ceilings(each).prefill_tokens_per_s) for each in founds)),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        printable(
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        )
        for row in rows
    ]


def _head(found: Estimate) -> list[str]:
    question, sizes = found.question, found.sizes
    device = question.device
    host = "this host" if device.per_host is None else "each host"
    where = host if device.kind == "cpu" else device.card.name if device.card else "GPU"
    scheme = f", {question.scheme.scheme}" if question.scheme else ""
    exact = "file headers" if question.source.tensors is not None else "its config"
    limits = f"{sizes.max_num_batched_tokens:,} tokens and {sizes.max_num_seqs:,} requests a step"
    return [
        f"{question.source.name}: {question.source.facts.architecture}, {sizes.dtype}{scheme} (read from {exact})",
        f"{question.engine} on {where}, {device.total_bytes / GIB:.2f} GiB, {sizes.utilization:g} of it; {limits}",
        f"tensor parallel {sizes.tp} x pipeline parallel {sizes.pp}: {_verdict(found)}",
    ]


def _verdict(found: Estimate) -> str:
    return {"fits": "fits", "may_not_start": "may not start (within the doubt)", "does_not_fit": "does not fit"}[
        found.verdict
    ]


def _ranks(found: Estimate) -> list[str]:
    rows = [
        (
            str(balance.rank),
            f"{balance.layers.start}-{balance.layers.stop - 1}",
            f"{balance.num_heads}/{balance.num_kv_heads}",
            f"{balance.weights_bytes / GIB:.2f}",
            f"{balance.activation_bytes / GIB:.2f}",
            f"{balance.overhead_bytes / GIB:.2f}",
            f"{max(balance.left_bytes, 0) / GIB:.2f}",
            f"{balance.num_blocks}" + (" <" if balance is found.limiting and len(found.ranks) > 1 else ""),
        )
        for balance in found.ranks
    ]
    columns = ("rank", "layers", "heads/KV", "weights", "activations", "other", "KV cache", "blocks")
    return render_table("GiB a rank" + (" (< limits)" if len(rows) > 1 else ""), columns, rows)


def _bars(found: Estimate) -> list[str]:
    """One bar for each kind of rank: equal ones share theirs."""
    is_wide = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    width = max(min(_columns(), 100) - 16, 20)
    lines, seen = [], set()
    for balance in found.ranks:
        terms = _terms(balance)
        if terms in seen:
            continue
        seen.add(terms)
        total = max(found.question.device.total_bytes, sum(terms))
        if found.question.device.kind == "cpu":
            total = max(balance.budget_bytes, sum(terms), 1)
        bar = ""
        for (_, plain, block), size in zip(_PARTS, terms, strict=True):
            cells = round(width * size / total)
            bar += (block if is_wide else plain) * (max(cells, 1) if size else 0)
        lines.append(f"  rank {balance.rank:<3} |{bar[:width].ljust(width, '.' if not is_wide else '·')}|")
    legend = "  ".join(f"{block if is_wide else plain} {name}" for name, plain, block in _PARTS)
    return [*lines, f"           {legend}"]


def _terms(balance: RankBalance) -> tuple[int, int, int, int]:
    return balance.weights_bytes, balance.activation_bytes, balance.overhead_bytes, max(balance.left_bytes, 0)


def _capacity(found: Estimate) -> list[str]:
    sizes, limiting = found.sizes, found.limiting
    kind = "GPU" if found.question.device.kind == "cuda" else "CPU"
    size = limiting.layout.block_tokens
    exact = f"{found.num_blocks} blocks x {size}" + (
        f" in {limiting.layout.num_groups} groups" if limiting.layout.num_groups > 1 else ""
    )
    lines = [
        f"# {kind} blocks: {found.num_blocks}",
        f"{kind} KV cache size: {found.tokens:,} tokens ({exact})",
        f"Maximum concurrency for {sizes.max_model_len:,} tokens per request: {found.max_concurrency:.2f}x",
        f"Largest single request: {found.longest_request:,} tokens",
    ]
    doubt = found.doubt_bytes(limiting)
    if doubt:
        low = max(limiting.left_bytes - doubt, 0) // limiting.layout.block_bytes
        high = max(limiting.left_bytes + doubt, 0) // limiting.layout.block_bytes
        lines.append(f"Within +-{doubt / GIB:.2f} GiB: {low} to {high} blocks")
    return lines


def _not_fitting(found: Estimate, ways_out: Sequence[Remedy]) -> list[str]:
    lines = _wrapped([closeness(found) if found.fits else shortage(found)])
    for way in ways_out:  # a line that can be pasted is never broken
        lines += [f"try: {way.flags}", f"     {way.cost}: {way.tokens:,} tokens"]
    if not ways_out and not found.fits:
        lines.append("try: a smaller model, or devices with more memory; no single change of the settings is enough")
    return lines


def _plans(plans: Sequence[Plan]) -> list[str]:
    """Every (tp, pp); notes are wrapped under themselves on a narrow terminal."""
    lines = ["Plans (* recommended)", "   tp  pp      blocks      tokens  requests  "]
    lines[-1] += "note"
    room = max(_columns() - 46, 30)
    for plan in plans:
        mark = "*" if plan.recommended else " "
        if plan.found is None:
            figures = f"{'-':>10}  {'-':>10}  {'-':>8}"
        else:
            figures = f"{plan.found.num_blocks:>10}  {plan.found.tokens:>10}  {plan.found.max_concurrency:>8.2f}"
        note = plan.reason if plan.found is not None else f"illegal: {plan.reason}"
        wrapped = textwrap.wrap(note, room) if room < 200 else [note]
        lines.append(f" {mark} {plan.tp:>2}  {plan.pp:>2}  {figures}  {wrapped[0]}")
        lines += [" " * 45 + part for part in wrapped[1:]]
    return lines


def _speed(found: Estimate) -> list[str]:
    speed, load = ceilings(found), host_load(found)
    lines = [f"A token takes {speed.kv_bytes_per_token:,} bytes of cache on all ranks together."]
    if speed.decode_tokens_per_s is not None and found.fits:
        lines.append(
            f"At best (memory bandwidth, arithmetic): {_rate(speed.decode_tokens_per_s)} tokens/s for one request, "
            f"{_rate(speed.full_batch_tokens_per_s)} for a full cache, {_rate(speed.prefill_tokens_per_s)} of prompts."
        )
    hosts = "the host reads" if load.num_hosts == 1 else f"each of {load.num_hosts} hosts reads"
    lines.append(f"Loading: {hosts} {_gib(load.read_bytes)} and holds at most about {_gib(load.peak_bytes)} of memory.")
    return _wrapped(lines)


def _notes(found: Estimate) -> list[str]:
    notes = assumptions(found)
    return _wrapped(
        [*(f"note: {note}" for note in notes), f"note: constants of engines and cards as of {CONSTANTS_OF}"]
    )


def _wrapped(lines: Sequence[str]) -> list[str]:
    width = _columns()
    return [part for line in lines for part in (textwrap.wrap(line, width, subsequent_indent="  ") or [""])]


def _columns() -> int:
    """The terminal's, at most 120; without bound where nobody's screen is concerned."""
    return min(shutil.get_terminal_size((80, 24)).columns, 120) if sys.stdout.isatty() else 1000


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def _rate(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}"
