"""The table of checks, and their runner: each has a time limit, and what hangs or crashes in one is a finding of it."""

from __future__ import annotations

import fnmatch
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final

import anyio
from anyio.abc import TaskGroup

from aphro_core.doctor.check import Cluster, ClusterCheck, HostCheck, LiveOptions
from aphro_core.doctor.checks import (
    comm_gloo,
    comm_nccl,
    efa,
    gdr_acs,
    gdr_distance,
    gdr_path,
    gpu_busy,
    gpu_count,
    gpu_driver,
    gpu_enough,
    gpu_fabric,
    gpu_health,
    gpu_p2p,
    gpu_throttle,
    gpu_topology,
    host_acs,
    host_iommu,
    host_numa,
    host_ssh,
    host_sys,
    ib_devices,
    ib_disabled,
    ib_errors,
    ib_filter,
    ib_library,
    ib_link_layer,
    ib_nodes,
    ib_port,
    ib_rate,
    ib_sm,
    ib_symmetry,
    ib_traffic,
    imex,
    job_ras,
    limit_cgroup,
    limit_memlock,
    limit_nofile,
    limit_stack,
    name_loopback,
    name_unique,
    nccl_env,
    nccl_version,
    net_interface,
    net_mtu,
    net_reach,
    net_speed,
    nodes_clock,
    nodes_versions,
    roce_gid,
    roce_mtu,
    roce_route,
    shm_shared,
    shm_size,
    shm_stale,
)
from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.live.model import load_sizes
from aphro_core.errors import AphroError, UsageError
from aphro_core.remote.remote import Host, HostUnreachableError
from aphro_core.remote.ssh import open_host, parse_target

HOST_CHECKS: Final[tuple[HostCheck, ...]] = (
    host_ssh,
    gpu_driver,
    gpu_count,
    gpu_health,
    gpu_throttle,
    gpu_busy,
    gpu_topology,
    gpu_p2p,
    gpu_fabric,
    shm_size,
    shm_stale,
    limit_memlock,
    limit_nofile,
    limit_stack,
    limit_cgroup,
    host_sys,
    host_numa,
    host_iommu,
    host_acs,
    nccl_version,
    job_ras,
    ib_devices,
    ib_library,
    ib_nodes,
    ib_disabled,
    ib_filter,
    ib_port,
    ib_sm,
    ib_rate,
    ib_link_layer,
    ib_errors,
    roce_gid,
    roce_mtu,
    gdr_path,
    gdr_distance,
    gdr_acs,
    efa,
)
CLUSTER_CHECKS: Final[tuple[ClusterCheck, ...]] = (
    gpu_enough,
    nodes_versions,
    nodes_clock,
    nccl_env,
    name_loopback,
    name_unique,
    shm_shared,
    imex,
    net_interface,
    net_reach,
    net_mtu,
    net_speed,
    ib_symmetry,
    roce_route,
    comm_gloo,
    comm_nccl,
    ib_traffic,
)
CHECKS: Final[dict[str, HostCheck | ClusterCheck]] = {
    **{check.ID: check for check in HOST_CHECKS},
    **{check.ID: check for check in CLUSTER_CHECKS},
}

_RDMA: Final = ("ib.", "roce.", "gdr.", "efa")  # asked for by --ib or by name
_LIMIT_SECONDS: Final = 20.0  # unless a check names its own
_AT_ONCE: Final = 6  # checks of one host: sshd admits ten sessions on a connection

OnFinding = Callable[[Finding], None]


def explain(check_id: str) -> str:
    """What a check reads, and what its verdicts mean. Raises UsageError for an unknown id."""
    _refuse_unknown([check_id])
    check = CHECKS.get(check_id)
    if check is None:
        raise UsageError(f"{check_id!r} is several checks", hint=f"one of {', '.join(selected([check_id], ib=True))}")
    return f"{check.ID}: {check.TITLE}\n\n{check.EXPLAIN.strip()}\n"


def selected(only: Sequence[str] = (), skip: Sequence[str] = (), *, ib: bool = False) -> list[str]:
    """Ids of the checks to run, in the table's order. ``only`` and ``skip`` hold ids or patterns (``net.*``)."""
    _refuse_unknown([*only, *skip])
    chosen = [name for name in CHECKS if (_matches(name, only) if only else ib or not name.startswith(_RDMA))]
    return [name for name in chosen if not _matches(name, skip)]


async def run_checks(
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    ib: bool = False,
    hosts: Sequence[str] = (),
    live: LiveOptions | None = None,
    on_finding: OnFinding = lambda finding: None,
    progress: Callable[[str], None] = lambda line: None,
    connect_seconds: float = 10.0,
) -> list[Finding]:
    """Run the selected checks on this host, or on ``hosts`` ([user@]host[:port]), and those between hosts.

    The findings come in the table's order, then in that of the hosts; ``on_finding`` gets each as soon as it is there.
    Raises UsageError or ModelError for ids, hosts or a model that cannot be; never for what a check finds.
    """
    names = selected(only, skip, ib=ib)
    if live is not None:
        load_sizes(live.model)  # a model that cannot be is refused before anything runs
    targets = list(dict.fromkeys(hosts)) or [""]
    for target in targets:
        parse_target(target)
    findings: list[Finding] = []

    def add(found: list[Finding]) -> None:
        findings.extend(found)
        for finding in found:
            on_finding(finding)

    leave = anyio.Event()
    async with anyio.create_task_group() as connections:
        if hosts:
            progress(f"connecting to {', '.join(targets)}")
        reached = await _connect(connections, targets, connect_seconds, leave, add)
        async with anyio.create_task_group() as tasks:
            for host in reached:
                tasks.start_soon(_run_on, host, [check for check in HOST_CHECKS if check.ID in names], add)
        cluster = Cluster(reached, live or LiveOptions(), ib, progress)
        for check in CLUSTER_CHECKS:
            if check.ID in names and reached:
                add(await _guarded(check, check.check(cluster), None))
        leave.set()
    return sorted(findings, key=lambda finding: _place(finding, targets))


async def _connect(
    connections: TaskGroup,
    targets: Sequence[str],
    seconds: float,
    leave: anyio.Event,
    add: Callable[[list[Finding]], None],
) -> list[Host]:
    """The hosts that can be reached, tried at the same time and open until ``leave``; a finding for each other one."""
    reached: dict[str, Host] = {}
    tried = {target: anyio.Event() for target in targets}

    async def hold(target: str) -> None:
        try:
            async with open_host(target, timeout_seconds=seconds) as host:
                reached[target] = host
                tried[target].set()
                await leave.wait()
        except HostUnreachableError as error:
            add([Finding(host_ssh.ID, Status.FAIL, error.message, True, (), error.hint or "", target)])
        tried[target].set()

    for target in targets:
        connections.start_soon(hold, target)
    for event in tried.values():
        await event.wait()
    return [reached[target] for target in targets if target in reached]


async def _run_on(host: Host, checks: Sequence[HostCheck], add: Callable[[list[Finding]], None]) -> None:
    at_once = anyio.Semaphore(_AT_ONCE)

    async def run(check: HostCheck) -> None:
        async with at_once:
            found = await _guarded(check, check.check(host), getattr(check, "LIMIT_SECONDS", _LIMIT_SECONDS))
        add([replace(finding, host=finding.host or host.name) for finding in found])

    async with anyio.create_task_group() as tasks:
        for check in checks:
            tasks.start_soon(run, check)


async def _guarded(
    check: HostCheck | ClusterCheck, running: Awaitable[Finding | list[Finding]], limit_seconds: float | None
) -> list[Finding]:
    """What a check found, or that it did not end, or how it crashed. ``None``: it keeps limits of its own."""
    try:
        with anyio.fail_after(limit_seconds):
            found = await running
    except TimeoutError as error:
        reason = str(error) or f"no answer within {limit_seconds:g} s"
        return [Finding(check.ID, Status.FAIL, f"{check.TITLE}: {reason}", remedy="look at `dmesg` on that host")]
    except AphroError as error:
        return [Finding(check.ID, Status.FAIL, f"{check.TITLE}: {error.message}", remedy=error.hint or "")]
    except Exception as error:
        title = f"{check.TITLE}: this check failed itself, please report it ({type(error).__name__}: {error})"
        return [Finding(check.ID, Status.WARN, title, evidence=_where(error))]
    return [found] if isinstance(found, Finding) else found


def _where(error: Exception) -> tuple[Evidence, ...]:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ()
    return (Evidence(trace.tb_frame.f_code.co_filename, trace.tb_lineno, repr(error)),)


def _place(finding: Finding, targets: Sequence[str]) -> tuple[int, int]:
    order = list(CHECKS)
    return (
        order.index(finding.id) if finding.id in order else len(order),
        targets.index(finding.host) if finding.host in targets else len(targets),
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") for pattern in patterns)


def _refuse_unknown(patterns: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(_matches(name, [pattern]) for name in CHECKS):
            raise UsageError(f"no check is called {pattern!r}", hint=f"ids and patterns of {', '.join(CHECKS)}")
