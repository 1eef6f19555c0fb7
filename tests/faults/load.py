"""Requests that run while something breaks: what each got, when, and how long anybody waited."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Answer:
    """One request's outcome. Times are seconds of the monotonic clock."""

    status: int = 0
    token_ids: list[int] = field(default_factory=list)
    error: dict[str, Any] | None = None
    is_done: bool = False
    token_times: list[float] = field(default_factory=list)
    byte_times: list[float] = field(default_factory=list)

    @property
    def longest_pause(self) -> float:
        """Between two tokens."""
        return max((b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)), default=0.0)

    @property
    def longest_silence(self) -> float:
        """Between any two bytes."""
        return max((b - a for a, b in zip(self.byte_times, self.byte_times[1:], strict=False)), default=0.0)


def prompt_of(index: int, length: int = 20) -> list[int]:
    """Different prompts without a common prefix."""
    return [5 + (index * 31 + position * 7) % 120 for position in range(length)]


def stream(url: str, body: dict[str, Any], answer: Answer, timeout: float = 120.0) -> None:
    """POST a streaming completion and record it."""
    asked = {"stream": True, "return_token_ids": True, "ignore_eos": True, "temperature": 0, **body}
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=timeout) as response:
            answer.status = response.status_code
            if response.status_code != 200:
                answer.error = json.loads(response.read())["error"]
                return
            for line in response.iter_lines():
                answer.byte_times.append(time.monotonic())
                _take(line, answer)
    except httpx.HTTPError as error:
        answer.error = {"message": f"{type(error).__name__}: {error}", "code": "connection"}


def _take(line: str, answer: Answer) -> None:
    if not line.startswith("data: "):
        return
    if line == "data: [DONE]":
        answer.is_done = True
        return
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        answer.error = event["error"]
    for choice in event.get("choices", ()):
        if choice.get("token_ids"):
            answer.token_ids += choice["token_ids"]
            answer.token_times.append(time.monotonic())


class Load:
    """Streaming completions of ``prompts``, each in a thread of its own, started by ``with``."""

    def __init__(self, url: str, bodies: Sequence[dict[str, Any]]) -> None:
        self.answers = [Answer() for _ in bodies]
        self._threads = [
            threading.Thread(target=stream, args=(url, body, answer), daemon=True)
            for body, answer in zip(bodies, self.answers, strict=True)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.join()

    def join(self, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), "a request has no end"

    def wait_tokens(self, num_tokens: int, seconds: float = 60.0) -> None:
        """Until every request has got that many."""
        deadline = time.monotonic() + seconds
        while min(len(answer.token_ids) for answer in self.answers) < num_tokens:
            assert time.monotonic() < deadline, [(a.status, len(a.token_ids), a.error) for a in self.answers]
            time.sleep(0.005)


def bodies(num_requests: int, max_tokens: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": prompt_of(index), "max_tokens": max_tokens, **more} for index in range(num_requests)]


def run_load(url: str, asked: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The tokens of each, without a fault."""
    with Load(url, asked) as load:
        pass
    assert all(answer.is_done for answer in load.answers), [answer.error for answer in load.answers]
    return [answer.token_ids for answer in load.answers]
