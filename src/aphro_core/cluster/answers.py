"""What a member says of its node when it is asked: memory, environment, ports, logs."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from aphro_core.cluster.membership import Membership
from aphro_core.cluster.messages import Environment, Listening, LogLines, Memory, Ports, Variable
from aphro_core.cluster.processes import processes_of
from aphro_core.environment import is_secret
from aphro_core.host import available_memory_bytes, gpu_memory
from aphro_core.listeners import listeners

_SHOWN: Final = ("NCCL_", "GLOO_", "UCX_", "HF_", "OMP_", "TORCH_", "CUDA_", "APHRO_", "RAY_", "LD_LIBRARY_PATH")
_PROXIES: Final = (
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
)
_LINES_A_FRAME: Final = 500
_FOLLOW_SECONDS: Final = 0.5


def memory_now() -> Memory:
    gpus = gpu_memory()
    return Memory(available_memory_bytes(), [gpu.free_bytes for gpu in gpus], [gpu.total_bytes for gpu in gpus])


def environment_of(variables: Mapping[str, str], typed: Mapping[str, str], token: str) -> Environment:
    """What decides how ranks compute and talk here. A secret is a mark that is equal where secrets are equal."""
    shown = sorted(name for name in variables if name.startswith(_SHOWN) or name in _PROXIES or name in typed)
    return Environment(
        {
            name: Variable(_masked(name, variables[name], token), "-e" if name in typed else "shell")
            for name in shown
            if name not in ("APHRO_CLUSTER_NODE", "RAY_AUTH_TOKEN_PATH")
        }
    )


def _masked(name: str, value: str, token: str) -> str:
    if not is_secret(name):
        return value
    mark = hmac.new(token.encode(), f"{name}={value}".encode(), hashlib.sha256).hexdigest()
    return f"*** ({mark[:6]})"


def ports_of(member: Membership) -> Ports:
    """What the member and all that it has started listen on."""
    ours = {member.pid, *processes_of(member)}
    return Ports([Listening(*listener) for listener in listeners() if listener.pid in ours])


def log_lines(path: Path, num_lines: int, follow: bool) -> Iterator[LogLines]:
    """The end of a log in frames; with ``follow`` what is appended later too, for ever. Raises OSError."""
    with path.open(errors="replace") as file:
        lines = [line.rstrip("\n") for line in deque(file, maxlen=num_lines)]
        for at in range(0, len(lines), _LINES_A_FRAME):
            yield LogLines(lines[at : at + _LINES_A_FRAME], is_last=False)
        while follow:
            new = [line.rstrip("\n") for line in file.readlines()]
            yield LogLines(new, is_last=False)  # an empty frame finds out whether anybody still reads
            if not new:
                time.sleep(_FOLLOW_SECONDS)
    yield LogLines([], is_last=True)
