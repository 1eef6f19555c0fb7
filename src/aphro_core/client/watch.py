"""Several servers looked at again and again: their health and their load."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import anyio
import httpx
import msgspec

from aphro_core.client.answers import refusal
from aphro_core.client.connection import client_settings, translated
from aphro_core.client.metrics_text import Load, RankRow, Scrape, parse_scrape, read_load
from aphro_core.errors import ServerError


@dataclass(frozen=True)
class Look:
    """One look at one server. ``error``: why it could not be looked at; the rest is then what is left of it."""

    url: str
    phase: str  # ready, or why not: starting, draining, recovering, stalled, dead, unreachable
    model: str | None = None
    load: Load | None = None
    ranks: tuple[RankRow, ...] = ()
    error: str | None = None


class Watch:
    """The servers at ``base_urls``, each with its last scrape. One that is away is asked again the next time."""

    def __init__(self, base_urls: Sequence[str], *, api_key: str | None, timeout: float) -> None:
        self._urls = tuple(base_urls)
        self._api_key = api_key
        self._timeout = timeout
        self._last: dict[str, Scrape] = {}

    async def run(self, interval: float, count: int | None, show: Callable[[list[Look]], None]) -> None:
        """``show`` a look at each, in order, every ``interval`` seconds, ``count`` times or for ever."""
        clients = {url: httpx.AsyncClient(**client_settings(url, self._api_key, self._timeout)) for url in self._urls}
        try:
            due, shown = anyio.current_time(), 0
            while True:
                show(await self._look_at_all(clients))
                shown += 1
                if shown == count:
                    return
                due = max(due + interval, anyio.current_time())
                await anyio.sleep_until(due)
        finally:
            with anyio.CancelScope(shield=True):
                for client in clients.values():
                    await client.aclose()

    async def _look_at_all(self, clients: dict[str, httpx.AsyncClient]) -> list[Look]:
        looks: dict[str, Look] = {}

        async def look(url: str) -> None:
            looks[url] = await self._look(url, clients[url])

        async with anyio.create_task_group() as tasks:
            for url in self._urls:
                tasks.start_soon(look, url)
        return [looks[url] for url in self._urls]

    async def _look(self, url: str, client: httpx.AsyncClient) -> Look:
        phase = "unreachable"
        try:
            with translated(url):
                phase = _phase_of(await client.get("/health"))
                response = await client.get("/metrics")
            if response.status_code != 200:
                raise refusal(response.status_code, response.content, f"{url}/metrics")
            scrape = parse_scrape(response.text, time.monotonic())
        except ServerError as error:
            self._last.pop(url, None)
            return Look(url, phase, error=error.message)
        load = read_load(self._last.get(url), scrape)
        self._last[url] = scrape
        return Look(url, phase, scrape.model, load, scrape.ranks)


def _phase_of(response: httpx.Response) -> str:
    """aphro says its phase in either case; others answer 200 with anything, or an error."""
    if response.status_code == 200:
        return "ready"
    try:
        return str(msgspec.json.decode(response.content)["error"]["code"] or "not ready")
    except (msgspec.DecodeError, KeyError, TypeError):
        return "not ready"
