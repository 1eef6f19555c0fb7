"""A client that leaves stops its work, in every phase; a quiet stream stays open; a slow reader costs no chunk."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import anyio
import pytest

from aphro_core.config import ServerConfig
from aphro_core.request import OutputDelta, Request, SamplingParams
from aphro_core.server import sse
from aphro_core.server.app import App
from aphro_core.server.outputs import open_outputs
from tests.core.server.fake_frontend import FakeFrontend
from tests.core.server.loopback import Loopback, loopback, post_bytes, wait_for

TWO_REQUESTS = [Request(name, [1], SamplingParams()) for name in ("one", "two")]


def send_request(server: Loopback, **fields: Any) -> socket.socket:
    sock = server.connect()
    sock.sendall(post_bytes({"prompt": "x", **fields}))
    return sock


def read_until(sock: socket.socket, mark: bytes) -> None:
    received = b""
    while mark not in received:
        piece = sock.recv(65536)
        assert piece, received
        received += piece


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold", [0, 3], ids=["before-the-first-token", "midway"])
@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"prompt": ["a", "b"]}], ids=["one", "choices", "batch"])
def test_a_client_that_leaves_aborts_its_requests(stream: bool, hold: int, fields: dict[str, Any]) -> None:
    frontend = FakeFrontend(hold=hold)
    with loopback(frontend) as server:
        num_requests = len(fields.get("prompt", "x"))
        sock = send_request(server, stream=stream, **fields)
        wait_for(lambda: frontend.num_open == num_requests)
        if stream and hold:
            read_until(sock, b"data: ")
        sock.close()
        assert wait_for(lambda: frontend.num_open == 0) < 0.5
        assert sorted(frontend.aborted) == sorted(request.request_id for request in frontend.requests)


def test_a_reset_is_a_leave_too() -> None:
    frontend = FakeFrontend(hold=1)
    with loopback(frontend) as server:
        sock = send_request(server, stream=True)
        wait_for(lambda: frontend.num_open == 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        sock.close()
        assert wait_for(lambda: frontend.num_open == 0) < 0.5


def test_others_do_not_notice() -> None:
    frontend = FakeFrontend("x" * 200, step_seconds=0.002)
    with loopback(frontend) as server:
        leaving = [send_request(server, stream=stream, max_tokens=200) for stream in (True, False) * 5]
        wait_for(lambda: frontend.num_open == 10)
        with server.stream("/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 200}) as answer:
            for sock in leaving:
                sock.close()
            events = [line for line in answer.iter_lines() if line.startswith("data: {")]
        assert len(events) == 201
        assert len(frontend.aborted) == 10


def test_a_finished_request_is_not_aborted() -> None:
    frontend = FakeFrontend()
    with loopback(frontend) as server:
        for stream in (False, True):
            assert server.post("/v1/completions", {"prompt": "x", "stream": stream}).status_code == 200
        assert frontend.aborted == []
        assert frontend.num_open == 0


def test_the_first_token_is_not_held_back() -> None:
    frontend = FakeFrontend(hold=1)
    with loopback(frontend) as server:
        start = time.monotonic()
        with server.stream("/v1/completions", {"prompt": "x", "stream": True}) as answer:
            assert '"text":"H"' in next(answer.iter_lines())
            assert time.monotonic() - start < 1
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert answer.headers["x-accel-buffering"] == "no"
            assert answer.headers["x-request-id"].startswith("cmpl-")


def test_a_quiet_stream_says_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse.EventStream.keep_open, "__defaults__", (0.1,))
    with (
        loopback(FakeFrontend(first_step_seconds=0.4)) as server,
        server.stream("/v1/completions", {"prompt": "x", "stream": True}) as answer,
    ):
        lines = [line for line in answer.iter_lines() if line]
    waiting = lines.index(next(line for line in lines if line.startswith("data: ")))
    assert lines[:waiting] == [": waiting"] * waiting
    assert 3 <= waiting <= 9
    assert ": waiting" not in lines[waiting:]


def comments_beside(tokens_at: Sequence[float], seconds: float) -> list[tuple[float, bytes]]:
    """What a stream with tokens at these times wrote in ``seconds``, allowed 0.4 s of silence."""
    written: list[tuple[float, bytes]] = []

    async def scenario() -> None:
        start = anyio.current_time()

        async def send(message: Any) -> None:
            written.append((anyio.current_time() - start, message["body"]))

        stream = sse.EventStream(send)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.keep_open, 0.4)
            for at in tokens_at:
                await anyio.sleep_until(start + at)
                await stream.write(b"token")
            await anyio.sleep_until(start + seconds)
            tasks.cancel_scope.cancel()

    anyio.run(scenario)
    return written


def test_silence_never_lasts_two_seconds() -> None:
    """A token may come just after the last look, and then none for long."""
    written = comments_beside([0.21], 1.1)
    times = [0.0, *(at for at, _ in written)]
    assert max(later - sooner for sooner, later in pairwise(times)) < 0.55
    assert sse.QUIET_SECONDS == 2.0


def test_a_busy_stream_has_no_comments() -> None:
    written = comments_beside([number / 20 for number in range(16)], 0.8)
    assert [body for _, body in written] == [b"token"] * 16


def test_what_waits_is_written_as_one() -> None:
    """A writer that is slower than the engine sends several events at once and none twice."""
    bodies: list[bytes] = []
    frontend = FakeFrontend("abcdefghij" * 10)

    async def scenario() -> None:
        messages = [{"type": "http.request", "body": b'{"prompt":"x","stream":true,"max_tokens":100,"n":2}'}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await anyio.sleep_forever()

        async def send(message: Any) -> None:
            bodies.append(message.get("body", b""))
            await anyio.sleep(0.005)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "http_version": "1.1", "root_path": ""}
        headers = [(b"content-type", b"application/json")]
        await App(frontend, ServerConfig())({**scope, "headers": headers}, receive, send)

    anyio.run(scenario)
    events = b"".join(bodies).count(b"data: {")
    assert events == 202
    assert len(bodies) < 50
    assert b"".join(bodies).count(b'"text":"j"') == 20


def test_an_error_of_one_request_of_a_batch_aborts_the_others() -> None:
    frontend = FakeFrontend(hold=2, dies=RuntimeError("one"))

    async def scenario() -> None:
        async with open_outputs(frontend, TWO_REQUESTS) as outputs:
            while await outputs.take():
                pass

    with pytest.raises(ExceptionGroup):
        anyio.run(scenario)
    assert frontend.num_open == 0
    assert len(frontend.aborted) == 2


def test_deltas_are_taken_in_the_order_they_came() -> None:
    frontend = FakeFrontend("abc")

    async def scenario() -> list[OutputDelta]:
        taken: list[OutputDelta] = []
        async with open_outputs(frontend, TWO_REQUESTS[:1]) as outputs:
            while gains := await outputs.take():
                taken += [delta for _, delta in gains]
        return taken

    assert "".join(delta.text for delta in anyio.run(scenario)) == "abc"
