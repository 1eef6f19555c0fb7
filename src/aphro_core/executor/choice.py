"""Where the ranks will run: device, backend and hosts, each choice said with its reason in one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aphro_core import host
from aphro_core.config import Backend, Device, HostSlots, RayCluster
from aphro_core.errors import PlacementError, UsageError
from aphro_core.executor.ray.look import Found, find_cluster, look
from aphro_core.executor.ray.protocol import RayNode
from aphro_core.executor.ray.seats import names
from aphro_core.parallel.backend import Asked, Choice, Surroundings, choose_backend
from aphro_core.parallel.placement import place_ranks, splits_a_group
from aphro_core.reporter import Reporter


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What was asked of the placement."""

    tp_size: int
    pp_size: int
    device: Literal["auto", "cpu", "cuda"]
    backend: Asked
    hosts: tuple[HostSlots, ...]
    wait_nodes: int | None
    wait_seconds: float

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size


@dataclass(frozen=True)
class Placement:
    """``hosts``: of the ssh backend, or the nodes of the cluster with their free devices."""

    device: Device
    backend: Backend
    hosts: tuple[HostSlots, ...] = ()
    ray: RayCluster | None = None


def choose_placement(wanted: Wanted, reporter: Reporter) -> Placement:
    """Raises UsageError for contradictions, PlacementError where devices are missing."""
    found = find_cluster()
    gpus = len(host.visible_gpus()) if host.torch_has_cuda() else 0
    device: Device = wanted.device if wanted.device != "auto" else "cuda" if gpus else "cpu"
    around = Surroundings(
        tp_size=wanted.tp_size,
        pp_size=wanted.pp_size,
        device=device,
        num_devices=gpus if device == "cuda" else _cpu_slots(wanted, found),
        has_hosts=bool(wanted.hosts),
        cluster=found.kind,
    )
    if not around.has_hosts and not around.cluster and wanted.backend != "ray":
        _check_gpus(wanted, gpus)
    choice = _choose(wanted, around)
    if choice.backend == "ray":
        return _in_cluster(wanted, choice, found.where or RayCluster(address="auto"), reporter)
    if choice.backend == "ssh":
        _report_device(wanted, device, gpus, reporter)
        return Placement(device, "ssh", _report_places(wanted, choice, wanted.hosts, "hosts", reporter))
    _report_device(wanted, device, gpus, reporter)
    if device == "cpu" and wanted.world_size > host.num_cores():
        reporter.line(
            f"{wanted.world_size} ranks share {host.num_cores()} cores: correct, but slower than fewer ranks."
        )
    if choice.backend == "mp":
        reporter.line(f"{_using(wanted, choice)}: {choice.why}, one {device} process a rank.")
    return Placement(device, choice.backend)


def _choose(wanted: Wanted, around: Surroundings) -> Choice:
    if wanted.wait_nodes is None:
        return choose_backend(wanted.backend, around)
    if wanted.backend not in ("auto", "ray") or wanted.hosts:
        raise UsageError("--wait-nodes waits for nodes of a cluster, which only the ray backend uses")
    if not around.cluster:
        raise UsageError(
            "--wait-nodes waits for nodes of a cluster, and this host is in none",
            hint="`aphro cluster up`, `aphro cluster join`, or RAY_ADDRESS=IP:6379",
        )
    return Choice("ray", "--wait-nodes")


def _cpu_slots(wanted: Wanted, found: Found) -> int | None:
    """In a cluster this host takes as many as it offers there; alone, it shares its cores among any number."""
    if found.membership is not None and found.membership.resource == "aphro_slot":
        return found.membership.devices
    if not found.kind:
        return None
    return host.num_cores() if wanted.device == "cpu" else 0  # where nothing was said, the cluster may have GPUs


def _check_gpus(wanted: Wanted, gpus: int) -> None:
    if wanted.device == "cuda" and not gpus:
        what = "this host shows no NVIDIA GPU" if host.torch_has_cuda() else "the installed torch is a CPU build"
        raise PlacementError(f"--device cuda, but {what}", hint="--device cpu, or a CUDA build of torch on a GPU host")


def _report_device(wanted: Wanted, device: Device, gpus: int, reporter: Reporter) -> None:
    if wanted.device == "auto":
        alone = "CPU build of torch" if host.visible_gpus() else "no GPU visible"
        reporter.line(f"Device {device}: {f'{gpus} GPUs visible' if device == 'cuda' else alone}.")


def _in_cluster(wanted: Wanted, choice: Choice, where: RayCluster, reporter: Reporter) -> Placement:
    def choose_device(nodes: list[RayNode]) -> Device:
        if wanted.device != "auto":
            return wanted.device
        return "cuda" if host.torch_has_cuda() and any(node.total("GPU") for node in nodes) else "cpu"

    cluster, resource, device = look(
        where,
        choose_device,
        wanted.world_size,
        reporter.line,
        num_nodes=wanted.wait_nodes or 0,
        seconds=wanted.wait_seconds if wanted.wait_nodes else 0.0,
    )
    if wanted.device == "auto":
        num_gpus = sum(node.total("GPU") for node in cluster.nodes)
        why = f"{num_gpus} GPUs" if device == "cuda" else "no GPU" if not num_gpus else "a CPU build of torch"
        reporter.line(f"Device {device}: {why} in the cluster.")
    named = names(cluster.nodes)
    hosts = tuple(HostSlots(named[node.id], node.free(resource)) for node in cluster.nodes if node.reachable)
    return Placement(device, "ray", _report_places(wanted, choice, hosts, "nodes of the cluster", reporter), where)


def _report_places(
    wanted: Wanted, choice: Choice, hosts: tuple[HostSlots, ...], of_what: str, reporter: Reporter
) -> tuple[HostSlots, ...]:
    """Raises PlacementError when the hosts have too few devices."""
    places = place_ranks([each.num_slots for each in hosts], wanted.tp_size, wanted.pp_size)
    used = len({place.host for place in places})
    ranks = f"{wanted.world_size} rank{'s' if wanted.world_size > 1 else ''} on {used} of {len(hosts)} {of_what}"
    reporter.line(f"{_using(wanted, choice)}: {choice.why}; {ranks}.")
    if splits_a_group([place.host for place in places], wanted.tp_size):
        reporter.line(
            "A tensor parallel group spans hosts: each layer waits twice for the network between them (measured at the "
            "start)."
        )
    return hosts


def _using(wanted: Wanted, choice: Choice) -> str:
    verb = "Using" if wanted.backend != "auto" or choice.backend == "ssh" else "Defaulting to use"
    return f"{verb} {choice.backend} for distributed inference"
