"""Who listens: every port of this host's network, with address and process."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from aphro_core.listeners import Listener, holder_of, listeners


def test_a_listener_is_found_with_address_and_process() -> None:
    name = Path("/proc/self/comm").read_text().strip()
    with socket.create_server(("127.0.0.1", 0)) as v4, socket.create_server(("::1", 0), family=socket.AF_INET6) as v6:
        ports = {sock.getsockname()[1]: address for sock, address in ((v4, "127.0.0.1"), (v6, "::1"))}
        found = {listener.port: listener for listener in listeners()}
        for port, address in ports.items():
            assert found[port] == Listener(port, address, os.getpid(), name)
            assert holder_of(port) == f"pid {os.getpid()} ({name})"
    assert not ports.keys() & {listener.port for listener in listeners()}
