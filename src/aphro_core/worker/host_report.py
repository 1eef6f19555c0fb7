"""What a host answers before ranks start on it: versions, devices, memory, and which model files it has. JSON.

``python -m aphro_core.worker.host_report MODEL_PATH``, run there by the ssh backend. Nothing of torch is imported.
"""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import sys
from pathlib import Path

import msgspec

from aphro_core import host
from aphro_core.checkpoint.model_files import FileFacts, facts_of


class HostReport(msgspec.Struct, frozen=True):
    hostname: str
    versions: dict[str, str]
    num_cores: int
    num_gpus: int
    memory_bytes: int  # that new work can take
    files: dict[str, FileFacts]  # of the model, by name; empty if there is none


def report_host(model_path: str) -> HostReport:
    python = ".".join(platform.python_version_tuple()[:2])
    versions = {name: importlib.metadata.version(name) for name in ("aphro", "torch")} | {"python": python}
    return HostReport(
        hostname=socket.gethostname(),
        versions=versions,
        num_cores=host.num_cores(),
        num_gpus=len(host.visible_gpus()),
        memory_bytes=host.available_memory_bytes(),
        files=facts_of(Path(model_path)),
    )


if __name__ == "__main__":
    print(msgspec.json.encode(report_host(sys.argv[1])).decode())
