"""What ``aphro cluster`` prints: tables for people, JSON for scripts. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aphro_cli.console import render_table
from aphro_core.cluster.membership import Membership
from aphro_core.cluster.messages import Environment, Node, NodeRow, Ports, Status
from aphro_core.cluster.ports import DEFAULT_PORT, Layout, Port
from aphro_core.cluster.registry import num_in

_GIB = 2**30
_MAX_VALUE = 40


def join_command(here: Membership) -> str:
    address, port = here.head
    return f"aphro cluster join --head {address if port == DEFAULT_PORT else here.head_address}"


def render_head(here: Membership, token: str) -> list[str]:
    """The lines to paste on the other hosts. The token stands in front, where no process list shows it."""
    return [
        f"the cluster is up: {here.head_address}, {_devices(here.devices, here.resource)} on this host",
        "on every other host:",
        f"  APHRO_CLUSTER_TOKEN={token} {join_command(here)}",
        f"or with a copy of {here.token_path}: {join_command(here)} --token-file FILE",
        "whoever has the token can run programs on every node. Which nodes are in: aphro cluster status",
    ]


def head_to_json(here: Membership) -> dict[str, Any]:
    """Without the token itself: its file is named."""
    return member_to_json(here) | {"join": f"{join_command(here)} --token-file FILE", "token_file": here.token_path}


def render_member(here: Membership) -> list[str]:
    devices = _devices(here.devices, here.resource)
    return [f"{here.node_address} is in the cluster of {here.head_address}, with {devices}: aphro cluster status"]


def member_to_json(here: Membership) -> dict[str, Any]:
    names = ("role", "head_address", "node_address", "control_port", "devices", "resource", "log_dir", "pid")
    return {name: getattr(here, name) for name in names}


def render_status(here: Membership, status: Status) -> list[str]:
    rows = [_cells(row) for row in status.rows]
    devices = sum(row.node.devices for row in status.rows if row.state == "in")
    title = f"cluster of {here.head_address}: {num_in(status.rows)} nodes in, {devices} devices"
    columns = ("node", "role", "address", "card", "devices", "free memory", "heard")
    lines = render_table(title, columns, rows)
    lines += _versions([row.node for row in status.rows])
    lines += [f"model {m.name} at {m.url}, from {m.driver}: {_ranks(m.ranks, status)}" for m in status.models]
    lines += [f"left {d.age_seconds:.0f} s ago: {d.name} ({d.address}): {d.reason}" for d in status.departed]
    return lines


def _cells(row: NodeRow) -> list[str]:
    node, memory = row.node, row.memory
    names = f" {node.device_names[0]}" if node.device_names else ""
    free = "-" if memory is None else f"{memory.free_bytes / _GIB:.1f} GiB"
    if memory is not None and memory.gpu_free_bytes:
        free += f", GPUs {sum(memory.gpu_free_bytes) / _GIB:.1f} of {sum(memory.gpu_total_bytes) / _GIB:.1f} GiB"
    heard = "now" if memory is not None else f"{row.age_seconds:.0f} s ago ({row.state})"
    devices = f"{_devices(node.devices, node.resource)}{names}"
    return [node.name, node.role, node.address, node.interface, devices, free, heard]


def _devices(count: int, resource: str) -> str:
    if count == 0:
        return "no device"
    noun = "GPU" if resource == "GPU" else "CPU slot"
    return f"{count} {noun}{'s' if count > 1 else ''}"


def _versions(nodes: Sequence[Node]) -> list[str]:
    """What all share in one line; what differs in one line each."""
    names = list(dict.fromkeys(name for node in nodes for name in node.versions))
    shared, different = [], []
    for name in names:
        found = [node.versions.get(name, "not there") for node in nodes]
        if len(set(found)) == 1:
            shared.append(f"{name} {found[0]}")
        else:
            each = ", ".join(f"{node.name} {version}" for node, version in zip(nodes, found, strict=True))
            different.append(f"* {name}: {each}")
    return [f"versions on all nodes: {', '.join(shared)}", *different]


def _ranks(ranks: Mapping[int, str], status: Status) -> str:
    names = {row.node.address: row.node.name for row in status.rows}
    return ", ".join(f"rank {rank} on {names.get(address, address)}" for rank, address in sorted(ranks.items()))


def status_to_json(here: Membership, status: Status) -> dict[str, Any]:
    return {
        "head": here.head_address,
        "num_in": num_in(status.rows),
        "nodes": [_row_to_json(row) for row in status.rows],
        "models": [
            {"name": m.name, "url": m.url, "driver": m.driver, "ranks": {str(rank): a for rank, a in m.ranks.items()}}
            for m in status.models
        ],
        "left": [
            {"name": d.name, "address": d.address, "reason": d.reason, "age_seconds": round(d.age_seconds, 1)}
            for d in status.departed
        ],
    }


def _row_to_json(row: NodeRow) -> dict[str, Any]:
    names = ("name", "role", "address", "interface", "devices", "resource", "device_names", "versions", "started_at")
    memory = row.memory
    return {
        **{name: getattr(row.node, name) for name in names},
        "state": row.state,
        "age_seconds": round(row.age_seconds, 1),
        "free_bytes": memory and memory.free_bytes,
        "gpu_free_bytes": memory and memory.gpu_free_bytes,
        "gpu_total_bytes": memory and memory.gpu_total_bytes,
    }


def render_environments(found: Mapping[str, Environment]) -> list[str]:
    """A row a variable; ``*`` where nodes differ; ``(-e)`` behind what was typed."""
    rows = []
    for name in sorted({name for each in found.values() for name in each.variables}):
        cells = [_value(each, name) for each in found.values()]
        rows.append([f"{'* ' if len(set(cells)) > 1 else '  '}{name}", *cells])
    title = (
        "environment of ranks; * differs, -e was typed with up or join, secrets are masked (equal marks: equal values)"
    )
    return render_table(title, ["  variable", *found], rows)


def _value(environment: Environment, name: str) -> str:
    if name not in environment.variables:
        return "-"
    variable = environment.variables[name]
    text = variable.text if len(variable.text) <= _MAX_VALUE else f"{variable.text[: _MAX_VALUE - 1]}…"
    return f"{text} (-e)" if variable.source == "-e" else text


def environment_to_json(found: Mapping[str, Environment]) -> dict[str, Any]:
    return {
        node: {name: {"value": v.text, "source": v.source} for name, v in each.variables.items()}
        for node, each in found.items()
    }


def render_ports(layout: Layout, found: Mapping[str, Ports]) -> list[str]:
    rows = [[port.numbers, port.purpose, port.holder, port.binds, _open_on(port, found)] for port in layout.ports()]
    lines = render_table("TCP ports of this cluster", ("port", "purpose", "on", "listens on", "open now on"), rows)
    others = [f"  {node}: {each.port} at {each.address} by {each.name}" for node, each in _outside(layout, found)]
    if others:
        lines += ["outside of these, by ranks that run now (collectives take ports of the kernel's range):", *others]
    return [*lines, "on every node, for each other node's address:", f"  {firewall_line(layout)}"]


def firewall_line(layout: Layout) -> str:
    ports = f"{layout.head}:{layout.workers[1]},32768:60999"
    return f"sudo ufw allow proto tcp from ADDRESS to any port {ports}   # 32768:60999: collectives (Gloo, NCCL)"


def _open_on(port: Port, found: Mapping[str, Ports]) -> str:
    names = [
        node for node, ports in found.items() if any(port.first <= each.port <= port.last for each in ports.listening)
    ]
    return ", ".join(names) or "-"


def _outside(layout: Layout, found: Mapping[str, Ports]) -> list[tuple[str, Any]]:
    last = layout.workers[1]
    return [
        (node, each)
        for node, ports in found.items()
        for each in ports.listening
        if not layout.head <= each.port <= last
    ]


def ports_to_json(layout: Layout, found: Mapping[str, Ports]) -> dict[str, Any]:
    return {
        "ports": [
            {"first": p.first, "last": p.last, "purpose": p.purpose, "on": p.holder, "binds": p.binds}
            for p in layout.ports()
        ],
        "listening": {
            node: [{"port": e.port, "address": e.address, "pid": e.pid, "process": e.name} for e in ports.listening]
            for node, ports in found.items()
        },
        "firewall": firewall_line(layout).partition("   #")[0],
    }
