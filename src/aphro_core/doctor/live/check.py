"""One live check from a cluster to its report: places, ranks, and what the links between them promise."""

from __future__ import annotations

from collections.abc import Sequence

from aphro_core.doctor.check import Cluster
from aphro_core.doctor.finding import Finding, Status
from aphro_core.doctor.live.live import LiveLimits, LiveReport, run_live
from aphro_core.doctor.live.model import load_sizes
from aphro_core.doctor.live.places import choose_places
from aphro_core.doctor.live.ranks import Place
from aphro_core.doctor.live.verdict import findings_of
from aphro_core.remote.remote import read


async def check_live(
    check_id: str, backend: str, cluster: Cluster, devices: Sequence[Sequence[str]]
) -> tuple[list[Finding], LiveReport]:
    """Ranks on ``devices[i]`` of host i: their findings, and the report behind them."""
    live = cluster.live
    places = await choose_places(cluster.hosts, devices)
    model = load_sizes(live.model)
    speeds = await link_speeds(places)
    report = await run_live(
        places,
        model,
        LiveLimits(live.start_seconds, live.limit_seconds),
        group_size=min(live.tp, len(places)) if live.tp else None,
        env=live.env,
        progress=lambda line: cluster.progress(f"{check_id}: {line}"),
    )
    findings = findings_of(check_id, backend, report, model, speeds)
    if live.tp and live.tp > len(places):
        title = f"{backend}: -tp {live.tp} was asked, measured with the {len(places)} ranks that there are"
        findings.append(Finding(check_id, Status.SKIP, title))
    return findings, report


async def link_speeds(places: Sequence[Place]) -> dict[str, float]:
    """Host name -> bytes/s that its interface towards the peers advertises, of those that say so."""
    speeds = {}
    for place in places:
        text = await read(place.host, f"/sys/class/net/{place.interface}/speed") if place.interface else None
        if text and text.isdigit() and int(text) > 0:
            speeds[place.host.name] = int(text) * 1e6 / 8
    return speeds
