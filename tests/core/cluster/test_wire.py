"""Members prove the token to each other, both ways; strangers get nothing, and every message survives the way."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from aphro_core.cluster.messages import Answer, AskMemory, Done, Down, Memory, MemoryNow, Reach, Refused, Request
from aphro_core.cluster.service import Service, open_door
from aphro_core.cluster.wire import NoMemberError, Serving, WrongTokenError, ask, connect
from aphro_core.errors import ClusterError

TOKEN = "t" * 64
Serve = Callable[[Callable[[Request], Answer]], int]


@pytest.fixture
def serve() -> Iterator[Serve]:
    doors: list[socket.socket] = []

    def start(answer: Callable[[Request], Answer]) -> int:
        door = open_door("127.0.0.1", 0)
        doors.append(door)
        Service(door, TOKEN, lambda request, _: answer(request)).start()
        return int(door.getsockname()[1])

    yield start
    for door in doors:
        door.shutdown(socket.SHUT_RDWR)
        door.close()


def test_a_request_and_its_answer(serve: Serve) -> None:
    seen: list[Request] = []

    def answer(request: Request) -> Answer:
        seen.append(request)
        return MemoryNow("a", Memory(2**40, [1], [2]))

    port = serve(answer)
    assert ask("127.0.0.1", port, TOKEN, Reach("10.0.0.1", 5)) == MemoryNow("a", Memory(2**40, [1], [2]))
    assert seen == [Reach("10.0.0.1", 5)]


def test_a_wrong_token_is_named_and_reaches_nothing(serve: Serve) -> None:
    port = serve(lambda request: pytest.fail("a stranger was heard"))
    with pytest.raises(WrongTokenError, match="the token is not that of its cluster"):
        ask("127.0.0.1", port, "x" * 64, AskMemory())


def test_a_server_that_does_not_know_the_token_is_not_believed() -> None:
    """It lets everybody in, to hear what they say."""
    door = open_door("127.0.0.1", 0)

    def pretend() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("AECDH-AES256-SHA:@SECLEVEL=0")
        with context.wrap_socket(door.accept()[0], server_side=True) as tls:
            tls.sendall(tls.recv(32))  # our own proof, sent back

    threading.Thread(target=pretend, daemon=True).start()
    with pytest.raises(WrongTokenError, match="it does not know the token"):
        connect("127.0.0.1", door.getsockname()[1], TOKEN)
    door.close()


def test_in_the_middle_two_channels_have_two_bindings(serve: Serve) -> None:
    """Who passes on what each side sends, proofs included, between two channels of its own."""
    port = serve(lambda request: pytest.fail("heard through the middle"))
    door = open_door("127.0.0.1", 0)

    def relay() -> None:
        from aphro_core.cluster.wire import _context

        with _context(ssl.PROTOCOL_TLS_SERVER).wrap_socket(door.accept()[0], server_side=True) as victim:
            onward = socket.create_connection(("127.0.0.1", port))
            with _context(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(onward) as server:
                server.sendall(victim.recv(32))
                victim.sendall(server.recv(32))

    threading.Thread(target=relay, daemon=True).start()
    with pytest.raises(WrongTokenError):
        connect("127.0.0.1", door.getsockname()[1], TOKEN)
    door.close()


def test_noise_on_the_port_is_cut_off_and_others_are_served(serve: Serve) -> None:
    port = serve(lambda request: Done())
    for noise in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096)):
        with socket.create_connection(("127.0.0.1", port), 5) as stranger:
            stranger.sendall(noise)
            if noise:
                stranger.settimeout(2)
                with suppress(ConnectionResetError):
                    while stranger.recv(4096):  # an alert of TLS, then the end
                        pass
    assert ask("127.0.0.1", port, TOKEN, AskMemory()) == Done()


def test_a_refusal_and_an_error_are_answers(serve: Serve) -> None:
    def answer(request: Request) -> Answer:
        raise ClusterError("not here", hint="there")

    assert ask("127.0.0.1", serve(answer), TOKEN, Down("x")) == Refused("not here", "there")


def test_nobody_there() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        with pytest.raises(NoMemberError, match="Connection refused"):
            connect("127.0.0.1", port, TOKEN)


def test_an_answer_that_never_comes_ends_the_waiting() -> None:
    door = open_door("127.0.0.1", 0)

    def hang(request: Request, channel: Serving) -> Answer | None:
        time.sleep(5)
        return Done()

    Service(door, TOKEN, hang).start()
    start = time.monotonic()
    with pytest.raises(NoMemberError, match="no answer in time"):
        ask("127.0.0.1", door.getsockname()[1], TOKEN, AskMemory(), timeout=0.3)
    assert time.monotonic() - start < 3
    door.close()
