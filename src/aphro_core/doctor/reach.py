"""Connections between hosts that are really made: a listener on one, a caller on the other, both killable."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import msgspec

from aphro_core.doctor.probe import probe
from aphro_core.errors import AphroError
from aphro_core.remote.remote import Host, Process

_START_SECONDS = 10.0


class Listening(msgspec.Struct, frozen=True):
    """The ports that a listener got from the kernel's range, and that of its datagram socket."""

    tcp_ports: list[int]
    udp_port: int


class Called(msgspec.Struct, frozen=True):
    """``tcp``: port -> seconds, or the error's words. ``udp_error``: why the full-size packet could not leave."""

    tcp: dict[str, float | str]
    udp_error: str = ""


class Listener:
    """A host that listens at an address."""

    def __init__(self, address: str, ports: Listening, process: Process) -> None:
        self.address = address
        self.ports = ports
        self._process = process

    async def received_bytes(self, seconds: float) -> int:
        """The size of the next datagram, 0 if none comes in time."""
        with anyio.move_on_after(seconds):
            line = await self._process.receive_line()
            return int(line) if line and line.strip().isdigit() else 0
        return 0


@asynccontextmanager
async def listening(host: Host, address: str) -> AsyncIterator[Listener]:
    """Listen on a host at ``address`` until the block is left. Raises AphroError if it cannot."""
    async with host.start(host.python, "-m", "aphro_core.doctor.probes.listen", address) as process:
        line = None
        with anyio.move_on_after(_START_SECONDS):
            line = await process.receive_line()
        if not line:
            raise AphroError(f"{host.name} cannot listen at {address}: {process.stderr_tail or 'no word'}")
        yield Listener(address, msgspec.json.decode(line, type=Listening), process)


async def call(host: Host, listener: Listener, *, seconds: float = 3.0, packet_bytes: int = 0) -> Called:
    """Connect from a host to each port of a listener; ``packet_bytes``: send a datagram of that size, unfragmented."""
    arguments = [listener.address, str(seconds), str(listener.ports.udp_port), str(packet_bytes)]
    ports = map(str, listener.ports.tcp_ports)
    answer = await probe(host, "call", *arguments, *ports, timeout_seconds=seconds + _START_SECONDS)
    return msgspec.convert(answer, Called)
