"""What a step costs the host when the device costs nothing: the engine's thread, the API process.

    python bench/host_step.py [--rows 1 32 256 512] [--steps 300] [--profile engine|api]

A GPU's way through a step on CPU tensors, with the layers and the sampler left out: scheduler, plan, inputs, results,
messages, streams; as many clients as rows, each in the API process. CPU microseconds a step of the API process and of
the engine's thread (median, and the least tenth: what neighbours on the host leave alone), and the period of steps by
the clock. What the driver takes for copies and a graph is not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import pstats
import socket
import statistics
import time
from collections import defaultdict
from itertools import pairwise
from typing import Any

import anyio
import torch

from aphro_core.channel import Channel
from aphro_core.config import SchedulerConfig
from aphro_core.distributed.links import Links
from aphro_core.distributed.stage_links import StageLink
from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.engine.engine import Engine
from aphro_core.engine.step_watch import StepWatch
from aphro_core.executor.inprocess import InProcessExecutor
from aphro_core.frontend.frontend import Frontend
from aphro_core.layers.decoder import Decoder
from aphro_core.messages import codec
from aphro_core.messages.requests import EngineReady, StepOutputs, StopEngine
from aphro_core.messages.steps import StepPlan
from aphro_core.models.spec import DecoderSpec, RopeSpec
from aphro_core.parallel.shard import build_plan
from aphro_core.request import Request, SamplingParams
from aphro_core.scheduler.scheduler import Scheduler
from aphro_core.worker.device_runner import DeviceRunner
from aphro_core.worker.kv_cache import allocate_kv_cache
from aphro_core.worker.loader import dummy_weights
from aphro_core.worker.results import freeze_heap
from aphro_core.worker.step import LaunchedStep

BLOCK_SIZE, PROMPT, MAX_LEN, MAX_ROWS = 16, 24, 2048, 512
NUM_BLOCKS = MAX_ROWS * MAX_LEN // BLOCK_SIZE // 2
SPEC = DecoderSpec(
    architecture="LlamaForCausalLM", vocab_size=64, hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2,
    num_kv_heads=1, head_dim=16, norm_eps=1e-5, rope=RopeSpec(theta=1e4, rotary_dim=16),
    max_position_embeddings=MAX_LEN, tie_word_embeddings=True,
)  # fmt: skip


class IdleWorker:
    """A rank whose device takes no time and draws token 7."""

    is_asynchronous = True

    def __init__(self) -> None:
        shard = build_plan(SPEC, 1, 1).ranks[0]
        cpu, links = torch.device("cpu"), Links(TensorParallelGroup(0, 1), StageLink(None, None))
        decoder = Decoder(SPEC, shard, dummy_weights(SPEC, shard, torch.float32, cpu, 0), links.tensor)
        caches = allocate_kv_cache(shard, SPEC, NUM_BLOCKS, BLOCK_SIZE, torch.float32, cpu)
        self._runner: Any = DeviceRunner(
            SPEC, shard, decoder, caches, links,
            block_size=BLOCK_SIZE, max_rows=MAX_ROWS, max_model_len=MAX_LEN, dtype=torch.float32, device=cpu,
        )  # fmt: skip
        self._runner._answers.memory.fill_(7)
        self._runner._padded.run = lambda shape: None
        self.marks: dict[int, list[float]] = defaultdict(list)  # CPU seconds of the thread that launches, by rows

    def load(self) -> Any: ...

    def enter_thread(self) -> None: ...

    def settle(self) -> None: ...

    def close(self) -> None: ...

    def print_steps(self) -> None:
        print(f"{'rows':>5} {'engine us':>10} {'least us':>10} {'budget us':>10}")
        for rows, marks in self.marks.items():
            spent = sorted((after - before) * 1e6 for before, after in pairwise(marks))
            if len(spent) > 50:
                print(f"{rows:5} {statistics.median(spent):10.0f} {spent[len(spent) // 10]:10.0f} {150 + 3 * rows:10}")

    def launch(self, plan: StepPlan) -> LaunchedStep | None:
        self.marks[plan.num_rows].append(time.thread_time())
        launched: LaunchedStep | None = self._runner.launch(plan)
        return launched


async def run_engine(sock: socket.socket, profile: cProfile.Profile | None) -> None:
    api = await Channel.over(sock, codec.engine_side_of_api())
    worker = IdleWorker()
    executor = InProcessExecutor(worker, asyncio.get_running_loop())  # type: ignore[arg-type]

    def build_scheduler() -> Scheduler:
        config = SchedulerConfig(max_num_seqs=MAX_ROWS, max_num_batched_tokens=8192)
        sizes = {"num_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE, "max_model_len": MAX_LEN}
        return Scheduler(config, **sizes, max_in_flight=2, run_ahead=1)

    async def announce() -> None:
        await api.send(EngineReady(NUM_BLOCKS, MAX_LEN, []))

    engine = Engine(api, executor, build_scheduler, StepWatch(60.0, 60.0, time.monotonic))
    freeze_heap()
    await executor.load()
    if profile:
        profile.enable()
    await engine.run(announce)
    if profile:
        profile.disable()
    await executor.aclose()
    worker.print_steps()


def engine_process(sock: socket.socket, profile: bool) -> None:
    torch.set_num_threads(1)
    profiler = cProfile.Profile() if profile else None
    anyio.run(run_engine, sock, profiler)
    if profiler:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(28)


class Link:
    def __init__(self, channel: Channel[Any, Any]) -> None:
        self._channel = channel

    async def send(self, message: Any) -> None:
        await self._channel.send(message)


async def serve_rows(channel: Channel[Any, Any], rows: int, steps: int) -> tuple[float, float]:
    """(seconds a step by the clock, CPU seconds a step of this process), while all rows decode."""
    frontend = Frontend(
        None, served_name="x", vocab_size=64, max_model_len=MAX_LEN, eos_token_ids=(), max_queued_requests=2**20
    )
    marks: list[tuple[float, float]] = []

    async def pump() -> None:
        while True:
            message = await channel.receive()
            if isinstance(message, StepOutputs):
                frontend.on_outputs(message)
                if len(message.gains.outputs) + len(message.gains.seq_ids) == rows:
                    marks.append((time.perf_counter(), time.process_time()))

    async def client(number: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True, detokenize=False)
        request = Request(request_id=str(number), prompt_token_ids=[3] * (PROMPT + number % 16), sampling=params)
        async with frontend.stream(request) as deltas:
            async for _ in deltas:
                pass

    frontend.on_engine_ready(EngineReady(NUM_BLOCKS, MAX_LEN, []))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pump)
        await frontend.resume(Link(channel))
        async with anyio.create_task_group() as clients:
            for number in range(rows):
                clients.start_soon(client, number)
        tasks.cancel_scope.cancel()
    (wall, cpu), (last_wall, last_cpu) = marks[len(marks) // 4], marks[-1]
    count = len(marks) - 1 - len(marks) // 4
    return (last_wall - wall) / count, (last_cpu - cpu) / count


async def run_api(sock: socket.socket, rows: list[int], steps: int, profile: cProfile.Profile | None) -> None:
    channel = await Channel.over(sock, codec.api_side_of_engine())
    assert isinstance(await channel.receive(), EngineReady)
    freeze_heap()
    print(f"{'rows':>5} {'period us':>10} {'API us':>10}")
    for count in rows:
        if profile:
            profile.enable()
        period, api = await serve_rows(channel, count, steps)
        if profile:
            profile.disable()
        print(f"{count:5} {period * 1e6:10.0f} {api * 1e6:10.0f}", flush=True)
    await channel.send(StopEngine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256, 512])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--profile", choices=["engine", "api"])
    arguments = parser.parse_args()
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if not pid:
        ours.close()
        engine_process(theirs, arguments.profile == "engine")
        os._exit(0)
    theirs.close()
    profiler = cProfile.Profile() if arguments.profile == "api" else None
    anyio.run(run_api, ours, arguments.rows, arguments.steps, profiler)
    os.waitpid(pid, 0)
    if profiler:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
