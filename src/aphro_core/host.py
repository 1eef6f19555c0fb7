"""What this host offers, read without torch: memory, cores, instructions, GPUs."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from aphro_core import cgroups
from aphro_core.cgroups import Limits, find_limits, limit_files

_MEMINFO: Final = Path("/proc/meminfo")
_MPS_PIPES: Final = "/tmp/nvidia-mps"  # the driver's own default
_PRODUCT_FLAGS: Final = {"avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni"}
_BF16_FLAGS: Final = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}


def available_memory_bytes() -> int:
    """Bytes that new work can take: the kernel's MemAvailable, or what its control groups leave if that is less."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _MEMINFO.read_text(), re.MULTILINE)
    available = int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    left = _limits().memory
    return available if left is None else min(available, left)


def num_cores() -> int:
    """Cores that this process may keep busy: those it may run on, or as many whole ones as the quotas of its control
    groups are worth, if that is less; one at least."""
    cores, quota = len(os.sched_getaffinity(0)), _limits().cores
    return cores if quota is None else max(1, min(cores, int(quota)))


def _limits() -> Limits:
    """Of this process's control groups."""
    own = _read(cgroups.OWN)
    return find_limits(own, {path: _read(path) for path in limit_files(own)})


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


@cache
def cpu_instructions() -> frozenset[str]:
    """The instruction sets of this CPU as /proc/cpuinfo names them (``avx512_bf16``, ``sve``); none where it is not."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def has_bf16_instructions() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; without, bfloat16 is slower than float32."""
    return not _BF16_FLAGS.isdisjoint(cpu_instructions())


def has_product_kernels() -> bool:
    """Whether aphro's own products run on this CPU (aphro_kernels/cpu_linear.py, cpu_packed_linear.py), rather than
    torch's. CPUs with AMX multiply many rows faster than these do, by oneDNN."""
    found = cpu_instructions()
    return found >= _PRODUCT_FLAGS and "amx_bf16" not in found


def visible_gpus() -> list[str]:
    """CUDA device indices or UUIDs that this process may use, as CUDA_VISIBLE_DEVICES numbers them; [] without any."""
    present = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not present or chosen is None:
        return [name.removeprefix("nvidia") for name in present]
    return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]


def sign_of_mps() -> str | None:
    """What shows that this process shares its GPUs with others by MPS, at the same time and not in turns; None where
    nothing does. The daemon may have been started without any variable."""
    control = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or _MPS_PIPES) / "control"
    if control.exists():
        return str(control)
    share = os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")
    return f"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE={share}" if share else None


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """One GPU as its driver reports it: ``total_bytes`` that programs can see, ``free_bytes`` of them now."""

    name: str
    total_bytes: int
    free_bytes: int


def gpu_memory() -> list[GpuMemory]:
    """The visible GPUs, asked of nvidia-smi (no torch, no context); [] without any, or where it does not answer.

    What the driver reserves is not part of what CUDA reports as the total.
    """
    visible = visible_gpus()
    if not visible:
        return []
    fields = "--query-gpu=index,uuid,name,memory.total,memory.reserved,memory.free"
    command = ["nvidia-smi", fields, "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    found: dict[str, GpuMemory] = {}
    for line in answer.stdout.splitlines():
        index, uuid, name, *amounts = [cell.strip() for cell in line.split(",")] + [""] * 6
        if amounts[0].isdigit():
            total, reserved, free = (int(cell) if cell.isdigit() else 0 for cell in amounts[:3])
            gpu = GpuMemory(name, (total - reserved) * 2**20, free * 2**20)
            found |= {index: gpu, uuid: gpu}
    return [found[name] for name in visible if name in found]


def least_compute_capability() -> tuple[int, int] | None:
    """Of the GPUs here, asked of nvidia-smi; None where it does not say."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    found = [line.strip().split(".") for line in answer.stdout.splitlines()]
    pairs = [(int(cell[0]), int(cell[1])) for cell in found if len(cell) == 2 and all(part.isdigit() for part in cell)]
    return min(pairs, default=None)


def torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build (its version says ``+cpu`` where it is not)."""
    return not importlib.metadata.version("torch").endswith("+cpu")


@dataclass(frozen=True)
class ProcessState:
    """``state`` is the letter of ``ps`` (T: stopped); ``cpu_seconds`` all that its threads have computed."""

    state: str
    cpu_seconds: float


def process_state(pid: int) -> ProcessState | None:
    """What the kernel says of a process of this host; None when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return ProcessState(fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))


def process_age(pid: int) -> float:
    """Seconds since a process of this host began, to a hundredth; 0 when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


class StopWatch:
    """Who is stopped (SIGSTOP) each time that one looks. A looker that is stopped as well sees it once at most."""

    def __init__(self, num_looks: int) -> None:
        """``num_looks``: so often in a row, to count as stopped for good."""
        self._num_looks = num_looks
        self._seen: dict[int, int] = {}

    def is_stopped(self, pid: int) -> bool:
        """Look at a process of this host."""
        state = process_state(pid)
        self._seen[pid] = self._seen.get(pid, 0) + 1 if state is not None and state.state in ("T", "t") else 0
        return self._seen[pid] >= self._num_looks


def num_oom_kills() -> int:
    """Processes that the kernel has killed for want of memory since it started."""
    try:
        text = Path("/proc/vmstat").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0)
