"""A driver that cannot let a stream wait says so in the one way that ranks on their way to each other expect."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aphro_kernels import stream_wait
from aphro_kernels.stream_wait import wait_for_count

STREAM: Any = SimpleNamespace(cuda_stream=7)


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    stream_wait._wait_value.cache_clear()
    yield
    stream_wait._wait_value.cache_clear()


def driver(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., int]) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(**functions))


def test_a_driver_that_is_not_there_or_has_no_such_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    counter = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(RuntimeError, match=r"cannot let a stream wait .*libcuda"):
        wait_for_count(STREAM, counter, 0)
    driver(monkeypatch)
    with pytest.raises(RuntimeError, match=r"cannot let a stream wait .*cuStreamWaitValue32"):
        wait_for_count(STREAM, counter, 0)
    driver(monkeypatch, cuStreamWaitValue32=lambda *arguments: 801)
    with pytest.raises(RuntimeError, match="CUDA error 801"):
        wait_for_count(STREAM, counter, 0)


@pytest.mark.parametrize(("count", "value"), [(0, 0), (128, 128), (2**31, 2**31), (2**32 + 5, 5)])
def test_the_newer_function_is_asked_for_a_count_that_wraps(
    count: int, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int | None, ...]] = []

    def wait(*arguments: Any) -> int:
        asked.append(tuple(argument.value for argument in arguments))
        return 0

    driver(monkeypatch, cuStreamWaitValue32=lambda *arguments: 1, cuStreamWaitValue32_v2=wait)
    counter = torch.zeros(1, dtype=torch.int32)
    wait_for_count(STREAM, counter, count)
    assert asked == [(7, counter.data_ptr(), value, 0)]
