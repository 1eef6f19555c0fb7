"""A real server on a loopback port, in a thread: the tests' other end of the wire."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from urllib.parse import urlsplit

import anyio.from_thread
import httpx
import msgspec
import openai

from aphro_core.config import ServerConfig
from aphro_core.server.app import App
from aphro_core.server.bind import bind, url_of
from aphro_core.server.exchange import BodyReader
from aphro_core.server.serve import Server
from tests.core.server.fake_frontend import FakeFrontend


class Loopback:
    def __init__(
        self, frontend: FakeFrontend, url: str, server: Server, call: Callable[..., Any], running: Future[None]
    ) -> None:
        self.frontend = frontend
        self.url = url
        self.server = server
        self._call = call
        self._running = running
        self._client = httpx.Client(base_url=url, verify=False, trust_env=False, timeout=10)

    def drain(self) -> None:
        self._call(self.server.drain)

    def stop_now(self) -> None:
        self._call(self.server.stop_now)

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=10)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self._client.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self._client.get(path, **options)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._client.request(method, path, **options)

    def stream(self, path: str, body: Any) -> AbstractContextManager[httpx.Response]:
        return self._client.stream("POST", path, json=body)

    def wait_ended(self, seconds: float) -> float:
        """Seconds until the server had ended by itself."""
        start = time.monotonic()
        self._running.result(timeout=seconds)
        return time.monotonic() - start

    def close(self) -> None:
        self._client.close()

    def connect(self) -> socket.socket:
        address = urlsplit(self.url)
        return socket.create_connection((address.hostname, address.port), timeout=10)

    def raw(self, request: bytes) -> bytes:
        """Bytes out, all the bytes that come back until the server closes."""
        with self.connect() as sock:
            sock.sendall(request)
            answer = b""
            while piece := sock.recv(65536):
                answer += piece
            return answer


@contextmanager
def loopback(
    frontend: FakeFrontend | None = None, *, reader: BodyReader | None = None, host: str = "127.0.0.1", **config: Any
) -> Iterator[Loopback]:
    """Serves ``frontend`` until the block is left, then stops at once and checks that the server ended by itself."""
    frontend = frontend or FakeFrontend()
    server_config = ServerConfig(**config)
    sockets = bind(host, 0)
    url = url_of(sockets)
    with anyio.from_thread.start_blocking_portal() as portal:

        async def build() -> Server:
            return Server(App(frontend, server_config, reader=reader), sockets, server_config)

        server = portal.call(build)
        running = portal.start_task_soon(server.run)
        running_server = Loopback(frontend, url, server, portal.call, running)
        try:
            yield running_server
        finally:
            running_server.close()
            portal.call(server.stop_now)
            running.result(timeout=5)


def post_bytes(body: Any, path: str = "/v1/completions") -> bytes:
    """A request as it is on the wire."""
    data = msgspec.json.encode(body)
    head = ["POST " + path + " HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join([*head, "", ""]).encode() + data


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    """Seconds until ``condition`` held; fails when it never does."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "waited in vain"
        time.sleep(0.005)
    return time.monotonic() - start
