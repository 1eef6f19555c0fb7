"""Frames survive any cut of the stream; what is not a frame of ours is refused."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import anyio
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphro_core.channel import BlockingChannel, Channel, ChannelClosedError, Frames
from aphro_core.messages import codec
from aphro_core.messages.codec import MAX_FRAME_BYTES
from aphro_core.messages.steps import (
    FromWorker,
    NewSequence,
    ScheduledSequence,
    StepPlan,
    StepResult,
    StopWorker,
    TokenLogprobs,
    ToWorker,
)
from aphro_core.request import SamplingParams

PLAN = StepPlan(
    step_id=3,
    scheduled=[ScheduledSequence(7, 0, 4, [], [0], True)],
    new=[NewSequence(7, [1, 2, 3, 4], 4, SamplingParams(stop=["x"], logit_bias={5: 1.5}), 2**62, [2])],
    released=[5],
)
RESULT = StepResult(step_id=3, token_ids=[9], logprobs={0: TokenLogprobs([9, 4], [-0.5, -1.0], 1)})


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


@given(st.lists(st.integers(1, 40)))
def test_frames_survive_any_cut(cuts: list[int]) -> None:
    engine = codec.engine_side_of_worker()
    stream = engine.encode(PLAN) + engine.encode(StopWorker()) + engine.encode(PLAN)
    frames, bodies, position = Frames(), [], 0
    for length in [*cuts, len(stream)]:
        frames.feed(stream[position : position + length])
        position += length
        while (body := frames.take()) is not None:
            bodies.append(codec.worker_side().decode(body))
    assert bodies == [PLAN, StopWorker(), PLAN]


def test_an_announced_giant_is_refused() -> None:
    frames = Frames()
    frames.feed((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))
    with pytest.raises(ValueError, match="allowed"):
        frames.take()


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", msgspec.msgpack.encode({"type": "plan"}), msgspec.msgpack.encode(["plan"]), b"\x80\x04N."],
    ids=["empty", "not-msgpack", "fields-missing", "not-a-map", "a-pickle"],
)
def test_a_frame_that_matches_no_message_is_refused(body: bytes) -> None:
    with pytest.raises((msgspec.ValidationError, msgspec.DecodeError)):
        codec.worker_side().decode(body)


def test_a_worker_does_not_take_what_only_workers_send() -> None:
    with pytest.raises(msgspec.ValidationError):
        codec.worker_side().decode(codec.worker_side().encode(RESULT)[4:])


@pytest.mark.anyio
async def test_both_ends_talk_and_notice_the_end(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    engine: Channel[ToWorker, FromWorker] = await Channel.over(ours, codec.engine_side_of_worker())
    worker: BlockingChannel[FromWorker, ToWorker] = BlockingChannel(theirs, codec.worker_side())
    received: list[ToWorker] = []

    def serve() -> None:
        received.append(worker.receive())
        worker.send(RESULT)
        worker.close()

    thread = threading.Thread(target=serve)
    thread.start()
    with anyio.fail_after(10):
        await engine.send(PLAN)
        assert await engine.receive() == RESULT
        with pytest.raises(ChannelClosedError):
            await engine.receive()
    thread.join()
    assert received == [PLAN]
    await engine.aclose()


@pytest.mark.anyio
async def test_what_is_sent_in_one_turn_arrives_together(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    channel = await Channel.over(ours, codec.engine_side_of_worker())
    async with anyio.create_task_group() as tasks:
        for step_id in range(5):
            tasks.start_soon(channel.send, StepPlan(step_id=step_id))
    frames = Frames()
    frames.feed(theirs.recv(100_000))
    plans = [codec.worker_side().decode(frames.take() or b"") for _ in range(5)]
    assert plans == [StepPlan(step_id=step_id) for step_id in range(5)]
    await channel.aclose()


@pytest.mark.anyio
async def test_everybody_who_sends_hears_that_the_peer_is_gone(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    channel = await Channel.over(ours, codec.engine_side_of_worker())
    theirs.close()
    heard = []

    async def send() -> None:
        try:
            await channel.send(StopWorker())
        except ChannelClosedError:
            heard.append(True)

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(send)
    await send()
    assert heard == [True] * 4
    await channel.aclose()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_a_sender_that_is_cancelled_while_it_waits_leaves_a_whole_message(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    channel = await Channel.over(ours, codec.engine_side_of_worker())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(channel.send, StepPlan(step_id=0))
        tasks.cancel_scope.cancel()
    await channel.send(StepPlan(step_id=1))
    frames = Frames()
    frames.feed(theirs.recv(100_000))
    plans = [codec.worker_side().decode(frames.take() or b"") for _ in range(2)]
    assert plans == [StepPlan(step_id=0), StepPlan(step_id=1)]
    assert frames.take() is None
    await channel.aclose()


@pytest.mark.anyio
async def test_nothing_follows_half_a_message(pair: tuple[socket.socket, socket.socket]) -> None:
    """A task of asyncio can be cancelled whatever shields it."""
    ours, theirs = pair
    channel = await Channel.over(ours, codec.engine_side_of_worker())
    sending = asyncio.create_task(channel.send(StepPlan(step_id=0, released=[2**40] * 2**20)))
    await asyncio.sleep(0.05)
    assert not sending.done(), "the buffer of the socket is full"
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    with anyio.fail_after(5), pytest.raises(ChannelClosedError):
        await channel.send(StopWorker())
    await channel.aclose()
    while data := theirs.recv(2**20):
        assert len(data) <= 2**20  # half a plan, and its end
