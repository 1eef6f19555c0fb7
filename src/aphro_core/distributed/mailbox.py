"""Whether ranks can hand each other file descriptors as torch's peer memory does: by sockets in a temporary folder.

torch names a socket after the process, and waits without an end for a neighbour that does not find it: a container of
its own has another folder, or another process of that number in the same one.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import Final

_FOLDERS: Final = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")  # in the order in which torch asks
_MOST_BYTES: Final = 107  # of a socket's path, which torch does not look at
_WORD_BYTES: Final = 8


def socket_path(pid: int) -> str:
    """Where torch has the socket of a process."""
    folder = next((os.environ[name] for name in _FOLDERS if name in os.environ), "/tmp")
    return f"{folder}/symm_mem-{pid}"


class Mailbox:
    """A socket where torch's will be. Neither call waits for anybody."""

    def __init__(self) -> None:
        """Raises OSError where torch could have none. What a process of this number has left is taken away."""
        self._path = socket_path(os.getpid())
        if len(os.fsencode(self._path)) > _MOST_BYTES:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), self._path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        try:
            self._bind()
        except OSError as error:
            self._socket.close()
            raise OSError(error.errno, error.strerror, self._path) from error

    def _bind(self) -> None:
        try:
            self._socket.bind(self._path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not self._is_left():
                raise
            os.unlink(self._path)
            self._socket.bind(self._path)

    def _is_left(self) -> bool:
        """Whether nobody has the socket that is there."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asking:
            return asking.connect_ex(self._path) == errno.ECONNREFUSED

    def send(self, pid: int, word: int) -> None:
        """To the mailbox of another process. Raises OSError where it is not found."""
        path = socket_path(pid)
        try:
            self._socket.sendto(word.to_bytes(_WORD_BYTES, "little"), path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from error

    def words(self) -> list[int]:
        """All that have come."""
        found = []
        try:
            while data := self._socket.recv(_WORD_BYTES):
                found.append(int.from_bytes(data, "little"))
        except BlockingIOError:
            pass
        return found

    def close(self) -> None:
        self._socket.close()
        os.unlink(self._path)


def meet_neighbours(
    rank: int,
    size: int,
    word: int,
    all_of: Callable[[list[int]], list[list[int]]],
    is_refused: Callable[[str | None], bool],
) -> bool:
    """Let each of ``size`` ranks hear ``word`` of the one before it. Whether all have; then torch can meet, too.

    ``all_of`` gives the numbers of every rank; ``is_refused`` says whether any of them objects, and why. All ranks call
    both, in the same order, whatever happens to one of them.
    """
    mailbox, failure = None, None
    try:
        mailbox = Mailbox()
    except OSError as error:
        failure = _sentence(error)
    try:
        if is_refused(failure) or mailbox is None:
            return False
        everybody = all_of([os.getpid(), word])
        try:
            mailbox.send(everybody[(rank + 1) % size][0], word)
        except OSError as error:
            failure = _sentence(error)
        if is_refused(failure):  # nobody reads before all have sent
            return False
        has_come = mailbox.words() == [everybody[(rank - 1) % size][1]]
        lost = _sentence(f"what rank {(rank - 1) % size} sends to {socket_path(os.getpid())} does not arrive")
        return not is_refused(None if has_come else lost)
    finally:
        if mailbox is not None:
            mailbox.close()


def _sentence(error: OSError | str) -> str:
    return f"ranks cannot hand each other descriptors, as in containers of their own ({error})"
