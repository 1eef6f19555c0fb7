"""An engine as the processes above it hold it: enough to end it, and to go on with it when its API process has died."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from aphro_core.spawn import Child, Spawner

NUM_FDS = 4  # of one engine


@dataclass(frozen=True)
class HeldEngine:
    """``link`` forked it, ``door`` takes the next API process's channel. It ends when nobody holds its door."""

    epoch: int
    child: Child
    link: Spawner
    door: socket.socket

    @classmethod
    def of_fds(cls, epoch: int, pid: int, fds: list[int]) -> HeldEngine:
        """The inverse of ``fds``; they are this one's from now on."""
        link, door, pidfd, status_fd = fds
        return cls(epoch, Child(pid, pidfd, status_fd), Spawner(socket.socket(fileno=link)), socket.socket(fileno=door))

    @property
    def fds(self) -> list[int]:
        return [self.link.fileno(), self.door.fileno(), *self.child.fds]

    def offer(self, sock: socket.socket) -> None:
        """Make ``sock`` its channel, in place of one whose other end is closed. Raises OSError when it is gone."""
        self.door.setblocking(False)  # one that hangs takes nothing
        socket.send_fds(self.door, [b"channel"], [sock.fileno()])

    def end(self) -> None:
        """Whoever else holds the link: what it forked is killed, and gone before another link forks anything."""
        self.link.end()
        self.door.close()
        self.child.close()
