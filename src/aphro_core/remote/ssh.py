"""Another host, over one connection of the system's ssh client, with the operator's configuration, agent and keys."""

from __future__ import annotations

import re
import shlex
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import anyio

from aphro_core.errors import UsageError
from aphro_core.remote import process
from aphro_core.remote.control_socket import ControlSocket
from aphro_core.remote.local import LocalHost
from aphro_core.remote.remote import MAX_FILE_BYTES, Host, HostUnreachableError, Output, Process

_TARGET: Final = re.compile(
    r"(?:(?P<user>[\w.][\w.-]*)@)?(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[\w.][\w.-]*)(?::(?P<port>\d+))?$"
)
SSH_FAILED: Final = 255
# No questions, no forwarding, no terminal; a peer that says nothing for 8 s is lost: before a step's deadline, after a
# cable that was out for a moment
_OPTIONS: Final = (
    "BatchMode=yes",
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
    "PermitLocalCommand=no",
    "RemoteCommand=none",
    "RequestTTY=no",
    "ServerAliveInterval=2",
    "ServerAliveCountMax=3",
    "ControlPersist=no",
)
_READY: Final = "aphro: connected"
_WITH_PATH: Final = 'PATH=$PATH:/usr/sbin:/sbin; exec "$@"'
# \036 path \037 text, for each match; patterns are expanded there, and are never split at spaces
_EACH_MATCH: Final = 'IFS=; for p; do for f in $p; do c=$({}) && printf "\\036%s\\037%s" "$f" "$c"; done; done; exit 0'
_FILES: Final = _EACH_MATCH.format(f'[ -f "$f" ] && head -c {MAX_FILE_BYTES} -- "$f" 2>/dev/null')
_LINKS: Final = _EACH_MATCH.format('[ -e "$f" ] && readlink -f -- "$f"')


class SshHost:
    """Commands of a host through the connection behind ``control``, the path of its socket."""

    def __init__(
        self, name: str, arguments: Sequence[str], control: Path, address: str, connection: process.LineProcess
    ) -> None:
        self.name = name
        self.address = address
        self.python = sys.executable
        self._connection = connection
        self._arguments = [*_ssh(control), "-o", "ControlMaster=no", *arguments]

    @property
    def is_connected(self) -> bool:
        return self._connection.returncode is None

    async def files(self, *patterns: str) -> dict[str, str]:
        return await self._each_match(_FILES, patterns)

    async def links(self, *patterns: str) -> dict[str, str]:
        return await self._each_match(_LINKS, patterns)

    async def run(
        self, *argv: str, timeout_seconds: float = 10.0, stdin: str = "", env: Mapping[str, str] | None = None
    ) -> Output:
        command = self._command(argv, env)
        try:
            output = await process.run(command, timeout_seconds=timeout_seconds, stdin=stdin, env=None)
        except TimeoutError:
            raise TimeoutError(f"{self.name}: `{argv[0]}` did not end within {timeout_seconds:g} s") from None
        if output.returncode == SSH_FAILED:
            raise HostUnreachableError(f"{self.name}: {last_line(output.stderr) or 'the connection was lost'}")
        return output

    def start(self, *argv: str, env: Mapping[str, str] | None = None) -> AbstractAsyncContextManager[Process]:
        return process.start(self._command(argv, env), None)

    def _command(self, argv: Sequence[str], env: Mapping[str, str] | None) -> list[str]:
        """``env`` stands in an argument list, so it must hold no secret: those are sent over standard input."""
        assignments = [f"{name}={value}" for name, value in (env or {}).items()]
        words = ["sh", "-c", _WITH_PATH, "sh", *(["env", *assignments] if assignments else []), *argv]
        return [*self._arguments, f"exec {shlex.join(words)}"]

    async def _each_match(self, script: str, patterns: tuple[str, ...]) -> dict[str, str]:
        output = await self.run("sh", "-c", script, "sh", *patterns, timeout_seconds=15)
        records = [record.partition("\037") for record in output.stdout.split("\036")[1:]]
        return {path: text for path, _, text in records}


@asynccontextmanager
async def open_host(target: str, *, timeout_seconds: float = 10.0) -> AsyncIterator[Host]:
    """Connect to ``[user@]host[:port]``, as ssh's own configuration has it; "" and names of this host need no ssh.

    Raises UsageError for anything else, HostUnreachableError with ssh's own words after at most ``timeout_seconds``.
    """
    arguments, is_plain = parse_target(target)
    address = await _address_of(arguments) if target else ""
    if not target or (is_plain and _is_ours(address)):
        yield LocalHost(target, address=address)
        return
    with ControlSocket() as control:
        seconds = f"ConnectTimeout={max(1, round(timeout_seconds))}"
        # `cat` holds the connection open until our end of its input closes, however we end
        master = [*_ssh(control.path), "-o", "ControlMaster=yes", "-o", seconds, *arguments, "exec cat"]
        async with process.start(master, None) as connection:
            await _wait_connected(connection, target, timeout_seconds)
            yield SshHost(target, arguments, control.take(), address, connection)


async def _wait_connected(connection: process.LineProcess, target: str, timeout_seconds: float) -> None:
    hint = (
        f"`ssh -o BatchMode=yes {target} true` must work without a question: ssh-copy-id {target}, or start sshd there"
    )
    with anyio.move_on_after(timeout_seconds + 1):
        with suppress(HostUnreachableError):  # it has ended already: what it said comes below
            await connection.send_line(_READY)
        while (line := await connection.receive_line()) is not None:  # a login script may speak first
            if line.strip() == _READY:
                return
        await connection.wait()
        words = last_line(connection.stderr_tail) or "ssh ended without a word"
        raise HostUnreachableError(f"no ssh connection to {target}: {words}", hint=hint)
    raise HostUnreachableError(f"no ssh connection to {target} within {timeout_seconds:g} s", hint=hint)


def _ssh(control: Path) -> list[str]:
    return ["ssh", *(word for option in _OPTIONS for word in ("-o", option)), "-S", str(control)]


def parse_target(target: str) -> tuple[list[str], bool]:
    """ssh's arguments for a target, and whether it is only a host. Raises UsageError for what it cannot be."""
    found = _TARGET.match(target)
    if target and found is None:
        raise UsageError(f"host {target!r} is not [user@]host[:port]", hint="separate hosts by commas: a,b")
    if found is None:
        return [], True
    user = ["-l", found["user"]] if found["user"] else []
    port = ["-p", found["port"]] if found["port"] else []
    return [*user, *port, "--", found["host"].strip("[]")], not (user or port)


async def _address_of(arguments: Sequence[str]) -> str:
    """The HostName that ssh's configuration gives to a target."""
    output = await process.run(["ssh", "-G", *arguments], timeout_seconds=5, stdin="", env=None)
    found = re.search(r"^hostname (.+)$", output.stdout, re.MULTILINE)
    if found is None:
        raise HostUnreachableError(f"ssh: {last_line(output.stderr)}", hint="install the OpenSSH client")
    return found[1].strip()


def _is_ours(address: str) -> bool:
    """Whether an address belongs to this host: the kernel binds no other."""
    try:
        family, kind, _, _, name = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(name)
    except OSError:
        return False
    return True


def last_line(text: str) -> str:
    """The last line with words in it: where a command says why it failed."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
