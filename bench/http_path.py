"""What the API process spends on a streamed token: an engine that costs nothing, real sockets, real clients.

    python bench/http_path.py [--streams 256] [--tokens 200] [--tokenizer FILE.gguf] [--profile]

A thread plays the engine: every step gives each open sequence one token, over the channel that engines use, once the
one before has been written. Client
processes read the streams (bench/http_client.py). Printed is the processor time of the event loop's thread a token,
which neighbours disturb less than the wall clock, and the rate that this allows one core.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import socket
import sys
import threading
import time
from pathlib import Path

import anyio
import anyio.lowlevel

from aphro_core.channel import BlockingChannel, Channel
from aphro_core.config import ServerConfig
from aphro_core.frontend.frontend import Frontend
from aphro_core.frontend.tokenizer import open_tokenizer
from aphro_core.messages import codec
from aphro_core.messages.requests import (
    AddSequence,
    EngineReady,
    EngineStats,
    FromEngine,
    Gains,
    SequenceOutput,
    StepOutputs,
    ToEngine,
)
from aphro_core.server.app import build_app
from aphro_core.server.bind import bind
from aphro_core.server.serve import Server

NUM_CLIENTS = 2
VOCAB_SIZE = 1000
START_SECONDS = 2.0  # for the clients to connect
TURNS = 8  # of the event loop, from an engine's message to the last stream's chunk


def play_engine(sock: socket.socket, num_streams: int, token_ids: list[int], written: threading.Semaphore) -> None:
    """Wait for every sequence, then give each a token a step."""
    channel: BlockingChannel[FromEngine, ToEngine] = BlockingChannel(sock, codec.engine_side_of_api())
    left: dict[int, int] = {}
    while len(left) < num_streams:
        message = channel.receive()
        if isinstance(message, AddSequence):
            left[message.seq_id] = message.max_tokens
    step = 0
    while left:
        step += 1
        outputs = []
        for seq_id in list(left):
            left[seq_id] -= 1
            reason = None if left[seq_id] else "length"
            outputs.append(SequenceOutput(seq_id, [token_ids[step % len(token_ids)]], finish_reason=reason))
            if reason:
                del left[seq_id]
        channel.send(StepOutputs(Gains(outputs), EngineStats(step, len(outputs), 0, 0, 0, 0, 0)))
        written.acquire()


async def run_clients(port: int, num_streams: int, num_tokens: int) -> None:
    start = time.monotonic() + START_SECONDS
    job = {"host": "127.0.0.1", "port": port, "model": "bench", "start": start}

    async def client(number: int) -> None:
        asked = [[[1, 2, 3], num_tokens]] * len(range(number, num_streams, NUM_CLIENTS))
        data = json.dumps({**job, "requests": asked}) + "\n"
        command = [sys.executable, str(Path(__file__).with_name("http_client.py"))]
        done = await anyio.run_process(command, input=data.encode(), stderr=None)
        assert all(len(times) == num_tokens for times in json.loads(done.stdout)), "chunks were merged"

    async with anyio.create_task_group() as tasks:
        for number in range(NUM_CLIENTS):
            tasks.start_soon(client, number)


async def measure(arguments: argparse.Namespace) -> float:
    """Seconds of this thread a token."""
    tokenizer = open_tokenizer(Path(arguments.tokenizer)) if arguments.tokenizer else None
    frontend = Frontend(
        tokenizer,
        served_name="bench",
        vocab_size=VOCAB_SIZE,
        max_model_len=2**20,
        eos_token_ids=[],
        max_queued_requests=2**20,
    )
    ours, theirs = socket.socketpair()
    written = threading.Semaphore(0)
    token_ids = list(range(VOCAB_SIZE))
    if tokenizer is not None:  # whole characters only: others wait for the next token
        token_ids = [token_id for token_id in token_ids if tokenizer.token_bytes(token_id).isalpha()]
    threading.Thread(target=play_engine, args=(theirs, arguments.streams, token_ids, written)).start()
    engine = await Channel.over(ours, codec.api_side_of_engine())
    frontend.on_engine_ready(EngineReady(1000, 2**20, []))
    await frontend.resume(engine)  # type: ignore[arg-type]
    sockets = bind("127.0.0.1", 0)
    config = ServerConfig(host="127.0.0.1", port=0, max_queued_requests=2**20)
    server = Server(build_app(frontend, config), sockets, config)

    async def listen() -> None:
        while True:
            message = await engine.receive()
            assert isinstance(message, StepOutputs)
            frontend.on_outputs(message)
            for _ in range(TURNS):
                await anyio.lowlevel.checkpoint()
            written.release()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listen)
        tasks.start_soon(server.run)
        before = time.thread_time()
        profile = cProfile.Profile()
        if arguments.profile:
            profile.enable()
        await run_clients(sockets[0].getsockname()[1], arguments.streams, arguments.tokens)
        profile.disable()
        seconds = time.thread_time() - before
        server.stop_now()
        tasks.cancel_scope.cancel()
    if arguments.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)
    return seconds / (arguments.streams * arguments.tokens)


def main() -> None:
    gc.collect()
    gc.freeze()  # as the server does once it serves
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tokenizer", help="a .gguf file or folder; without, tokens are streamed without text")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    for _ in range(arguments.rounds):
        seconds = anyio.run(measure, arguments)
        print(f"{seconds * 1e6:.1f} us a token: {1 / seconds:,.0f} tokens/s a core", flush=True)


if __name__ == "__main__":
    main()
