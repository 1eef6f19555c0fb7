"""Log files as blocks of bytes: plain or gzip, or standard input as ``-``."""

from __future__ import annotations

import contextlib
import gzip
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Final

from aphro_core.doctor.nccl_log.facts import LogFacts
from aphro_core.doctor.nccl_log.scan import Scan
from aphro_core.doctor.nccl_log.verdict import LogReport, judge
from aphro_core.errors import UsageError

_BLOCK_BYTES: Final = 1 << 20
_LARGE_BYTES: Final = 1 << 28  # reading takes a moment
_GZIP: Final = b"\x1f\x8b"

Progress = Callable[[str, int, int], None]  # what is read, bytes so far, bytes of the file (0 if unknown)


def read_logs(files: Sequence[str], *, ib: bool = False, progress: Progress | None = None) -> LogReport:
    """Scan all files (``-``: standard input) in order and judge them together.

    Raises UsageError for a file that cannot be read.
    """
    facts = LogFacts()
    scan = Scan(facts)
    for file in files:
        with open_log(file) as (stream, size):
            scan.read_file("stdin" if file == "-" else file, _blocks(file, stream, size, progress))
    return judge(facts, ib=ib)


def expand(files: Sequence[str]) -> list[str]:
    """A folder stands for the files in it."""
    expanded: list[str] = []
    for file in files:
        path = Path(file)
        if file != "-" and path.is_dir():
            inside = sorted(str(entry) for entry in path.iterdir() if entry.is_file())
            if not inside:
                raise UsageError(f"--nccl-log: {file} is a folder without files", hint="name a log file")
            expanded += inside
        else:
            expanded.append(file)
    if expanded.count("-") > 1:
        raise UsageError("--nccl-log: standard input can be read once", hint="give - once, the other logs by name")
    return expanded


@contextlib.contextmanager
def open_log(file: str) -> Iterator[tuple[IO[bytes], int]]:
    """The stream and the size of what it is read from (0 if unknown)."""
    if file == "-":
        yield sys.stdin.buffer, 0
        return
    try:
        with Path(file).open("rb") as stream:
            size = Path(file).stat().st_size
            is_gzip = stream.read(2) == _GZIP if stream.seekable() else False
            if stream.seekable():
                stream.seek(0)
            if is_gzip:
                with gzip.open(stream) as unpacked:
                    yield unpacked, 0  # type: ignore[misc]
            else:
                yield stream, size
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"--nccl-log: cannot read {file}: {reason}", hint="a file that exists, or - for standard input"
        ) from error


def _blocks(file: str, stream: IO[bytes], size: int, progress: Progress | None) -> Iterator[bytes]:
    done = 0
    try:
        while block := stream.read(_BLOCK_BYTES):
            yield block
            done += len(block)
            if progress is not None and size > _LARGE_BYTES:
                progress(f"reading {file}", done, size)
    except (EOFError, zlib.error) as error:
        hint = "unpack it with gzip -dc FILE | aphro doctor --nccl-log -: what is whole will be read"
        raise UsageError(f"--nccl-log: {file} is a damaged gzip file: {error}", hint=hint) from error
