"""SHA-256 of whole model files: several at once, kept until a file changes.

As a program (``python -m aphro_core.checkpoint.digests PATH``) it writes a JSON object a line: bytes done and in all,
and in the end the digests by name.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from aphro_core.checkpoint.model_files import model_files

_THREADS: Final = 4
_CHUNK_BYTES: Final = 8 << 20
_SAY_BYTES: Final = 256 << 20


class DigestProgress(msgspec.Struct, frozen=True):
    done_bytes: int
    total_bytes: int
    digests: dict[str, str] | None = None  # by name, in the last line


class _Kept(msgspec.Struct):
    """What was found, by path; it holds while size, time of change and inode are the same."""

    of: dict[str, tuple[int, int, int, str]] = {}


def cache_folder() -> Path:
    """Where aphro keeps on this host what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aphro"


def digest_files(files: Sequence[Path], on_progress: Callable[[int, int], None]) -> dict[str, str]:
    """SHA-256 in hex by file name; ``on_progress(done, total)`` counts bytes, from several threads. Raises OSError."""
    kept_in = cache_folder() / "digests.json"
    kept = _read(kept_in)
    stats = {file: file.stat() for file in files}
    total, done, lock = sum(stat.st_size for stat in stats.values()), 0, threading.Lock()

    def advance(num_bytes: int) -> None:
        nonlocal done
        with lock:
            done += num_bytes
            on_progress(done, total)

    def digest(file: Path) -> str:
        stat, key = stats[file], str(file.resolve())
        signature = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
        size, changed_ns, inode, found = kept.of.get(key, (0, 0, 0, ""))
        if found and (size, changed_ns, inode) == signature:
            advance(stat.st_size)
            return found
        found = _digest(file, advance)
        kept.of[key] = (*signature, found)
        return found

    with ThreadPoolExecutor(_THREADS, "digest") as pool:
        found = dict(zip((file.name for file in files), pool.map(digest, files), strict=True))
    _write(kept_in, kept)
    return found


def _digest(file: Path, advance: Callable[[int], None]) -> str:
    sha256, buffer = hashlib.sha256(), bytearray(_CHUNK_BYTES)
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            sha256.update(memoryview(buffer)[:count])
            advance(count)
    return sha256.hexdigest()


def _read(path: Path) -> _Kept:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Kept)
    except (OSError, msgspec.MsgspecError):
        return _Kept()


def _write(path: Path, kept: _Kept) -> None:
    """Whole or not at all; a cache that cannot be kept costs time, nothing else."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(msgspec.json.encode(kept))
        partial.replace(path)


def main(path: str) -> None:
    said = 0

    def say(done: int, total: int) -> None:
        nonlocal said
        if done - said >= _SAY_BYTES:
            said = done
            print(msgspec.json.encode(DigestProgress(done, total)).decode(), flush=True)

    found = digest_files(model_files(Path(path)), say)
    print(msgspec.json.encode(DigestProgress(0, 0, found)).decode(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
