"""Child processes with limits: run one to its end, or speak with one by lines; killed as a group, soon reaped."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

import anyio
import anyio.abc
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.stapled import StapledByteStream

from aphro_core.remote.remote import NOT_FOUND, HostUnreachableError, Output

_MAX_OUTPUT_BYTES: Final = 32 << 20
_MAX_LINE_BYTES: Final = 16 << 20
_TAIL_BYTES: Final = 4000
_REAP_SECONDS: Final = 2.0  # a process inside the kernel may never end: it is left, not waited for


def environment(added: Mapping[str, str] | None) -> dict[str, str]:
    """Ours, with the folders of administrators' commands in PATH and ``added`` on top."""
    path = os.environ.get("PATH", os.defpath)
    return {**os.environ, "PATH": f"{path}:/usr/sbin:/sbin", **(added or {})}


async def run(argv: Sequence[str], *, timeout_seconds: float, stdin: str, env: Mapping[str, str] | None) -> Output:
    """Run ``argv`` to its end. Raises TimeoutError after ``timeout_seconds``, when it has been killed."""
    parts: dict[str, bytes] = {}

    async def collect(name: str, stream: anyio.abc.ByteReceiveStream | None) -> None:
        assert stream is not None
        kept = bytearray()
        async for chunk in stream:
            kept += chunk[: _MAX_OUTPUT_BYTES - len(kept)]
        parts[name] = bytes(kept)

    try:
        with anyio.fail_after(timeout_seconds):
            async with _open(argv, env) as process:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(collect, "stdout", process.stdout)
                    tasks.start_soon(collect, "stderr", process.stderr)
                    await _feed(process, stdin)
                code = await process.wait()
    except (FileNotFoundError, PermissionError) as error:
        return Output(NOT_FOUND, "", f"{argv[0]}: {error.strerror}")
    except TimeoutError:
        raise TimeoutError(f"`{argv[0]}` did not end within {timeout_seconds:g} s") from None
    return Output(code, parts["stdout"].decode(errors="replace"), parts["stderr"].decode(errors="replace"))


class LineProcess:
    """A child that is spoken to by lines (remote.Process)."""

    def __init__(self, process: anyio.abc.Process, stderr_fd: int) -> None:
        self._process = process
        self._stderr_fd = stderr_fd
        assert process.stdout is not None
        self._lines = BufferedByteReceiveStream(process.stdout)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stream(self) -> anyio.abc.ByteStream:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return StapledByteStream(self._process.stdin, self._process.stdout)

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    @property
    def stderr_tail(self) -> str:
        size = os.fstat(self._stderr_fd).st_size
        tail = os.pread(self._stderr_fd, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        return tail.decode(errors="replace").strip()

    async def send_line(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            await self._process.stdin.send(line.encode() + b"\n")
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, ConnectionError):
            raise HostUnreachableError(f"the process ended: {self.stderr_tail or 'it said nothing'}") from None

    async def receive_line(self) -> str | None:
        try:
            line = await self._lines.receive_until(b"\n", _MAX_LINE_BYTES)
        except (anyio.IncompleteRead, anyio.EndOfStream, anyio.ClosedResourceError, anyio.DelimiterNotFound):
            return None
        return line.decode(errors="replace")

    async def wait(self) -> int:
        return await self._process.wait()


@asynccontextmanager
async def start(argv: Sequence[str], env: Mapping[str, str] | None) -> AsyncIterator[LineProcess]:
    """``argv`` beside us. Its standard input closes when we die, however we die: that is its sign to end."""
    with tempfile.TemporaryFile() as stderr:  # not a pipe: nobody has to empty it
        async with _open(argv, env, stderr.fileno()) as child:
            yield LineProcess(child, stderr.fileno())


@asynccontextmanager
async def _open(
    argv: Sequence[str], env: Mapping[str, str] | None, stderr: int = subprocess.PIPE
) -> AsyncIterator[anyio.abc.Process]:
    process = await anyio.open_process(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=environment(env),
        start_new_session=True,  # so that its own children end with it
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with anyio.CancelScope(shield=True), anyio.move_on_after(_REAP_SECONDS) as late:
            await process.wait()
        if not late.cancelled_caught:
            await process.aclose()


async def _feed(process: anyio.abc.Process, text: str) -> None:
    assert process.stdin is not None
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, ConnectionError):
        if text:
            await process.stdin.send(text.encode())
        await process.stdin.aclose()
