"""Run on a host: versions of what has to be equal on all hosts, without importing any of it. JSON."""

from __future__ import annotations

import json
import platform
from importlib import metadata

NAMES = ("aphro", "torch", "transformers", "triton")
NCCL = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    found = {name: version(name) for name in NAMES}
    found |= {"NCCL": next((text for name in NCCL if (text := version(name))), None)}
    found |= {"Python": platform.python_version(), "kernel": platform.release()}
    print(json.dumps(found))
