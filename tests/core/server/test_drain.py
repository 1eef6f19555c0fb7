"""The orderly end: open requests finish, new ones are refused, a deadline and a second signal cut the rest."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import httpx
import pytest

from aphro_core.config import ServerConfig
from aphro_core.errors import OverloadedError
from aphro_core.server.app import build_app
from aphro_core.server.bind import bind, url_of
from aphro_core.server.gate import Gate
from aphro_core.server.serve import Server
from tests.core.server.fake_frontend import FakeFrontend
from tests.core.server.loopback import Loopback, loopback, post_bytes, wait_for

BODY = {"prompt": "x", "max_tokens": 50}


class Asking(threading.Thread):
    """A client in a thread; ``answer`` once joined."""

    def __init__(self, server: Loopback, stream: bool) -> None:
        super().__init__()
        self._server, self._stream = server, stream
        self.answer: httpx.Response
        self.start()

    def run(self) -> None:
        self.answer = httpx.post(
            f"{self._server.url}/v1/completions", json={**BODY, "stream": self._stream}, timeout=10, trust_env=False
        )


def test_open_requests_finish_and_new_ones_are_refused() -> None:
    frontend = FakeFrontend("x" * 50, step_seconds=0.01)
    with loopback(frontend) as server:
        asking = [Asking(server, stream) for stream in (False, True)]
        wait_for(lambda: frontend.num_open == 2)
        server.drain()
        refused = server.post("/v1/completions", BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert refused.headers["retry-after"]
        assert refused.headers["connection"] == "close"
        ready = server.get("/readyz")
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "draining")
        assert server.get("/livez").status_code == 200
        for client in asking:
            client.join()
        assert asking[0].answer.json()["choices"][0]["text"] == "x" * 50
        assert asking[1].answer.text.count('"text":"x"') == 50
        assert asking[1].answer.text.endswith("data: [DONE]\n\n")
        assert frontend.aborted == []
        server.wait_ended(2)


def test_an_idle_server_ends_at_once_though_a_connection_is_kept_alive() -> None:
    with loopback(drain_seconds=30) as server:
        assert server.get("/livez").status_code == 200
        server.drain()
        assert server.wait_ended(2) < 1


@pytest.mark.parametrize("how", ["deadline", "second signal"])
def test_what_is_still_open_ends_with_an_error(how: str) -> None:
    frontend = FakeFrontend(hold=3)
    with loopback(frontend, drain_seconds=0.3 if how == "deadline" else 60) as server:
        asking = [Asking(server, stream) for stream in (False, True)]
        wait_for(lambda: frontend.num_open == 2)
        server.drain()
        if how == "second signal":
            server.stop_now()
        assert server.wait_ended(3) < 2
        for client in asking:
            client.join()
    assert asking[0].answer.status_code == 503
    assert asking[0].answer.headers["retry-after"]
    assert asking[1].answer.status_code == 200
    *_, last = asking[1].answer.text.strip().split("\n\n")
    assert '"code":"unavailable"' in last
    assert "[DONE]" not in asking[1].answer.text
    assert len(frontend.aborted) == 2


def test_a_client_that_never_reads_does_not_hold_the_end_up() -> None:
    frontend = FakeFrontend(hold=2)
    with loopback(frontend, drain_seconds=0.2) as server, server.connect() as sock:
        # 32 MB of echo: more than any kernel buffers, so the server is stuck in the middle of writing it
        body = {"prompt": "x" * 2_000_000, "echo": True, "n": 16, "stream": True}
        sock.sendall(post_bytes(body))
        wait_for(lambda: frontend.num_open == 1)
        time.sleep(0.3)
        server.drain()
        assert 0.2 < server.wait_ended(5) < 0.2 + 3.5
    assert frontend.num_open == 0


def test_the_port_is_free_when_the_server_has_ended() -> None:
    with loopback() as server:
        port = int(server.url.rsplit(":", 1)[1])
        server.get("/livez")
        server.stop_now()
        server.wait_ended(2)
        for sock in bind("127.0.0.1", port):
            sock.close()


def test_a_cancelled_run_lets_requests_that_end_by_themselves_say_why() -> None:
    """The engine died: its requests are about to fail with the cause, and must not be cut before."""
    frontend = FakeFrontend("x" * 20, step_seconds=0.01)
    config = ServerConfig()
    answers: list[httpx.Response] = []

    async def scenario() -> None:
        server = Server(build_app(frontend, config), bind("127.0.0.1", 0), config)
        url = url_of(server.sockets)

        async def ask() -> None:
            async with httpx.AsyncClient(trust_env=False) as client:
                answers.append(await client.post(f"{url}/v1/completions", json=BODY))

        async with anyio.create_task_group() as clients, anyio.create_task_group() as serving:
            serving.start_soon(server.run)
            clients.start_soon(ask)
            await anyio.to_thread.run_sync(wait_for, lambda: frontend.num_open == 1)
            serving.cancel_scope.cancel()

    start = time.monotonic()
    anyio.run(scenario)
    assert time.monotonic() - start < 5
    assert [answer.status_code for answer in answers] == [200]


def test_gate_counts_and_closes() -> None:
    async def scenario() -> None:
        gate = Gate(max_open=2)
        with gate.admit(), gate.admit():
            assert gate.num_open == 2
            with pytest.raises(OverloadedError, match="2 requests are open") as full, gate.admit():
                pass
            assert not full.value.draining
            gate.close()
            with pytest.raises(OverloadedError, match="shutting down") as closed, gate.admit():
                pass
            assert closed.value.draining
            with anyio.move_on_after(0.01) as waited:
                await gate.wait_empty()
            assert waited.cancelled_caught
        with anyio.fail_after(1):
            await gate.wait_empty()

    anyio.run(scenario)


def test_gate_that_closes_empty_is_empty() -> None:
    async def scenario() -> None:
        gate = Gate(max_open=1)
        with gate.admit():
            pass
        gate.close()
        with anyio.fail_after(1):
            await gate.wait_empty()

    anyio.run(scenario)


def test_ended_work_is_cancelled_and_can_still_answer() -> None:
    said: list[Any] = []

    async def scenario() -> None:
        gate = Gate(max_open=1)

        async def work() -> None:
            with gate.admit() as scope:
                with scope:
                    await anyio.sleep_forever()
                await anyio.lowlevel.checkpoint()
                said.append(scope.cancelled_caught)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            await anyio.sleep(0.01)
            gate.end_all()

    anyio.run(scenario)
    assert said == [True]


@pytest.mark.parametrize(
    ("message", "error", "level"),
    [
        ("Unhandled exception in client_connected_cb", TimeoutError(110, "secret"), logging.DEBUG),
        ("Unhandled exception in client_connected_cb", ExceptionGroup("", [ConnectionError("secret")]), logging.DEBUG),
        ("Exception in callback StreamReaderProtocol.connection_made", asyncio.CancelledError(), logging.DEBUG),
        ("Unhandled exception in client_connected_cb", ValueError("secret"), logging.WARNING),
        ("Task exception was never retrieved", TimeoutError("of ours"), logging.ERROR),
    ],
    ids=["timeout", "group", "cancelled", "bug-in-hypercorn", "not-of-a-connection"],
)
def test_a_dropped_connection_is_a_line_without_what_the_client_wrote(
    caplog: pytest.LogCaptureFixture, message: str, error: BaseException, level: int
) -> None:
    async def scenario() -> None:
        config = ServerConfig()
        server = Server(build_app(FakeFrontend(), config), bind("127.0.0.1", 0), config)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.run)
            await anyio.sleep(0.05)
            asyncio.get_running_loop().call_exception_handler({"message": message, "exception": error})
            server.stop_now()

    with caplog.at_level(logging.DEBUG):
        anyio.run(scenario)
    ours = [record for record in caplog.records if record.name in ("aphro_core.server.serve", "asyncio")]
    (record,) = [record for record in ours if "connection" in record.getMessage() or record.levelno == logging.ERROR]
    assert record.levelno == level
    if level != logging.ERROR:
        assert "secret" not in caplog.text
