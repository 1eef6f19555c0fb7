"""The contract of a host: read its files, follow its links, run its commands, whether it is this one or another."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from anyio.abc import ByteStream

from aphro_core.errors import AphroError, ExitCode

MAX_FILE_BYTES = 1 << 20  # what is read of one file; sysfs and /proc have small ones
NOT_FOUND = 127  # the return code of a command that does not exist, as shells have it


class HostUnreachableError(AphroError):
    """No connection to a host, or it was lost."""

    exit_code = ExitCode.PLACEMENT


@dataclass(frozen=True, slots=True)
class Output:
    """What a command left: ``returncode`` is NOT_FOUND where it does not exist, negative after a signal."""

    returncode: int
    stdout: str
    stderr: str


class Process(Protocol):
    """A running command that is spoken to by lines. When its input closes it must end; leaving its block kills it."""

    async def send_line(self, line: str) -> None:
        """Raises HostUnreachableError when it has ended."""

    async def receive_line(self) -> str | None:
        """The next line of its output, None once it has ended. May be cancelled: nothing is lost."""
        ...

    @property
    def pid(self) -> int:
        """Of what runs here: the command itself, or the ssh that carries it."""
        ...

    @property
    def stream(self) -> ByteStream:
        """Its output and input as they are, for a caller that does not speak by lines."""
        ...

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        ...

    @property
    def stderr_tail(self) -> str:
        """The last lines that it wrote to its standard error so far."""
        ...

    async def wait(self) -> int:
        """Its return code, once it has ended."""
        ...


class Host(Protocol):
    """``name`` is what the operator typed, "" for this host; ``address`` what its peers may reach it by, "" if unknown.

    ``python`` is the interpreter that has aphro on that host: the same path everywhere.
    """

    name: str
    address: str
    python: str

    @property
    def is_connected(self) -> bool:
        """False once it cannot be reached any more."""
        ...

    async def files(self, *patterns: str) -> dict[str, str]:
        """Path -> text of each regular file that matches a shell pattern and can be read, in the order of the paths."""
        ...

    async def links(self, *patterns: str) -> dict[str, str]:
        """Path -> where it really is, for everything that matches a shell pattern, links followed."""
        ...

    async def run(
        self, *argv: str, timeout_seconds: float = 10.0, stdin: str = "", env: Mapping[str, str] | None = None
    ) -> Output:
        """Run a command to its end, with ``env`` added. Raises TimeoutError (it is killed) or HostUnreachableError."""
        ...

    def start(self, *argv: str, env: Mapping[str, str] | None = None) -> AbstractAsyncContextManager[Process]:
        """Run a command beside us, with ``env`` added; nothing of it is left when the block is left."""
        ...


async def read(host: Host, path: str) -> str | None:
    """One file, stripped; None where it is missing or may not be read."""
    text = (await host.files(path)).get(path)
    return None if text is None else text.strip()
