"""The wire to a running server: one httpx client, whose failures say what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from aphro_core.client.address import is_loopback
from aphro_core.client.answers import DONE, Piece, parse_models, parse_piece, refusal
from aphro_core.client.sse import EventReader
from aphro_core.errors import ServerError, UsageError


class Connection:
    """A server at ``base_url``. ``timeout`` is seconds of silence, not of a whole answer."""

    def __init__(self, base_url: str, *, api_key: str | None = None, timeout: float = 120.0) -> None:
        self.base_url = base_url
        self._client = httpx.Client(**client_settings(base_url, api_key, timeout))

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def models(self) -> list[str]:
        with translated(self.base_url):
            response = self._client.get("/v1/models")
        if response.status_code != 200:
            raise refusal(response.status_code, response.content, f"{self.base_url}/v1/models")
        return parse_models(response.content)

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Piece]:
        """The pieces of an answer as they come; leaving the loop early closes the connection, which aborts it.

        Raises ServerError, also for a stream that ends without ``[DONE]``.
        """
        reader = EventReader()
        with translated(self.base_url), self._client.stream("POST", path, json=dict(body)) as response:
            if response.status_code != 200:
                raise refusal(response.status_code, response.read(), f"{self.base_url}{path}")
            for read in response.iter_bytes():
                for data in reader.feed(read):
                    if data == DONE:
                        return
                    yield parse_piece(data)
        raise broken_off(self.base_url)


def client_settings(base_url: str, api_key: str | None, timeout: float) -> dict[str, Any]:
    """Arguments of either httpx client. A proxy of the environment is never asked for this very host."""
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
        raise UsageError("the API key is empty or has characters that a header cannot carry")
    return {
        "base_url": base_url,
        "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
        "timeout": httpx.Timeout(timeout, connect=min(timeout, 10.0)),
        "trust_env": not is_loopback(urlsplit(base_url).hostname or ""),
        "follow_redirects": False,
    }


@contextmanager
def translated(base_url: str) -> Iterator[None]:
    """Failures of the wire as ServerErrors that name the server."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise ServerError(
            f"{base_url} says nothing ({type(error).__name__})", hint="a larger --timeout, or look at the server's log"
        ) from error
    except httpx.ConnectError as error:
        raise ServerError(
            f"no server answers at {base_url}: {error}",
            hint="start one with `aphro run MODEL`, or give the URL of a running one",
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        why = str(error) or type(error).__name__
        raise ServerError(f"{base_url} broke off: {why}", hint="look at the server's log, then try again") from error


def broken_off(base_url: str) -> ServerError:
    return ServerError(
        f"{base_url} ended the answer before it was whole", hint="look at the server's log, then try again"
    )
