"""Addresses: what can be had is had before anything loads, what cannot is refused by name with a next step."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from aphro_core.errors import AddressError, ExitCode
from aphro_core.listeners import holder_of
from aphro_core.server.bind import UNREAD_SECONDS, bind, url_of
from tests.core.server.loopback import loopback


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")


def close(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def test_port_zero_takes_a_free_one_and_says_which() -> None:
    sockets = bind("127.0.0.1", 0)
    try:
        host, port = sockets[0].getsockname()
        assert port > 0
        assert url_of(sockets) == f"http://{host}:{port}"
        assert holder_of(port) == f"pid {os.getpid()} ({Path('/proc/self/comm').read_text().strip()})"
    finally:
        close(sockets)


def test_a_busy_port_names_its_holder_and_a_free_one() -> None:
    taken = bind("127.0.0.1", 0)
    port = taken[0].getsockname()[1]
    try:
        with pytest.raises(AddressError) as refused:
            bind("127.0.0.1", port)
    finally:
        close(taken)
    assert f"127.0.0.1:{port} is in use by pid {os.getpid()} (" in refused.value.message
    assert refused.value.exit_code == ExitCode.ADDRESS
    assert refused.value.hint is not None
    option, free = refused.value.hint.split()
    assert option == "--port"
    close(bind("127.0.0.1", int(free)))


def test_the_holder_may_be_another_process() -> None:
    script = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        port = int(other.stdout.readline())
        with pytest.raises(AddressError, match=rf"in use by pid {other.pid} \(python"):
            bind("127.0.0.1", port)
        other.stdin.close()


def test_a_connection_is_no_holder() -> None:
    """Its local port is the same, and it stands in nobody's way."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        client = socket.create_connection(address)
        accepted, _ = listener.accept()
    with client, accepted:
        assert holder_of(address[1]) is None


def test_a_port_is_ours_from_the_start() -> None:
    """Bound is not enough: two sockets that do not listen may share a port."""
    sockets = bind("127.0.0.1", 0)
    try:
        with socket.create_connection(sockets[0].getsockname(), timeout=1):
            pass
    finally:
        close(sockets)


@pytest.mark.parametrize(
    ("host", "port", "names", "hint"),
    [
        ("127.0.0.1", 70000, "port is 70000, allowed: 1 to 65535", "--port 2242"),
        ("127.0.0.1", -1, "port is -1", "--port 2242"),
        ("no-such-host.invalid", 0, "'no-such-host.invalid' has no address", "--host 127.0.0.1"),
        ("x" * 300, 0, "has no address", "--host 127.0.0.1"),
        ("192.0.2.1", 0, "192.0.2.1 is not an address of this machine", "--host 0.0.0.0"),
    ],
)
def test_an_illegal_address_is_named(host: str, port: int, names: str, hint: str) -> None:
    with pytest.raises(AddressError) as refused:
        bind(host, port)
    assert names in refused.value.message
    assert hint in (refused.value.hint or "")


@pytest.mark.parametrize(("code", "names"), [(errno.EACCES, "needs more rights"), (errno.EINVAL, "cannot be bound")])
def test_what_the_kernel_refuses_is_named(monkeypatch: pytest.MonkeyPatch, code: int, names: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("aphro_core.server.bind._listen", refuse)
    with pytest.raises(AddressError, match=f"127.0.0.1:80 {names}"):
        bind("127.0.0.1", 80)


@needs_ipv6
def test_ipv6() -> None:
    with loopback(host="::1") as server:
        assert server.url.startswith("http://[::1]:")
        assert server.get("/livez").status_code == 200


@needs_ipv6
def test_every_address_of_a_name_has_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    sockets = bind("localhost", 0)
    try:
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
        assert len(sockets) == 2
    finally:
        close(sockets)


def test_an_address_of_a_name_that_this_machine_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    sockets = bind("name", 0)
    close(sockets)
    assert len(sockets) == 1


def test_connections_are_cut_when_nothing_is_read_for_long() -> None:
    """The kernel's own deadline, inherited by every connection."""
    sockets = bind("127.0.0.1", 0)
    try:
        with socket.create_connection(sockets[0].getsockname()):
            accepted, _ = sockets[0].accept()
            with accepted:
                option = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
                assert option == UNREAD_SECONDS * 1000
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    finally:
        close(sockets)
