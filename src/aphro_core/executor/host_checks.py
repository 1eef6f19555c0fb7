"""Refusals before a rank starts on another host: other versions, too few devices, no model or another one."""

from __future__ import annotations

from aphro_core.checkpoint.model_files import FileFacts
from aphro_core.config import Device
from aphro_core.errors import ModelError, PlacementError
from aphro_core.worker.host_report import HostReport


def check_versions(name: str, theirs: HostReport, ours: HostReport) -> None:
    """aphro, Python and torch must be the same: ranks exchange messages and tensors as they are in memory."""
    for package, version in ours.versions.items():
        if theirs.versions.get(package) != version:
            raise PlacementError(
                f"{name} has {package} {theirs.versions.get(package, 'not installed')}, this host has {version}",
                hint=f"install {package} {version} on {name}: all hosts need the same environment",
            )


def check_devices(name: str, theirs: HostReport, num_ranks: int, device: Device) -> None:
    if device == "cuda" and theirs.num_gpus < num_ranks:
        raise PlacementError(
            f"{name} shows {theirs.num_gpus} GPUs, {num_ranks} ranks are to run there",
            hint=f"--hosts {name}:{theirs.num_gpus},..., or look at CUDA_VISIBLE_DEVICES and nvidia-smi on {name}",
        )


def check_files(name: str, path: str, theirs: dict[str, FileFacts], ours: dict[str, FileFacts]) -> None:
    """Each file of the model by name, size and the digest of its head. Raises ModelError for the first difference."""
    if not theirs:
        raise ModelError(
            f"{name} has no model at {path}",
            hint=f"--model-from head, or copy it there, to the same path: scp -r {path} {name}:{path}",
        )
    for file, own in ours.items():
        other = theirs.get(file)
        if other == own:
            continue
        if other is None:
            found = "is missing"
        elif other.num_bytes != own.num_bytes:
            found = f"has {other.num_bytes} bytes, {own.num_bytes} on this host"
        else:
            found = f"begins with other bytes (SHA-256 {other.digest[:12]}, {own.digest[:12]} on this host)"
        raise ModelError(f"{name}: {file} of {path} {found}", hint=_copy_again(file, name))
    if extra := sorted(theirs.keys() - ours.keys()):
        raise ModelError(
            f"{name}: {path} has {extra[0]}, which this host's has not", hint=f"remove {extra[0]} on {name}"
        )


def check_digests(name: str, path: str, theirs: dict[str, str], ours: dict[str, str]) -> None:
    """The same of whole files: SHA-256 by file name."""
    for file, own in ours.items():
        other = theirs.get(file, "missing")
        if other != own:
            raise ModelError(
                f"{name}: {file} of {path} has other contents (SHA-256 {other[:12]}, {own[:12]} on this host)",
                hint=_copy_again(file, name),
            )


def _copy_again(file: str, name: str) -> str:
    return f"copy {file} to {name} again, or --model-from head"
