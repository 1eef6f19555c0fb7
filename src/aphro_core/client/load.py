"""The load of a benchmark: many streams at once, each arrival of text with its time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import anyio
import httpx
import msgspec

from aphro_core.client.answers import DONE, Piece, choose_model, parse_models, parse_piece, refusal
from aphro_core.client.bench_report import Record
from aphro_core.client.connection import broken_off, client_settings, translated
from aphro_core.client.sse import EventReader
from aphro_core.client.workload import WORDS, Planned, prompt_ids, prompt_words
from aphro_core.errors import ServerError

Endpoint = Literal["completions", "chat"]
PATHS: Final[dict[Endpoint, str]] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True)
class Target:
    """Which server, and how it is asked."""

    base_url: str
    endpoint: Endpoint
    model: str | None = None
    api_key: str | None = None
    timeout: float = 120.0
    temperature: float = 0.0
    ignore_eos: bool = True


class Load:
    """Sends planned requests, ``concurrency`` at once at most. ``records`` grows as requests end, also when cut short.

    Of a finite rate, a request's time begins when it should have arrived: what waits for a free place, or for a busy
    client, waits as a user would. Otherwise it begins when it is sent.
    """

    def __init__(self, target: Target, *, concurrency: int, rate: float, seed: int) -> None:
        self.records: list[Record] = []
        self.model = target.model or ""
        self.has_exact_prompts = False
        self._target = target
        self._concurrency = concurrency
        self._has_arrivals = not math.isinf(rate)
        self._seed = seed
        self._known_ids: list[int] = []

    async def run(self, warm_up: Sequence[Planned], planned: Sequence[Planned], on_end: Callable[[], None]) -> None:
        """``warm_up`` first, one by one and unrecorded. Raises ServerError if the server cannot be asked at all."""
        target = self._target
        limits = httpx.Limits(max_connections=self._concurrency + 1, max_keepalive_connections=self._concurrency + 1)
        settings = client_settings(target.base_url, target.api_key, target.timeout)
        async with httpx.AsyncClient(**settings, limits=limits) as client:
            await self._prepare(client)
            for each in warm_up:
                record = Record(each.number, time.perf_counter())
                await self._ask(client, each, record)
            await self._send_all(client, planned, on_end)

    async def _prepare(self, client: httpx.AsyncClient) -> None:
        """The model's name, and ids that its vocabulary has."""
        with translated(self._target.base_url):
            response = await client.get("/v1/models")
        if response.status_code != 200:
            raise refusal(response.status_code, response.content, f"{self._target.base_url}/v1/models")
        self.model = choose_model(self._target.model, parse_models(response.content))
        if self._target.endpoint == "completions":
            body = {"model": self.model, "prompt": " ".join(WORDS), "add_special_tokens": False}
            with translated(self._target.base_url):
                response = await client.post("/tokenize", json=body)
            self._known_ids = _tokens_of(response)
            self.has_exact_prompts = bool(self._known_ids)

    async def _send_all(
        self, client: httpx.AsyncClient, planned: Sequence[Planned], on_end: Callable[[], None]
    ) -> None:
        places = anyio.Semaphore(self._concurrency)
        begin = time.perf_counter()

        async def send(each: Planned) -> None:
            due = begin + each.arrives_at
            await anyio.sleep(max(due - time.perf_counter(), 0.0))
            async with places:
                record = Record(each.number, due if self._has_arrivals else time.perf_counter())
                try:
                    await self._ask(client, each, record)
                except ServerError as error:
                    record.error, record.ended_at = error.message, time.perf_counter()
                self.records.append(record)
                on_end()

        async with anyio.create_task_group() as tasks:
            for each in planned:
                tasks.start_soon(send, each)

    async def _ask(self, client: httpx.AsyncClient, planned: Planned, record: Record) -> None:
        """Fill ``record``. Raises ServerError for whatever is not a whole answer."""
        target, reader = self._target, EventReader()
        path, last = PATHS[target.endpoint], 0.0
        with translated(target.base_url):
            async with client.stream("POST", path, json=self._body(planned)) as response:
                if response.status_code != 200:
                    raise refusal(response.status_code, await response.aread(), f"{target.base_url}{path}")
                async for read in response.aiter_bytes():
                    now = time.perf_counter()
                    for data in reader.feed(read):
                        if data == DONE:
                            record.ended_at = last or now
                            return
                        last = _take(parse_piece(data), record, now, last)
        raise broken_off(target.base_url)

    def _body(self, planned: Planned) -> dict[str, Any]:
        target = self._target
        prompt: Mapping[str, Any]
        if target.endpoint == "chat":
            prompt = {"messages": [{"role": "user", "content": prompt_words(planned, self._seed)}]}
        elif self._known_ids:
            prompt = {"prompt": prompt_ids(self._known_ids, planned, self._seed)}
        else:
            prompt = {"prompt": prompt_words(planned, self._seed)}
        return {
            "model": self.model,
            **prompt,
            "max_tokens": planned.output_tokens,
            "temperature": target.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if target.ignore_eos else {}),
        }


def _take(piece: Piece, record: Record, now: float, last: float) -> float:
    """Write one event into the record; returns when text came last."""
    if piece.completion_tokens is not None:
        record.prompt_tokens, record.output_tokens = piece.prompt_tokens or 0, piece.completion_tokens
    if not (piece.text or piece.thinking):
        return last
    if record.first_at is None:
        record.first_at = now
    else:
        record.gaps.append(now - last)
    return now


def _tokens_of(response: httpx.Response) -> list[int]:
    """Distinct ids of ``/tokenize``, which OpenAI does not have: none where the server has no such route."""
    if response.status_code != 200:
        return []
    try:
        return sorted(set(msgspec.json.decode(response.content)["tokens"]))
    except (msgspec.DecodeError, KeyError, TypeError):
        return []
