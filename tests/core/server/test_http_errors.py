"""Every refusal over the wire: its status, its shape, what it names and what it must not."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from aphro_core.errors import AphroError, EngineDeadError, OverloadedError, RequestError
from aphro_core.server.exchange import BodyReader
from tests.core.server.fake_frontend import FakeFrontend, FakeHealth
from tests.core.server.loopback import Loopback, loopback, wait_for

COMPLETION = {"prompt": "x", "max_tokens": 1}
JSON = "application/json"


@pytest.fixture(scope="module")
def server() -> Iterator[Loopback]:
    with loopback(reader=BodyReader(max_bytes=200_000, max_unparsed_bytes=300_000, seconds=0.5)) as running:
        yield running


def raw_post(body: bytes, *headers: str) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status", "code"),
    [
        ("POST", "/v1/completions", b"{", {"Content-Type": JSON}, 400, None),
        ("POST", "/v1/completions", b"{}", {"Content-Type": JSON}, 400, None),
        ("POST", "/v1/completions", b"a=b", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        ("POST", "/v1/completions", b"{}", {}, 415, "unsupported_media_type"),
        ("POST", "/v1/completions", b"x", {"Content-Type": JSON, "Content-Encoding": "gzip"}, 415,
         "unsupported_content_encoding"),
        ("POST", "/v1/completions", b"[" * 200_001, {"Content-Type": JSON}, 413, "body_too_large"),
        ("GET", "/v1/completions", b"", {}, 405, "bad_method"),
        ("DELETE", "/v1/models", b"", {}, 405, "bad_method"),
        ("POST", "/livez", b"", {}, 405, "bad_method"),
        ("GET", "/", b"", {}, 404, "not_found"),
        ("GET", "/v1/engines", b"", {}, 404, "not_found"),
        ("GET", "/v1/models/", b"", {}, 404, "model_not_found"),
        ("GET", "/livez/", b"", {}, 404, "not_found"),
        ("GET", "/livez", b"", {"X-Long": "x" * 40_000}, 431, "headers_too_large"),
        ("GET", "/livez", b"", {f"X-{index}": "" for index in range(120)}, 431, "headers_too_large"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, (str, int)) else None,
)  # fmt: skip
def test_the_table(
    server: Loopback, method: str, path: str, content: bytes, headers: dict[str, str], status: int, code: str | None
) -> None:
    answer = server.request(method, path, content=content, headers=headers)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["message"]
    assert answer.headers["content-type"] == JSON
    assert "server" not in answer.headers
    if status == 405:
        assert answer.headers["allow"]


def test_a_wrong_field_is_named(server: Loopback) -> None:
    answer = server.post("/v1/completions", {**COMPLETION, "temperature": "hot"})
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "temperature: expected float or null, got str",
        "type": "invalid_request_error",
        "param": "temperature",
        "code": None,
    }


def test_content_type_may_have_parameters(server: Loopback) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert server.request("POST", "/v1/completions", content=b'{"prompt":"x"}', headers=headers).status_code == 200


@pytest.mark.parametrize("framing", ["announced", "chunked"])
def test_a_large_body_is_refused_while_it_is_read(server: Loopback, framing: str) -> None:
    """The answer arrives although the client goes on sending for a while."""
    with server.connect() as sock:
        if framing == "announced":
            sock.sendall(raw_post(b"", f"Content-Type: {JSON}", "Content-Length: 1000000"))
            pieces = [b"x" * 100_000] * 10
        else:
            sock.sendall(raw_post(b"", f"Content-Type: {JSON}", "Transfer-Encoding: chunked"))
            pieces = [b"186A0\r\n" + b"x" * 100_000 + b"\r\n"] * 10 + [b"0\r\n\r\n"]
        for piece in pieces:
            sock.sendall(piece)
            time.sleep(0.01)
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"allowed: up to 200000 bytes" in answer
    assert b"connection: close" in answer.lower()


def test_many_large_bodies_at_once_are_bounded_together(server: Loopback) -> None:
    with server.connect() as first, server.connect() as second:
        for sock in (first, second):
            sock.sendall(raw_post(b"x" * 160_000, f"Content-Type: {JSON}", "Content-Length: 170000"))
        answers = {read_all(sock).split()[1] for sock in (first, second)}
    assert answers == {b"408", b"429"}
    assert server.post("/v1/completions", {"prompt": "x" * 3000, "max_tokens": 1}).status_code == 200


def test_a_slow_body_has_a_deadline(server: Loopback) -> None:
    start = time.monotonic()
    answer = server.raw(raw_post(b"{", f"Content-Type: {JSON}", "Content-Length: 100"))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - start < 4


def test_a_client_that_leaves_within_its_body_harms_nobody(server: Loopback, caplog: pytest.LogCaptureFixture) -> None:
    with server.connect() as sock:
        sock.sendall(raw_post(b"{", f"Content-Type: {JSON}", "Content-Length: 100"))
    time.sleep(0.1)
    assert server.get("/livez").status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_body_left_unread_blocks_no_connection(server: Loopback) -> None:
    """More pieces than the server's queue of a connection holds, to a route that reads none of them."""
    with server.connect() as sock:
        sock.sendall(b"POST /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n")
        for _ in range(20):
            sock.sendall(b"x" * 100_000)
        sock.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert b"HTTP/1.1 200 " in answer, "the connection went on"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"NONSENSE\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost : x\r\n\r\n",
    ],
    ids=["two-lengths", "negative-length", "no-host", "no-request", "space-in-name"],
)
def test_ambiguous_requests_are_refused_and_closed(server: Loopback, request_bytes: bytes) -> None:
    assert server.raw(request_bytes).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("refuses", "status", "code", "retry_after"),
    [
        (RequestError("prompt has 9 tokens, allowed: up to 8", field="prompt"), 400, None, None),
        (OverloadedError("the queue is full", retry_after=3), 429, "queue_full", "3"),
        (OverloadedError("going down", retry_after=7, draining=True), 503, "unavailable", "7"),
        (EngineDeadError("rank 1 on secret-host died"), 503, "engine_dead", "5"),
        (AphroError("rank 1 on secret-host died"), 503, "engine_dead", "5"),
    ],
    ids=["request", "full", "draining", "dead", "dead-by-another-name"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_frontend_refuses(
    refuses: Exception, status: int, code: str | None, retry_after: str | None, stream: bool
) -> None:
    with loopback(FakeFrontend(refuses=refuses)) as server:
        answer = server.post("/v1/completions", {**COMPLETION, "stream": stream})
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer.headers.get("retry-after") == retry_after
    assert "secret-host" not in answer.text


def test_an_overload_is_said_before_the_body_is_looked_at() -> None:
    with loopback(FakeFrontend(refuses=OverloadedError("the queue is full"))) as server:
        assert server.post("/v1/completions", {"malformed": "and never parsed"}).status_code == 429


def test_the_frontends_words_become_the_clients() -> None:
    refuses = RequestError("max_tokens is 9, allowed: up to 8", field="max_tokens")
    with loopback(FakeFrontend(refuses=refuses)) as server:
        body = {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 9}
        error = server.post("/v1/chat/completions", body).json()["error"]
    assert (error["param"], error["message"]) == (
        "max_completion_tokens",
        "max_completion_tokens is 9, allowed: up to 8",
    )


def test_an_engine_that_dies_midway() -> None:
    frontend = FakeFrontend(hold=2, dies=EngineDeadError("rank 1 on secret-host died"))
    with loopback(frontend) as server:
        whole = server.post("/v1/completions", COMPLETION | {"max_tokens": 9})
        streamed = server.post("/v1/completions", COMPLETION | {"max_tokens": 9, "stream": True})
    assert whole.status_code == 503
    assert streamed.status_code == 200
    *_, last = streamed.text.strip().split("\n\n")
    assert '"code":"engine_dead"' in last
    assert "[DONE]" not in streamed.text
    assert "secret-host" not in whole.text + streamed.text
    assert frontend.num_open == 0


def test_an_unforeseen_error_is_an_id_and_the_log_has_it(caplog: pytest.LogCaptureFixture) -> None:
    with loopback(FakeFrontend(refuses=KeyError("/root/secret"))) as server:
        answer = server.post("/v1/completions", COMPLETION)
        assert server.get("/livez").status_code == 200
    assert answer.status_code == 500
    message = answer.json()["error"]["message"]
    assert "secret" not in answer.text
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert message.rsplit(" ", 1)[1] in record.getMessage()
    assert record.exc_info is not None


def test_more_open_requests_than_the_queue_holds_are_refused_at_once() -> None:
    frontend = FakeFrontend(hold=1)
    with loopback(frontend, max_queued_requests=2) as server:
        body = {"prompt": "x", "stream": True}
        with server.stream("/v1/completions", body) as one, server.stream("/v1/completions", body) as two:
            lines = [one.iter_lines(), two.iter_lines()]
            assert all(next(own).startswith("data:") for own in lines)
            start = time.monotonic()
            refused = server.post("/v1/completions", {"malformed": "and never parsed"})
            assert refused.status_code == 429
            assert refused.headers["retry-after"]
            assert time.monotonic() - start < 0.25
            assert len(frontend.requests) == 2
        wait_for(lambda: frontend.num_open == 0)
        frontend.hold = None
        assert server.post("/v1/completions", COMPLETION).status_code == 200


@pytest.mark.parametrize("path", ["/readyz", "/health", "/ping"])
def test_readiness_is_the_frontends_and_tells_only_the_phase(path: str) -> None:
    frontend = FakeFrontend()
    with loopback(frontend) as server:
        assert server.get(path).status_code == 200
        frontend.state = FakeHealth("loading", False)
        answer = server.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        assert answer.headers["retry-after"]
        assert server.get("/livez").status_code == 200


def test_metrics_and_version(server: Loopback) -> None:
    metrics = server.get("/metrics")
    assert metrics.headers["content-type"] == "text/plain; version=0.0.4"
    assert metrics.text == "aphro:num_requests_running 0\n"
    assert server.get("/version").json()["version"]


def test_a_websocket_is_turned_away(server: Loopback) -> None:
    answer = server.raw(
        b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 403 ")


def read_all(sock: socket.socket) -> bytes:
    answer: Any = b""
    while piece := sock.recv(65536):
        answer += piece
    return bytes(answer)
