"""Processes from a warm fork server: ask for one, hold it by pidfd, learn how it ended. No pickle, no names."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Final, Literal, Protocol

import anyio
import msgspec

from aphro_core.bytecode.bytecode import bytecode_environment
from aphro_core.errors import EngineDeadError

Door = Literal["engine", "worker", "template"]

STATUS: Final = struct.Struct("<i")  # an exit code, or minus the signal, written once to a child's status pipe
MAX_REQUEST_BYTES: Final = 4096
MAX_FDS: Final = 3  # handed over with one request
_FIRST_ANSWER_SECONDS: Final = 120.0  # waits for the fork server's imports
_ANSWER_SECONDS: Final = 8.0  # every other; longer than it waits for processes to end


class ForkChild(msgspec.Struct, frozen=True, tag="fork"):
    """Fork a child that runs ``door``. With it: its channel, and an engine's link to fork workers and its door."""

    door: Door
    name: str  # as /proc shows it; 15 bytes


class OpenLink(msgspec.Struct, frozen=True, tag="link"):
    """Open another link to the fork server. Whatever a link forked is killed when the link's last owner is gone."""


class Forked(msgspec.Struct, frozen=True, tag="forked"):
    """The answer to both: the new child's pid with its pidfd and status pipe, or pid 0 with the new link."""

    pid: int
    error: str = ""


Request = ForkChild | OpenLink
encode: Final = msgspec.msgpack.Encoder().encode
decode_request: Final = msgspec.msgpack.Decoder(Request).decode
_decode_answer: Final = msgspec.msgpack.Decoder(Forked).decode


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class Child:
    """A process of ours. ``exit_code`` is minus the signal for one that was killed, None while it runs."""

    is_lost = was_short = False  # said of processes of other hosts

    def __init__(self, pid: int, pidfd: int, status_fd: int) -> None:
        self.pid = pid
        self.exit_code: int | None = None
        self._pidfd = pidfd
        self._status_fd = status_fd

    async def wait(self) -> None:
        """Return once it has ended (or the fork server has, and with it every child)."""
        await anyio.wait_readable(self._status_fd)
        self.poll()

    def poll(self) -> bool:
        """Whether it has ended."""
        if self._status_fd >= 0 and self.exit_code is None:
            os.set_blocking(self._status_fd, False)
            with suppress(BlockingIOError):
                data = os.read(self._status_fd, STATUS.size)
                self.exit_code = STATUS.unpack(data)[0] if len(data) == STATUS.size else -signal.SIGKILL
        return self.exit_code is not None

    def send_signal(self, number: signal.Signals) -> None:
        """To this very process: a pidfd never means another one."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    @property
    def fds(self) -> list[int]:
        """What knows it: its pidfd and status pipe."""
        return [self._pidfd, self._status_fd]

    def close(self) -> None:
        for fd in (self._pidfd, self._status_fd):
            if fd >= 0:
                os.close(fd)
        self._pidfd = self._status_fd = -1

    def describe_end(self) -> str:
        """How it ended, as an operator says it."""
        code = self.exit_code
        if code is None:
            return "closed its channel but has not ended"
        if code < 0:
            return f"was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"exited with code {code}"


class NoDescriptorsError(EngineDeadError):
    """This process has too few; the fork server is well."""


class Spawner:
    """One link to the fork server. One request at a time; every call waits for its answer."""

    def __init__(self, link: socket.socket, *, has_answered: bool = True) -> None:
        """``has_answered``: the fork server has done its imports."""
        self._link = link
        self._lock = threading.Lock()  # links are asked from the threads that wait for their answers
        link.settimeout(_ANSWER_SECONDS if has_answered else _FIRST_ANSWER_SECONDS)

    def fork(self, door: Door, name: str, *handed: HasFileno) -> Child:
        """A new process that serves ``door`` with its ends of what is ``handed``. Raises EngineDeadError."""
        answer, fds = self._ask(ForkChild(door, name), [each.fileno() for each in handed], num_fds=2)
        return Child(answer.pid, *fds)

    def open_link(self) -> Spawner:
        """Another link, to hand on: what is forked over it ends with it."""
        _, (fd,) = self._ask(OpenLink(), [], num_fds=1)
        return Spawner(socket.socket(fileno=fd))

    def fileno(self) -> int:
        return self._link.fileno()

    def close(self) -> None:
        self._link.close()

    def end(self) -> None:
        """Close it for whoever holds it, too."""
        with suppress(OSError):  # the fork server is gone
            self._link.shutdown(socket.SHUT_RDWR)
        self._link.close()

    def _ask(self, request: Request, fds: Sequence[int], num_fds: int) -> tuple[Forked, list[int]]:
        try:
            with self._lock:
                socket.send_fds(self._link, [encode(request)], list(fds))
                data, received, _, _ = socket.recv_fds(self._link, MAX_REQUEST_BYTES, num_fds)
        except TimeoutError:
            seconds = self._link.gettimeout() or 0.0
            self.end()  # an answer that comes later would be taken for that of the next request
            raise EngineDeadError(f"the fork server has not answered within {seconds:g} s") from None
        except OSError as error:
            raise EngineDeadError(f"the fork server is gone: {error}") from error
        self._link.settimeout(_ANSWER_SECONDS)
        if not data:
            raise EngineDeadError("the fork server is gone", hint="its last words are above, on stderr")
        answer = _decode_answer(data)
        if answer.error:
            raise EngineDeadError(f"no process can be started: {answer.error}", hint="raise the limits of this user")
        if len(received) < num_fds:  # the kernel drops what finds no place
            for fd in received:
                os.close(fd)
            raise NoDescriptorsError("no file descriptor is left for a process", hint="raise `ulimit -n`")
        return answer, received


class ForkServer:
    """The fork server's process, as the one who started it sees it; started again where it has died."""

    def __init__(self, environment: Mapping[str, str], root: Spawner | None = None) -> None:
        """``root``: a link to one that another process has started."""
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._root = root
        self._spare: Spawner | None = None
        self._lock = threading.RLock()

    def open_link(self) -> Spawner:
        """A link to a fork server that answers. Blocks until its imports are done. Raises EngineDeadError."""
        with self._lock:
            return self._open_link()

    def _open_link(self) -> Spawner:
        if self._root is not None:
            try:
                return self._root.open_link()
            except NoDescriptorsError:
                raise
            except EngineDeadError:  # it is gone or stopped; was it another's, then from now on we have our own
                self.close()
        self.start()
        assert self._root is not None
        return self._root.open_link()

    def take_link(self) -> Spawner:
        """As ``open_link``; the first one is there at once, before the imports are done."""
        self.start()
        if self._spare is None or (self._process is not None and self._process.poll() is not None):
            return self.open_link()
        spare, self._spare = self._spare, None
        return spare

    def inherited(self, link: Spawner) -> ForkServer:
        """In a forked child: this server through ``link``; what is our parent's is forgotten, and never ended here."""
        for other in (self._root, self._spare):
            if other is not None:
                other.close()
        self._process = self._root = self._spare = None
        return ForkServer(self._environment, link)

    def start(self) -> None:
        """Begin to start it, unless it runs; returns at once."""
        if self._root is not None:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        spare, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, its_end:
            handed = [theirs.fileno(), its_end.fileno()]
            # a session of its own: Ctrl-C in the terminal is for the process that drains, and for nobody else
            self._process = subprocess.Popen(
                [sys.executable, "-m", "aphro_core.forkserver", str(os.getpid()), *map(str, handed)],
                stdin=subprocess.DEVNULL,
                stdout=2,  # talk goes to stderr: stdout belongs to data
                env={**self._environment, **bytecode_environment(self._environment)},
                start_new_session=True,
                pass_fds=handed,
            )
        self._root, self._spare = Spawner(ours, has_answered=False), Spawner(spare, has_answered=False)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def close(self) -> None:
        """End it, and with it whatever it forked."""
        for link in (self._root, self._spare):
            if link is not None:
                link.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._root = self._spare = None


@contextmanager
def open_fork_server(environment: Mapping[str, str]) -> Iterator[ForkServer]:
    """Start a fork server. Nothing of it, nor of what it forked, is left when the block is left."""
    server = ForkServer(environment)
    server.start()
    try:
        yield server
    finally:
        server.close()
