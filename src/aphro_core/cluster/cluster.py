"""What `aphro cluster` does to this host: `up`, `join` and `down`."""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from aphro_core.cluster.address import Chosen, check_head, choose_address, resolve
from aphro_core.cluster.asking import ask_for
from aphro_core.cluster.member import clean_files
from aphro_core.cluster.membership import (
    Membership,
    Resource,
    is_running,
    read_membership,
    read_record,
    remove_membership,
)
from aphro_core.cluster.messages import (
    Done,
    Down,
)
from aphro_core.cluster.plan import Plan
from aphro_core.cluster.ports import DEFAULT_PORT, MAX_FIRST_PORT
from aphro_core.cluster.processes import end_processes
from aphro_core.cluster.raylet import check_installed
from aphro_core.cluster.starting import start_member
from aphro_core.cluster.token import new_token
from aphro_core.errors import ClusterError, UsageError
from aphro_core.host import gpu_memory, torch_has_cuda, visible_gpus
from aphro_core.reporter import Reporter

_DOWN_SECONDS: Final = 60.0
_END_SECONDS: Final = 15.0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was typed for ``up`` or ``join``. ``head``: "IP" or "IP:port" of the head, None on the head itself."""

    head: str | None = None
    advertise: str | None = None
    interface: str | None = None
    port: int = DEFAULT_PORT
    devices: int | None = None
    dashboard: bool = False
    environment: dict[str, str]
    token: str | None = None
    allow_skew: bool = False
    wait_seconds: float = 0.0


def start(asked: Asked, reporter: Reporter) -> Membership:
    """``up`` or ``join``: returns when this node is in. Raises AphroError; nothing runs then."""
    check_installed(dashboard=asked.dashboard)
    _clean_leftovers(reporter)
    head, port = (None, asked.port) if asked.head is None else parse_head(asked.head)
    if head is not None:
        check_head(head)
    if not 1024 <= port <= MAX_FIRST_PORT:
        raise UsageError(f"port {port} cannot be the first of a cluster's", hint=f"1024 to {MAX_FIRST_PORT}")
    if head is not None and asked.token is None:
        raise UsageError(
            "no token", hint="--token-file FILE, or APHRO_CLUSTER_TOKEN=... as `up` printed it on the head"
        )
    chosen = choose_address(advertise=asked.advertise, interface=asked.interface, peer=head)
    reporter.line(f"using {chosen}")
    if chosen.warning:
        reporter.line(f"warning: {chosen.warning}")
    start_member(_plan(asked, head, port, chosen), reporter)
    membership = read_membership()
    if membership is None:
        raise ClusterError("the node was in, and has left again", hint="aphro cluster logs")
    return membership


def parse_head(text: str) -> tuple[str, int]:
    """``IP``, ``IP:port``, ``[IPv6]:port`` or a name -> address and port. Raises UsageError."""
    host, port = text, ""
    if text.count(":") == 1 or "]:" in text:
        host, _, port = text.rpartition(":")
    if port and not port.isdigit():
        raise UsageError(f"--head {text}: {port!r} is no port", hint=f"--head {host}:{DEFAULT_PORT}")
    return resolve(host.strip("[]")), int(port or DEFAULT_PORT)


def _plan(asked: Asked, head: str | None, port: int, chosen: Chosen) -> Plan:
    devices, resource, names = _devices(asked.devices)
    return Plan(
        role="head" if head is None else "member",
        head=head or chosen.address,
        head_port=port,
        address=chosen.address,
        interface=chosen.interface,
        token=asked.token or new_token(),
        devices=devices,
        resource=resource,
        device_names=names,
        environment=asked.environment,
        dashboard=asked.dashboard,
        allow_skew=asked.allow_skew,
        wait_seconds=asked.wait_seconds,
    )


def _devices(wanted: int | None) -> tuple[int, Resource, list[str]]:
    """GPUs where torch can use them, else slots for ranks on the CPU: one, unless told otherwise."""
    gpus = visible_gpus() if torch_has_cuda() else []
    if not gpus:
        return 1 if wanted is None else wanted, "aphro_slot", []
    if wanted is not None and wanted > len(gpus):
        hint = "fewer, or look at CUDA_VISIBLE_DEVICES and nvidia-smi"
        raise UsageError(f"--devices {wanted}: this host shows {len(gpus)} GPUs", hint=hint)
    names = [gpu.name for gpu in gpu_memory()]
    return len(gpus) if wanted is None else wanted, "GPU", names[:wanted]


def _clean_leftovers(reporter: Reporter) -> None:
    """Of a member that was killed. Raises ClusterError where one runs."""
    record = read_record()
    if record is None:
        return
    if is_running(record):
        what = "the head of a cluster" if record.role == "head" else f"in the cluster of {record.head_address}"
        raise ClusterError(f"this host is {what} already", hint="aphro cluster status, or aphro cluster down first")
    reporter.line("cleaning up after a member that was killed")
    end_processes(record)
    clean_files(record)


def down(reporter: Reporter) -> dict[str, str]:
    """End this host's node; on the head, all nodes. Returns node -> problem of those that could not be told.

    Raises ClusterError where this host is in no cluster, or where something does not end.
    """
    record = read_record()
    if record is None:
        raise ClusterError("this host is in no cluster", hint="nothing to do")
    problems: dict[str, str] = {}
    if is_running(record):
        reporter.line("ending all nodes" if record.role == "head" else "leaving the cluster")
        problems = _ask_to_end(record)
        _wait_for_end(record)
    remaining = end_processes(record)  # what a member that was killed has left
    clean_files(record)
    remove_membership()
    if remaining:
        raise ClusterError(
            f"these processes do not end: {', '.join(map(str, remaining))}", hint="they hang in the kernel"
        )
    return problems


def _ask_to_end(record: Membership) -> dict[str, str]:
    try:
        request = Down("aphro cluster down")
        return ask_for(record, record.node_address, request, Done, timeout=_DOWN_SECONDS).problems
    except ClusterError:  # it hangs, or ended before it could answer
        return {}


def _wait_for_end(record: Membership) -> None:
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(record.pid)
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)
        if is_running(record) and not ended.poll(_END_SECONDS * 1000):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            ended.poll(_END_SECONDS * 1000)
        os.close(pidfd)
