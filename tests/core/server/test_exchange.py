"""One request's wire: a body read no further than it may be, an answer that gets out over a body left unread."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

from aphro_core.server import exchange
from aphro_core.server.exchange import BodyReader, Exchange
from aphro_core.server.refusals import HttpError

JSON = (b"content-type", b"application/json")
LAST = {"type": "http.response.body", "body": b"answer"}


def piece(body: bytes, more_body: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more_body}


async def never() -> Any:
    raise AssertionError("nothing may be read")


def test_an_announced_size_is_refused_before_anything_is_read() -> None:
    async def scenario() -> None:
        with pytest.raises(HttpError) as refused:
            await BodyReader(max_bytes=10).read({"headers": [JSON, (b"content-length", b"11")]}, never)
        assert refused.value.status == 413

    anyio.run(scenario)


@pytest.mark.parametrize("size", [0, 9, 10, 11])
def test_the_limit_is_the_last_size_that_passes(size: int) -> None:
    async def scenario() -> bytes:
        pieces = [piece(b"x" * size), piece(b"", more_body=False)]

        async def receive() -> Any:
            return pieces.pop(0)

        return await BodyReader(max_bytes=10).read({"headers": [JSON]}, receive)

    if size <= 10:
        assert anyio.run(scenario) == b"x" * size
    else:
        with pytest.raises(HttpError, match="allowed: up to 10 bytes"):
            anyio.run(scenario)


def test_a_client_that_left_is_told_nothing_by_name() -> None:
    async def gone() -> Any:
        return {"type": "http.disconnect"}

    with pytest.raises(HttpError, match="left before") as refused:
        anyio.run(BodyReader().read, {"headers": [JSON]}, gone)
    assert refused.value.status == 499


def test_the_end_is_announced_though_the_body_has_filled_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """As hypercorn does it: the last send puts a disconnect on the bounded queue that receive empties."""
    monkeypatch.setattr(exchange, "_LINGER_SECONDS", 0.02)
    sent: list[dict[str, Any]] = []

    async def scenario() -> None:
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(1)

        async def flood() -> None:
            while True:
                await queue.put(piece(b"x"))
                await anyio.sleep(0.005)

        async def send(message: Any) -> None:
            sent.append(message)
            if not message.get("more_body"):
                while not queue.full():
                    queue.put_nowait(piece(b"x"))
                await queue.put({"type": "http.disconnect"})

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(flood)
            with anyio.fail_after(2):
                await Exchange(queue.get, send).send(LAST)
            tasks.cancel_scope.cancel()

    anyio.run(scenario)
    assert b"".join(message["body"] for message in sent) == b"answer"


def test_an_answer_to_a_body_that_was_read_goes_out_in_one_piece() -> None:
    sent: list[dict[str, Any]] = []

    async def scenario() -> None:
        async def receive() -> Any:
            return piece(b"x", more_body=False)

        async def send(message: Any) -> None:
            sent.append(message)

        one = Exchange(receive, send)
        await one.receive()
        await one.send(LAST)

    anyio.run(scenario)
    assert sent == [LAST]


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_client_that_the_kernel_gave_up_is_gone(fails_at: int) -> None:
    """hypercorn lets such errors through; nothing more is sent, and the work is cancelled through receive."""
    calls: list[dict[str, Any]] = []

    async def scenario() -> None:
        async def send(message: Any) -> None:
            calls.append(message)
            if len(calls) == fails_at:
                raise TimeoutError(110, "Connection timed out")

        async def receive() -> Any:
            return {"type": "http.disconnect"}

        one = Exchange(receive, send)
        for message in ({"type": "http.response.start", "status": 200, "headers": []}, LAST, LAST):
            await one.send(message)

    anyio.run(scenario)
    assert len(calls) == fails_at


def test_an_error_that_is_not_the_clients_is_not_hidden() -> None:
    async def send(message: Any) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        anyio.run(Exchange(never, send).send, {"type": "http.response.start", "status": 200, "headers": []})
