"""Fork servers that outlive the engines of one test, so that the imports (seconds each) are paid once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from aphro_core.spawn import ForkServer

_MOST_KEPT = 2


class KeptForkServers:
    """One for each environment. What a test forked ends with its link, as ever; only the server stays."""

    def __init__(self) -> None:
        self._servers: dict[frozenset[tuple[str, str]], ForkServer] = {}
        # a fork server dies with the thread that started it
        self._thread = ThreadPoolExecutor(1, "fork-servers")

    @contextmanager
    def open(self, environment: Mapping[str, str]) -> Iterator[ForkServer]:
        """In place of ``aphro_core.spawn.open_fork_server``."""
        key = frozenset((name, value) for name, value in environment.items() if name != "PYTEST_CURRENT_TEST")
        server = self._servers.pop(key, None) or ForkServer(environment)
        self._servers[key] = server  # the latest last
        while len(self._servers) > _MOST_KEPT:
            self._servers.pop(next(iter(self._servers))).close()
        self._thread.submit(server.start).result()
        yield server

    def close(self) -> None:
        for server in self._servers.values():
            server.close()
        self._thread.shutdown()
