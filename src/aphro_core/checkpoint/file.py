"""A model file read by position: exact reads, strided reads, a count of bytes, and errors that name the file."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from aphro_core.errors import ModelError

if TYPE_CHECKING:  # the command line opens checkpoints, too, and needs none of it
    import numpy as np
    from numpy.typing import NDArray


class ModelFile:
    """An open regular file of ``size`` bytes. Reads go through ``pread``: a failing disk raises, it does not kill."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()  # of the count: parameters are read by several threads
        self.bytes_read = 0
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise ModelError(f"{path} is not a regular file", hint="give the path of a model file")
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelError(
                f"{path} cannot be opened: {error.strerror}", hint="check that it exists and may be read"
            ) from error
        self.size = os.fstat(self._fd).st_size

    def read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.read_into(buffer, offset)
        return bytes(buffer)

    def read_into(self, buffer: Any, offset: int) -> None:
        """Fill a writable, contiguous buffer from the bytes at ``offset`` on. Raises ModelError if the file ends."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise ModelError(
                    f"{self.path} cannot be read at byte {offset + done}: {error.strerror}", hint="check the disk"
                ) from error
            if count == 0:
                raise ModelError(
                    f"{self.path} ends at byte {offset + done}, expected data up to byte {offset + len(view)}",
                    hint="the file changed or was cut short: fetch it again",
                )
            done += count
        with self._lock:
            self.bytes_read += done

    def read_rows(self, out: NDArray[np.uint8], offset: int, stride: int) -> None:
        """Fill ``out`` [rows, width] with ``width`` bytes at ``offset``, ``offset + stride``, ..."""
        num_rows, width = out.shape
        if width == stride:
            self.read_into(out, offset)
            return
        # Strided reads defeat the kernel's readahead; the ranks of this host want all of these bytes between them.
        os.posix_fadvise(self._fd, offset, (num_rows - 1) * stride + width, os.POSIX_FADV_WILLNEED)
        view = out.data.cast("B")
        for row in range(num_rows):
            self.read_into(view[row * width : (row + 1) * width], offset + row * stride)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> ModelFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
