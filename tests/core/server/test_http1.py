"""Heads with two readings, other protocols, slow heads, too many connections: each is answered or ended."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphro_core.server import http1
from aphro_core.server.http1 import StrictProtocol, ambiguity_of
from tests.core.server.loopback import Loopback, loopback

REQUEST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"

AMBIGUOUS = {
    "length and coding": REQUEST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    "two lengths": REQUEST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "one length twice": REQUEST + b"Content-Length: 5\r\ncontent-length: 5\r\n\r\n",
    "a list of lengths": REQUEST + b"Content-Length: 5, 5\r\n\r\n",
    "a signed length": REQUEST + b"Content-Length: +5\r\n\r\n",
    "a hexadecimal length": REQUEST + b"Content-Length: 0x5\r\n\r\n",
    "two codings": REQUEST + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    "an unknown coding": REQUEST + b"Transfer-Encoding: xchunked\r\n\r\n",
    "a folded header": REQUEST + b"X: a\r\n b\r\nContent-Length: 5\r\n\r\n",
    "a bare line feed": REQUEST + b"X: a\nContent-Length: 5\r\n\r\n",
    "line feeds alone": REQUEST.replace(b"\r", b"") + b"Content-Length: 5\n\n",
    "a bare carriage return": REQUEST + b"X: a\rContent-Length: 5\r\n\r\n",
    "another version": b"GET /health HTTP/3.0\r\nHost: a\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a lower case method": b"get /health HTTP/1.1\r\nHost: a\r\n\r\n",
    "a space in the target": b"GET /health /x HTTP/1.1\r\nHost: a\r\n\r\n",
}
TARGETS = [
    "http://evil/health",
    "*",
    "//health",
    "/health/../metrics",
    "/./health",
    "/health%2f..%2fmetrics",
    "\\health",
    "/health#x",
    "health",
    "/a%00b",
]


@pytest.fixture(scope="module")
def served() -> Iterator[Loopback]:
    with loopback() as server:
        yield server


def exchange(server: Loopback, data: bytes, seconds: float = 3.0) -> tuple[bytes, bool]:
    """(what came back, whether the server closed the connection)."""
    with server.connect() as sock:
        sock.settimeout(seconds)
        got = b""
        try:
            sock.sendall(data)
            while piece := sock.recv(65536):
                got += piece
        except TimeoutError:
            return got, False
        except ConnectionError:
            pass
        return got, True


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_two_readings_are_refused_and_nothing_behind_them_is_read(served: Loopback, name: str) -> None:
    hidden = b"hello" + b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    got, is_closed = exchange(served, AMBIGUOUS[name] + hidden)
    assert got.startswith(b"HTTP/1.1 400"), got
    assert is_closed
    assert b"alive" not in got


def test_a_second_head_is_read_as_strictly_as_the_first(served: Loopback) -> None:
    good = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    got, is_closed = exchange(served, good + good + AMBIGUOUS["one length twice"] + b"hello" + good)
    assert got.count(b"alive") == 2
    assert got.count(b"HTTP/1.1 400") == 1
    assert is_closed


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_that_could_be_read_as_another_is_refused(served: Loopback, target: str) -> None:
    got, is_closed = exchange(served, b"GET %s HTTP/1.1\r\nHost: a\r\n\r\n" % target.encode())
    assert got.startswith(b"HTTP/1.1 400"), got
    assert is_closed


def test_an_upgrade_to_http2_is_ignored(served: Loopback) -> None:
    head = b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\n\r\n"
    got, _ = exchange(served, head)
    assert got.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("begins", [b"", b"GET /livez HT"])
def test_a_head_that_does_not_come_ends_the_connection(
    served: Loopback, monkeypatch: pytest.MonkeyPatch, begins: bytes
) -> None:
    monkeypatch.setattr(http1, "HEAD_SECONDS", 0.3)
    began = time.monotonic()
    _, is_closed = exchange(served, begins)
    assert is_closed
    assert 0.25 < time.monotonic() - began < 2.0


def test_between_requests_a_connection_may_wait(served: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "HEAD_SECONDS", 0.3)
    got, is_closed = exchange(served, b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n", seconds=1.0)
    assert b"alive" in got
    assert not is_closed


def test_connections_are_capped_and_counted(served: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    connections = StrictProtocol.connections
    deadline = time.monotonic() + 3
    while connections.num_open:
        assert time.monotonic() < deadline, "connections of the tests before are still counted"
        time.sleep(0.01)
    monkeypatch.setattr(connections, "max_open", 1)
    with served.connect() as first:
        while not connections.num_open:
            time.sleep(0.01)
        got, is_closed = exchange(served, b"")
        assert got.startswith(b"HTTP/1.1 503"), got
        assert b"retry-after: 2" in got
        assert is_closed
        first.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert first.recv(100).startswith(b"HTTP/1.1 200")


@given(
    method=st.sampled_from([b"GET", b"POST"]),
    path=st.from_regex(rb"/[a-z0-9/_.~%-]{0,30}", fullmatch=True),
    headers=st.lists(
        st.tuples(
            st.from_regex(rb"x-[a-z]{1,8}", fullmatch=True),
            st.from_regex(rb"[\x21-\x7e][\x20-\x7e]{0,9}", fullmatch=True),
        ),
        max_size=5,
    ),
    length=st.one_of(st.none(), st.integers(0, 10**9)),
)
def test_ordinary_heads_have_one_reading(
    method: bytes, path: bytes, headers: list[tuple[bytes, bytes]], length: int | None
) -> None:
    lines = [b"%s %s HTTP/1.1" % (method, path), b"Host: a", *[b"%s: %s" % header for header in headers]]
    lines += [] if length is None else [b"Content-Length: %d" % length]
    assert ambiguity_of(b"\r\n".join(lines) + b"\r\n\r\n") is None
