"""A model that this host lacks, read from the engine's: files with holes, filled where this rank reads and kept.

A file has its full size from the start and takes the space of what was fetched. Beside it, ``.NAME.pages`` has a byte a
page of 4 KiB: 1 where the page is there. Ranks of one host share both; a page is marked after its data is on the disk.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from aphro_core.checkpoint.checkpoint import Checkpoint
from aphro_core.checkpoint.digests import cache_folder
from aphro_core.checkpoint.file import ModelFile
from aphro_core.checkpoint.open import open_checkpoint
from aphro_core.errors import ModelError
from aphro_core.messages.model_source import ModelSource

Fetch = Callable[[str, list[int]], bytes]  # (file name, [start, length, ...]) -> their bytes; raises RuntimeError

_PAGE: Final = 4096
_ASK_PAGES: Final = 256  # of one request: 1 MiB
_KEEP_BYTES: Final = 256 << 20  # fetched, until they are marked as kept


class FetchedModel:
    """``open`` is open_checkpoint of a model that comes from elsewhere."""

    def __init__(self, source: ModelSource, fetch: Fetch) -> None:
        self._source = source
        self._sizes = {file.name: file.num_bytes for file in source.files}
        self._fetch = fetch
        self._lock = threading.Lock()
        self.bytes_fetched = 0
        self.folder = cache_folder() / "from-head" / f"{source.name}-{source.key}"

    @property
    def path(self) -> Path:
        return self.folder if self._source.is_folder else self.folder / self._source.files[0].name

    def fetch_heads(self) -> Path:
        """Where the model is, as far as configs and headers go. Raises ModelError where it cannot be kept."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for file in self._source.files:
                opened = self._open_file(self.folder / file.name)
                opened.need(0, file.head_bytes)
                opened.close()
        except OSError as error:
            raise _cannot_keep(self.folder, error) from error
        return self.path

    def open(self) -> Checkpoint:
        """Raises ModelError where it cannot be kept, or no longer be had."""
        return open_checkpoint(self.fetch_heads(), self._open_file)

    def _open_file(self, path: Path) -> FetchedFile:
        return FetchedFile(path, self._sizes[path.name], self._counted)

    def _counted(self, name: str, ranges: list[int]) -> bytes:
        try:
            data = self._fetch(name, ranges)
        except RuntimeError as error:
            raise ModelError(
                f"{socket.gethostname()} could not fetch {name} from the engine's host: {error}",
                hint="the files changed, or cannot be read there: start again",
            ) from error
        with self._lock:
            self.bytes_fetched += len(data)
        return data


class FetchedFile(ModelFile):
    """A file whose missing pages are fetched before they are read."""

    def __init__(self, path: Path, num_bytes: int, fetch: Fetch) -> None:
        self._fetch = fetch
        self._write_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        is_new = os.fstat(self._write_fd).st_size != num_bytes
        os.ftruncate(self._write_fd, num_bytes)
        super().__init__(path)
        self._kept = _open_pages(path.with_name(f".{path.name}.pages"), -(-num_bytes // _PAGE))
        if is_new and self._kept.any():  # somebody removed the file alone
            self._kept[:] = 0
        self._here = np.zeros(len(self._kept), dtype=np.bool_)  # fetched by this process
        self._unmarked: list[tuple[int, int]] = []
        self._page_lock = threading.Lock()

    def read_into(self, buffer: Any, offset: int) -> None:
        self.need(offset, memoryview(buffer).nbytes)
        super().read_into(buffer, offset)

    def read_rows(self, out: NDArray[np.uint8], offset: int, stride: int) -> None:
        num_rows, width = out.shape
        self.need(offset, width, num_rows, stride)
        super().read_rows(out, offset, stride)

    def need(self, offset: int, width: int, num_rows: int = 1, stride: int = 0) -> None:
        """Fetch the pages of ``width`` bytes at ``offset``, ``offset + stride``, ... that are not here."""
        if not width or not num_rows:
            return
        starts = offset + np.arange(num_rows, dtype=np.int64) * stride
        first, last = starts // _PAGE, np.minimum(starts + width, self.size) // -_PAGE * -1
        low, high = int(first[0]), int(last[-1])
        edges = np.zeros(high - low + 1, dtype=np.int64)
        np.add.at(edges, first - low, 1)
        np.add.at(edges, last - low, -1)
        wanted = np.cumsum(edges[:-1]) > 0
        missing = wanted & (self._kept[low:high] == 0) & ~self._here[low:high]
        for runs in _requests(np.flatnonzero(missing) + low):
            self._take(runs)

    def _take(self, runs: list[tuple[int, int]]) -> None:
        """Fetch runs of pages [start, stop) in one request and write them to their places."""
        ranges = [number for start, stop in runs for number in (start * _PAGE, self._length(start, stop))]
        data, at = memoryview(self._fetch(self.path.name, ranges)), 0
        if len(data) != sum(ranges[1::2]):
            raise ModelError(f"{self.path.name}: {len(data)} bytes came, expected {sum(ranges[1::2])}")
        for start, length in zip(ranges[::2], ranges[1::2], strict=True):
            try:
                written = 0
                while written < length:
                    written += os.pwrite(self._write_fd, data[at + written : at + length], start + written)
            except OSError as error:
                raise _cannot_keep(self.path.parent, error) from error
            at += length
        with self._page_lock:
            self._unmarked += runs
            for start, stop in runs:
                self._here[start:stop] = True
            is_much = sum(stop - start for start, stop in self._unmarked) * _PAGE >= _KEEP_BYTES
        if is_much:
            self._mark()

    def _length(self, start: int, stop: int) -> int:
        return min(stop * _PAGE, self.size) - start * _PAGE

    def _mark(self) -> None:
        """Data first, marks after it: what a host that crashed has marked is there."""
        with self._page_lock:
            runs, self._unmarked = self._unmarked, []
        if runs:
            os.fdatasync(self._write_fd)
            for start, stop in runs:
                self._kept[start:stop] = 1

    def close(self) -> None:
        if self._write_fd >= 0:
            self._mark()
            os.close(self._write_fd)
            self._write_fd = -1
        super().close()


def _open_pages(path: Path, num_pages: int) -> NDArray[np.uint8]:
    with path.open("ab") as made:
        made.truncate(num_pages)
    if not num_pages:
        return np.zeros(0, dtype=np.uint8)
    return np.memmap(path, dtype=np.uint8, mode="r+", shape=(num_pages,))


def _requests(pages: NDArray[np.int64]) -> Iterator[list[tuple[int, int]]]:
    """Pages in order as runs [start, stop), in requests of at most _ASK_PAGES pages."""
    for at in range(0, len(pages), _ASK_PAGES):
        part = pages[at : at + _ASK_PAGES]
        cuts = np.flatnonzero(np.diff(part) != 1) + 1
        yield [(int(run[0]), int(run[-1]) + 1) for run in np.split(part, cuts)]


def _cannot_keep(folder: Path, error: OSError) -> ModelError:
    return ModelError(
        f"{socket.gethostname()} cannot keep the model in {folder}: {error.strerror or error}",
        hint=f"free space there (older ones: rm -rf {folder.parent}), or set XDG_CACHE_HOME on that host",
    )
