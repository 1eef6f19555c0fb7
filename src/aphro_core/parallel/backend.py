"""Which backend starts the ranks, and why: one rule, one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from aphro_core.config import Backend, Device
from aphro_core.errors import PlacementError, UsageError

Asked = Literal["auto", "mp", "ssh", "ray"]
# where this process finds itself: in a placement group of Ray, on a node of an aphro cluster, told of a Ray cluster
ClusterKind = Literal["", "placement group", "aphro cluster", "Ray cluster"]


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """``num_devices``: that ranks may take on this host; None: any number, as of a host alone that computes on CPUs."""

    tp_size: int
    pp_size: int
    device: Device
    num_devices: int | None
    has_hosts: bool = False
    cluster: ClusterKind = ""

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def fits_here(self) -> bool:
        return self.num_devices is None or self.world_size <= self.num_devices


class Choice(NamedTuple):
    backend: Backend
    why: str


def choose_backend(asked: Asked, around: Surroundings) -> Choice:
    """``--hosts``: ssh. In a placement group: ray. Else mp where this host has enough devices, ray in a cluster.

    Raises UsageError for a contradiction, PlacementError where nothing of this is to be had.
    """
    if asked != "auto":
        return _check(asked, around)
    if around.has_hosts:
        return Choice("ssh", "--hosts")
    if around.cluster == "placement group":
        return Choice("ray", "this is a job of Ray, in a placement group")
    if around.fits_here:
        return _here(around, f"{_count(around.world_size, 'rank')} on this host")
    if around.cluster:
        have = f"{_count(around.num_devices or 0, 'device')} on this host"
        return Choice("ray", f"{_count(around.world_size, 'rank')}, {have}, which is in {_article(around.cluster)}")
    raise _too_few(around)


def _check(asked: Literal["mp", "ssh", "ray"], around: Surroundings) -> Choice:
    if around.has_hosts and asked != "ssh":
        raise UsageError(
            f"--hosts with the {asked} backend, whose ranks do not run on them", hint="leave one of them out"
        )
    if asked == "ssh" and not around.has_hosts:
        raise UsageError("the ssh backend needs to know the hosts", hint="--hosts a:2,b:2 (HOST:DEVICES,...)")
    if asked == "mp" and around.device == "cuda" and not around.fits_here:
        raise _too_few(around)
    return _here(around, "asked for", "mp") if asked == "mp" else Choice(asked, "asked for")


def _here(around: Surroundings, why: str, backend: Literal["mp", "inprocess"] | None = None) -> Choice:
    return Choice(backend or ("inprocess" if around.world_size == 1 else "mp"), why)


def _too_few(around: Surroundings) -> PlacementError:
    """The sentence that people search for, then where the missing devices could come from."""
    missing = around.world_size - (around.num_devices or 0)
    fewer = f"-tp {around.num_devices}, " if around.num_devices else ""
    return PlacementError(
        f"World size ({around.world_size}) is larger than the number of available GPUs ({around.num_devices}) in this "
        f"node: tensor parallel {around.tp_size} x pipeline parallel {around.pp_size} needs one GPU a rank, "
        f"{missing} more than there are",
        hint=f"{fewer}--device cpu, --hosts HOST:{missing},... over ssh, or `aphro cluster up` here and "
        "`aphro cluster join` on other hosts",
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number or 'no'} {what}s"


def _article(cluster: str) -> str:
    return f"an {cluster}" if cluster.startswith("a") else f"a {cluster}"
