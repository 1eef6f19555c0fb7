"""The fork server's process: everything is imported once, so that an engine or a worker starts in milliseconds."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from aphro_core import stderr
from aphro_core.bytecode.bytecode import compiling_beside
from aphro_core.lifeline import die_with_parent, name_process
from aphro_core.spawn import (
    MAX_FDS,
    MAX_REQUEST_BYTES,
    STATUS,
    Door,
    ForkChild,
    Forked,
    OpenLink,
    decode_request,
    encode,
)

_REAP_SECONDS: Final = 3.0  # for a killed process to be gone; one in the kernel's hands may take for ever


@dataclass(eq=False)
class Link:
    """A client. Its children end with it."""

    sock: socket.socket
    children: dict[int, ForkedChild] = field(default_factory=dict)  # by pidfd


@dataclass(frozen=True)
class ForkedChild:
    pid: int
    pidfd: int
    status_fd: int


class Server:
    """One thread, one loop: requests from links, ends of children."""

    def __init__(self, links: list[socket.socket]) -> None:
        self._poll = select.poll()
        self._links: dict[int, Link] = {}
        self._root_fd = links[0].fileno()
        for link in links:
            self._add_link(link)

    def run(self) -> None:
        """Until whoever started us is gone."""
        while self._root_fd in self._links:
            ready = [fd for fd, _ in self._poll.poll()]
            # asked anew: a link that was closed before a request was sent is dropped before that request is served
            for fd, event in self._poll.poll(0):
                if fd in self._links and event & (select.POLLHUP | select.POLLERR):
                    self._drop(self._links[fd])
                    ready = [other for other in ready if other != fd]
            for fd in ready:
                if fd in self._links:
                    self._serve(self._links[fd])
                else:
                    self._reap(fd)

    def _add_link(self, sock: socket.socket) -> None:
        self._links[sock.fileno()] = Link(sock)
        self._poll.register(sock.fileno(), select.POLLIN)

    def _serve(self, link: Link) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(link.sock, MAX_REQUEST_BYTES, MAX_FDS)
        except OSError:
            data, fds = b"", []
        if not data:
            self._drop(link)
            return
        match decode_request(data):
            case OpenLink():
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                self._add_link(ours)
                with theirs:
                    self._answer(link, Forked(0), [theirs.fileno()])
            case ForkChild(door=door, name=name):
                try:
                    self._fork(link, door, name, fds)
                except OSError as error:  # of processes, descriptors or memory there is too little
                    self._answer(link, Forked(0, str(error)), [])
        for fd in fds:
            os.close(fd)

    def _answer(self, link: Link, answer: Forked, fds: list[int]) -> None:
        with suppress(OSError):  # the client is gone, which its link says next
            socket.send_fds(link.sock, [encode(answer)], fds)

    def _fork(self, link: Link, door: Door, name: str, fds: list[int]) -> None:
        read_end, write_end = os.pipe()
        server_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            os.close(write_end)
            self._close_all()
            _be_child(server_pid, door, name, fds)
        child = ForkedChild(pid, os.pidfd_open(pid), write_end)
        link.children[child.pidfd] = child
        self._poll.register(child.pidfd, select.POLLIN)
        self._answer(link, Forked(pid), [child.pidfd, read_end])
        os.close(read_end)

    def _close_all(self) -> None:
        """In a child: it must hold nothing whose closing others wait for."""
        for link in self._links.values():
            link.sock.close()
            for child in link.children.values():
                os.close(child.pidfd)
                os.close(child.status_fd)

    def _reap(self, pidfd: int) -> None:
        """Tell whoever waits how a child ended."""
        for link in self._links.values():
            child = link.children.pop(pidfd, None)
            if child is not None:
                self._forget(child)

    def _forget(self, child: ForkedChild) -> None:
        _, status = os.waitpid(child.pid, os.WNOHANG)
        with suppress(OSError):  # nobody asks any more
            os.write(child.status_fd, STATUS.pack(os.waitstatus_to_exitcode(status)))
        self._poll.unregister(child.pidfd)
        os.close(child.pidfd)
        os.close(child.status_fd)

    def _drop(self, link: Link) -> None:
        """A client is gone: its children are killed, and gone before the next request is served."""
        self._poll.unregister(link.sock.fileno())
        del self._links[link.sock.fileno()]
        link.sock.close()
        for child in link.children.values():
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
        deadline = time.monotonic() + _REAP_SECONDS
        for child in link.children.values():
            ended = select.poll()
            ended.register(child.pidfd, select.POLLIN)
            if ended.poll(max(0.0, deadline - time.monotonic()) * 1000):
                self._forget(child)
            else:  # its pidfd stays open: the pid is not used again, and its device is not free
                print(f"process {child.pid} does not end; its memory and device are not free", file=sys.stderr)
                self._poll.unregister(child.pidfd)


def _be_child(server_pid: int, door: Door, name: str, fds: list[int]) -> None:
    """Run a door in a forked process, and end it. Never returns."""
    from aphro_core.engine import entry as engine_entry
    from aphro_core.templates import child as template_child
    from aphro_core.worker import entry as worker_entry

    exit_code = 1
    try:
        os.setpgid(0, 0)
        die_with_parent(server_pid)
        name_process(name)
        channel = socket.socket(fileno=fds[0])
        if door == "engine":
            link, adoption = (socket.socket(fileno=fd) for fd in fds[1:])
            exit_code = engine_entry.main(channel, link, adoption)
        elif door == "worker":
            exit_code = worker_entry.main(channel)
        else:
            exit_code = template_child.main(channel)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(exit_code)  # a step that still computes on a thread must not hold the process


def main() -> None:
    """``python -m aphro_core.forkserver PARENT_PID FD...``, each FD a link: a connected seqpacket socket."""
    parent_pid, *fds = map(int, sys.argv[1:])
    die_with_parent(parent_pid)
    name_process("aphro-forks")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the process that drains decides, for all
        signal.signal(number, signal.SIG_IGN)
    stderr.make_lossy()
    gc.disable()  # imports make little garbage, and looking for it is a fifth of their time
    with compiling_beside():
        _import_everything()
    gc.freeze()  # what is shared stays shared: collections in children touch none of it
    gc.enable()
    Server([socket.socket(fileno=fd) for fd in fds]).run()


def _import_everything() -> None:
    """What an engine or a worker would import at its start, torch above all."""
    import gguf.quants  # noqa: F401

    import aphro_core.engine.entry
    import aphro_core.executor.inprocess
    import aphro_core.executor.multiprocess
    import aphro_core.templates.child
    import aphro_core.worker.entry
    import aphro_core.worker.worker  # noqa: F401


if __name__ == "__main__":
    main()
