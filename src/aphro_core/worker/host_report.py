"""What a host answers before ranks start on it: versions, devices, memory, and which model files it has. JSON.

``python -m aphro_core.worker.host_report MODEL_PATH``, run there by the ssh backend. Nothing of torch is imported.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import socket
import sys
from pathlib import Path
from typing import Final

import msgspec

from aphro_core import host

_PATTERNS: Final = ("config.json", "*.safetensors", "*.safetensors.index.json")
_HEAD_BYTES: Final = 1 << 20  # of a file: the header of a checkpoint, which a swapped or older file does not share


class ModelFile(msgspec.Struct, frozen=True):
    num_bytes: int
    digest: str  # SHA-256 of the first MiB


class HostReport(msgspec.Struct, frozen=True):
    hostname: str
    versions: dict[str, str]
    num_cores: int
    num_gpus: int
    memory_bytes: int  # that new work can take
    files: dict[str, ModelFile]  # of the model, by name; empty if there is none


def report_host(model_path: str) -> HostReport:
    python = ".".join(platform.python_version_tuple()[:2])
    versions = {name: importlib.metadata.version(name) for name in ("aphro", "torch")} | {"python": python}
    return HostReport(
        hostname=socket.gethostname(),
        versions=versions,
        num_cores=host.num_cores(),
        num_gpus=len(host.visible_gpus()),
        memory_bytes=host.available_memory_bytes(),
        files=model_files(Path(model_path)),
    )


def model_files(path: Path) -> dict[str, ModelFile]:
    """The files that hold a model: a single one, or those of a folder."""
    found = [path] if path.is_file() else [file for pattern in _PATTERNS for file in sorted(path.glob(pattern))]
    return {file.name: _describe(file) for file in found}


def _describe(file: Path) -> ModelFile:
    with file.open("rb") as opened:
        return ModelFile(os.fstat(opened.fileno()).st_size, hashlib.sha256(opened.read(_HEAD_BYTES)).hexdigest())


if __name__ == "__main__":
    print(msgspec.json.encode(report_host(sys.argv[1])).decode())
