"""From what the live check measured to findings: who is to blame, what is slow, and what it costs a token. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.live.live import LiveReport, Outcome, Problem
from aphro_core.doctor.live.plan import (
    DECODE_ROWS,
    ModelSizes,
    bus_bytes_per_second,
    ms_per_token,
    render_bytes,
    render_timings,
)

_BANDWIDTH_BYTES: Final = 1 << 20  # smaller ones measure latency
_SLOW_SHARE: Final = 0.1  # of the advertised rate: TCP and one thread do not reach much more than half of it
_SLOW_BYTES_PER_SECOND: Final = 100e6  # between hosts whose rate is not known: a gigabit link
_OUTLIER_SHARE: Final = 0.25  # of the median of all pairs between hosts
_OPEN_PORTS: Final = "open TCP between the hosts: `firewall-cmd --add-source=SUBNET` or `ufw allow from SUBNET`"


def findings_of(
    check_id: str, backend: str, report: LiveReport, model: ModelSizes, link_speeds: Mapping[str, float]
) -> list[Finding]:
    """A finding for each problem, and one for the whole. ``link_speeds``: bytes/s of a host's interface, if known."""
    outcomes = [*report.pairs, report.group]
    if report.group.problem is not None and report.group.problem.kind == "start":
        return [_of_problem(check_id, backend, report, report.group)]
    failed = [outcome for outcome in outcomes if outcome.problem is not None and outcome.problem.kind != "skipped"]
    if failed:
        found = _without_echoes([_of_problem(check_id, backend, report, outcome) for outcome in failed])
        return [*found, *_of_the_rest(check_id, backend, report)]
    return [_of_success(check_id, backend, report, model, link_speeds)]


def _of_problem(check_id: str, backend: str, report: LiveReport, outcome: Outcome) -> Finding:
    problem = outcome.problem
    assert problem is not None
    names = [report.places[number].label for number in outcome.ranks]
    where = " and ".join(names) if len(names) == 2 else f"all {len(names)} ranks"
    title = {
        "start": f"{backend}: {problem.text}",
        "silent": f"{backend} between {where}: {problem.text}",
        "failed": f"{backend} between {where} fails: {problem.text}",
        "stuck": f"{backend} between {where} hangs: {problem.text}",
        "wrong": f"{backend} between {where} computes wrong sums: {problem.text}",
    }[problem.kind]
    hosts = {report.places[number].host.name for number in problem.ranks}
    return Finding(
        check_id,
        Status.FAIL,
        title,
        root_cause=problem.kind in ("silent", "start"),
        evidence=_interfaces(report, outcome),
        remedy=_remedy(report, outcome, problem),
        host=hosts.pop() if len(hosts) == 1 else "",
    )


def _remedy(report: LiveReport, outcome: Outcome, problem: Problem) -> str:
    if problem.kind == "start":
        if "No module" in problem.text or "not found" in problem.text:
            return "make the same environment at the same path on every host, or share it over a file system"
        return "run `python -m aphro_core.doctor.live.rank` there: it must start, and end when its input is closed"
    if problem.kind == "silent":
        name = report.places[problem.ranks[0]].host.name
        look = "`uptime`, `dmesg | tail`, `ps -eo pid,stat,cmd | grep python`"
        return f"look at {name or 'this host'}: {look}; is it stopped, overloaded, or its cable out?"
    return _remedy_of_path(report, outcome)


def _remedy_of_path(report: LiveReport, outcome: Outcome) -> str:
    wrong = _wrong_interfaces(report, outcome)
    if wrong:
        return "; ".join(f"on {host}: export {variable}={value}" for host, variable, value in wrong)
    is_cuda = report.places[0].device != "cpu"
    if len({report.places[number].host.name for number in outcome.ranks}) > 1:
        return f"{_OPEN_PORTS}, then `aphro doctor` again for net.reach" + (
            "; NCCL_IB_DISABLE=1 tells whether it is RDMA" if is_cuda else ""
        )
    if is_cuda:
        return "PCIe ACS and IOMMU come first (host.acs, host.iommu); NCCL_P2P_DISABLE=1 tells whether it is that path"
    return "export GLOO_SOCKET_IFNAME=lo; and check that the host's name resolves (name.loopback)"


def _wrong_interfaces(report: LiveReport, outcome: Outcome) -> list[tuple[str, str, str]]:
    """Hosts whose environment names another interface than the route to the peers: host, variable, right value."""
    found = []
    for number in outcome.ranks:
        place, started = report.places[number], report.started[number]
        used = started.socket_interface if started else ""
        if place.interface and used and used.lstrip("=") != place.interface:
            variable = "GLOO_SOCKET_IFNAME" if place.device == "cpu" else "NCCL_SOCKET_IFNAME"
            found.append((place.host.name, variable, place.interface))
    return list(dict.fromkeys(found))


def _interfaces(report: LiveReport, outcome: Outcome) -> tuple[Evidence, ...]:
    lines = []
    for number in outcome.ranks:
        place, started = report.places[number], report.started[number]
        used = f", sockets use {started.socket_interface}" if started and started.socket_interface else ""
        route = f"{place.address} on {place.interface}" if place.interface else place.address
        lines.append(Evidence("live check", 0, f"rank {number}: {place.label}, peers reach it at {route}{used}"))
    return tuple(lines)


def _of_success(
    check_id: str, backend: str, report: LiveReport, model: ModelSizes, link_speeds: Mapping[str, float]
) -> Finding:
    num_pairs, num_ranks = len(report.pairs), len(report.group.ranks)
    evidence = [
        Evidence("live check", 0, f"{_pair_label(report, outcome)}: {render_timings(outcome.timings, 2)}")
        for outcome in report.pairs
    ]
    together = f"all {num_ranks} ranks" if num_ranks == len(report.places) else f"{num_ranks} ranks together"
    evidence.append(Evidence("live check", 0, f"{together}: {render_timings(report.group.timings, num_ranks)}"))
    evidence += [Evidence("live check", 0, line) for line in _costs(report, model)]
    title = (
        f"{backend} adds up over {num_pairs} pair{'s' if num_pairs != 1 else ''} and {together}; {evidence[-1].text}"
    )
    slow = _slow_pairs(report, link_speeds)
    if not slow:
        return Finding(check_id, Status.PASS, title, evidence=tuple(evidence))
    remedy = "`ethtool` and `aphro doctor` (net.speed, net.interface) on both ends; keep -tp inside a host, -pp between"
    title = f"{backend} adds up, but slowly: {slow[0]}" + (f" (and {len(slow) - 1} more)" if len(slow) > 1 else "")
    found = tuple(Evidence("live check", 0, line) for line in slow)
    return Finding(check_id, Status.WARN, title, evidence=(*found, *evidence), remedy=remedy)


def _of_the_rest(check_id: str, backend: str, report: LiveReport) -> list[Finding]:
    """Beside what failed: the pairs that work, with their times, and how many were not run any more."""
    if len(report.pairs) < 2:
        return []
    good = [outcome for outcome in report.pairs if outcome.problem is None]
    not_run = [outcome for outcome in report.pairs if outcome.problem and outcome.problem.kind == "skipped"]
    title = f"{backend}: {len(good)} of {len(report.pairs)} pairs add up, {len(not_run)} were not run after that"
    evidence = tuple(
        Evidence("live check", 0, f"{_pair_label(report, outcome)}: {render_timings(outcome.timings, 2)}")
        for outcome in good
    )
    return [Finding(check_id, Status.SKIP, title, evidence=evidence)]


def _costs(report: LiveReport, model: ModelSizes) -> list[str]:
    """What a forward pass spends in all-reduces at this tensor parallel size: on GPUs in a CUDA graph, as it runs."""
    tp, timings = len(report.group.ranks), report.group.timings
    lines = []
    for rows, label in ((DECODE_ROWS, f"{DECODE_ROWS} sequences"), (1, "one sequence")):
        alike = [timing for timing in timings if timing.num_bytes == model.hidden_bytes(rows)]
        if alike:
            timing = max(alike, key=lambda timing: timing.kind == "graph_all_reduce")
            size = render_bytes(timing.num_bytes) + " in a CUDA graph" * (timing.kind == "graph_all_reduce")
            lines.append(
                f"a decode step of {label} of {model.name} at -tp {tp} spends {ms_per_token(model, timing):.3g} ms"
                f" in {model.num_all_reduces} all-reduces of {size}"
            )
    return lines


def _slow_pairs(report: LiveReport, link_speeds: Mapping[str, float]) -> list[str]:
    between = [outcome for outcome in report.pairs if len(_hosts_of(report, outcome)) == 2]
    rates = {outcome.ranks: _rate(outcome) for outcome in between}
    middle = median(rates.values()) if rates else 0.0
    lines = []
    for outcome in between:
        rate = rates[outcome.ranks]
        speeds = [link_speeds[name] for name in _hosts_of(report, outcome) if name in link_speeds]
        promised = min(speeds) if len(speeds) == 2 else None
        floor = _SLOW_SHARE * promised if promised else _SLOW_BYTES_PER_SECOND
        label = f"{_pair_label(report, outcome)} {rate / 1e6:.4g} MB/s"
        if rate < floor:
            lines.append(f"{label}, " + (f"of a link of {promised / 1e6:.4g} MB/s" if promised else "below a gigabit"))
        elif len(rates) > 2 and rate < _OUTLIER_SHARE * middle:
            lines.append(f"{label}, while the pairs' median is {middle / 1e6:.4g} MB/s")
    return lines


def _rate(outcome: Outcome) -> float:
    large = [timing for timing in outcome.timings if timing.num_bytes >= _BANDWIDTH_BYTES and timing.repeats]
    return max((bus_bytes_per_second(timing, 2) for timing in large), default=0.0)


def _hosts_of(report: LiveReport, outcome: Outcome) -> set[str]:
    return {report.places[number].host.name for number in outcome.ranks}


def _pair_label(report: LiveReport, outcome: Outcome) -> str:
    return " - ".join(f"{number} {report.places[number].label}" for number in outcome.ranks)


def _without_echoes(findings: list[Finding]) -> list[Finding]:
    """A host that is to blame in several pairs is one finding: the first."""
    firsts: dict[str, Finding] = {}
    for finding in findings:
        firsts.setdefault(finding.host if finding.root_cause else finding.title, finding)
    return list(firsts.values())
