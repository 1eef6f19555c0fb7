"""What the control groups of a process leave it: of either version, its own and those above it, by their files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

OWN: Final = "/proc/self/cgroup"  # which groups a process is in
_ROOT: Final = "/sys/fs/cgroup"
_NAMES: Final = {  # of a controller's files, version 2 and version 1
    "cpu": (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")),
    "memory": (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
    ),
    "pids": (("pids.max", "pids.current"), ("pids.max", "pids.current")),
}
_NO_LIMIT: Final = 1 << 60  # version 1 writes a huge number


@dataclass(frozen=True, slots=True)
class Limits:
    """What is left; None without a limit. ``cores`` worth of time, ``memory`` bytes, ``pids`` processes and threads."""

    cores: float | None = None
    memory: int | None = None
    pids: int | None = None


def limit_files(own: str) -> list[str]:
    """Which files say it, given the text of ``OWN``. They need not be there."""
    return [path for files in _groups(own) for path in files[1:]]


def find_limits(own: str, texts: Mapping[str, str]) -> Limits:
    """By the texts of those of :func:`limit_files` that are there."""
    found: dict[str, list[float]] = {"cpu": [], "memory": [], "pids": []}
    for controller, *files in _groups(own):
        words = [texts.get(path, "").split() for path in files]
        if controller == "cpu":
            found["cpu"] += _quota(words[0] + (words[1] if len(words) > 1 else []))
        elif (limit := _number(words[0])) is not None and limit < _NO_LIMIT:
            found[controller].append(max(limit - (_number(words[1]) or 0) + _reclaimable(words[2:]), 0))
    cores, memory, pids = (min(found[name], default=None) for name in _NAMES)
    return Limits(cores, None if memory is None else int(memory), None if pids is None else int(pids))


def _groups(own: str) -> Iterator[tuple[str, ...]]:
    """A controller, and its files: of the outermost group that is seen, then further in."""
    places = {"": ""}  # controller of version 1, and "" for version 2 -> path of the group
    for line in own.splitlines():
        version, controllers, path = [*line.split(":", 2), "", ""][:3]
        places |= {"": path} if version == "0" else dict.fromkeys(controllers.split(","), path)
    for controller, (new, old) in _NAMES.items():
        for root, path, names in (_ROOT, places[""], new), (f"{_ROOT}/{controller}", places.get(controller, ""), old):
            parts = [part for part in path.split("/") if part]
            for depth in range(len(parts) + 1):
                folder = "/".join([root, *parts[:depth]])
                yield (controller, *(f"{folder}/{name}" for name in names))


def _quota(words: list[str]) -> list[float]:
    """Microseconds of processor time and in how many; ``max`` or -1 where there is no limit."""
    if len(words) != 2 or not all(word.isdigit() for word in words) or int(words[1]) == 0:
        return []
    return [int(words[0]) / int(words[1])]


def _number(words: list[str]) -> int | None:
    return int(words[0]) if len(words) == 1 and words[0].isdigit() else None


def _reclaimable(stat: list[list[str]]) -> int:
    """Of memory that counts as used: pages of files that were read once, a model's say, which the kernel takes back."""
    words = stat[0] if stat else []
    pairs = dict(zip(words[::2], words[1::2], strict=False))
    return int(pairs.get("total_inactive_file") or pairs.get("inactive_file") or 0)
