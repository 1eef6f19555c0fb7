"""Ranks that come late to a start: one that says that it is on its way is waited for, a silent one is named."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest

from aphro_core.channel import ChannelClosedError
from aphro_core.config import EngineConfig, ModelConfig, ParallelConfig
from aphro_core.errors import EngineDeadError, first_cause
from aphro_core.executor import group
from aphro_core.executor.group import GroupExecutor, running
from aphro_core.executor.rank import Launched
from aphro_core.messages.steps import FromWorker, StartWorker, ToWorker, WorkerAlive, WorkerLoaded, WorkerProgress

CONFIG = EngineConfig(
    model=ModelConfig(path="/m", served_name="m", dtype="float32", max_model_len=8),
    parallel=ParallelConfig(tensor_parallel_size=2, backend="ssh"),
    start_timeout_seconds=3.0,
)
Script = Callable[[int], AsyncIterator[FromWorker]]


class FakeProcess:
    pid, exit_code, is_lost, was_short = 7, None, False, False

    def poll(self) -> bool:
        return True

    async def wait(self) -> None: ...

    def send_signal(self, number: signal.Signals) -> None: ...

    def describe_end(self) -> str:
        return "ended"

    def close(self) -> None: ...


class FakeChannel:
    def __init__(self, script: AsyncIterator[FromWorker]) -> None:
        self._script = script

    async def send(self, message: ToWorker) -> None: ...

    async def receive(self) -> FromWorker:
        async for message in self._script:
            return message
        raise ChannelClosedError

    async def aclose(self) -> None: ...


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "_SILENT_SECONDS", 0.4)
    monkeypatch.setattr(group, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(group, "_STOP_SECONDS", 0.1)


def executor_of(script: Script, host: str = "host{rank}") -> GroupExecutor:
    async def launch(rank: int) -> Launched:
        start = StartWorker(config=CONFIG, rank=rank, local_rank=0, store="", memory_bytes=0)
        channel: Any = FakeChannel(script(rank))
        return Launched(FakeProcess(), channel, start, host.format(rank=rank))

    return GroupExecutor(CONFIG, launch, lambda _: None)


async def come(rank: int) -> AsyncIterator[FromWorker]:
    yield WorkerProgress(rank, "rendezvous", 0, 1)
    await anyio.sleep(1.2)
    yield WorkerLoaded(rank, 1, f"host{rank}", "cpu", 0, 0, 0, 0, 0, 0)
    await anyio.sleep(60)


async def on_its_way(rank: int) -> AsyncIterator[FromWorker]:
    for _ in range(10):
        await anyio.sleep(0.1)
        yield WorkerAlive(rank)
    async for message in come(rank):
        yield message


async def silent(rank: int) -> AsyncIterator[FromWorker]:
    await anyio.sleep(60)
    yield WorkerAlive(rank)


@pytest.mark.anyio
async def test_one_that_is_on_its_way_is_waited_for() -> None:
    async with running(executor_of(lambda rank: on_its_way(rank) if rank else come(rank))) as executor:
        assert [rank.host for rank in executor.ranks] == ["host0", "host1"]


@pytest.mark.anyio
async def test_a_silent_one_is_named() -> None:
    with pytest.raises(BaseExceptionGroup) as raised:
        async with running(executor_of(lambda rank: silent(rank) if rank else come(rank))):
            pass
    error = first_cause(raised.value)
    assert isinstance(error, EngineDeadError)
    assert error.message == "rank 1 did not come to meet the others within 0.4 s (on host1)"
    assert error.hint == "look at what that process waits for: on host1"


@pytest.mark.anyio
async def test_none_that_comes_is_a_matter_of_the_start_timeout() -> None:
    with pytest.raises(BaseExceptionGroup) as raised, anyio.fail_after(10):
        async with running(executor_of(silent)):
            pass
    assert "rank 0, 1 did not load within 3 s (on host0, host1)" in str(first_cause(raised.value))


@pytest.fixture
def _is_stopped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        monkeypatch.setattr(FakeProcess, "pid", sleeper.pid)
        sleeper.send_signal(signal.SIGSTOP)
        yield
        sleeper.kill()


@pytest.mark.anyio
@pytest.mark.usefixtures("_is_stopped")
async def test_one_that_is_stopped_while_it_starts_is_named_at_once() -> None:
    with pytest.raises(BaseExceptionGroup) as raised, anyio.fail_after(2.5):
        async with running(executor_of(silent, host="")):
            pass
    assert "is stopped (SIGSTOP) while it starts" in str(first_cause(raised.value))
