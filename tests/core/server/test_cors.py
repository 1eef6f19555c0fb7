"""Pages of other origins: preflights without a key, headers on every kind of answer, nothing where nobody asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest

from aphro_core.config import ServerConfig
from aphro_core.errors import EngineDeadError, OverloadedError
from aphro_core.server.cors import with_origins
from tests.core.server.fake_frontend import FakeFrontend, FakeHealth
from tests.core.server.loopback import Loopback, loopback

KEY, PAGE, OTHER = "sk-one", "https://chat.example.com", "https://evil.example.com"
BEARER = {"Authorization": f"Bearer {KEY}"}
ANY = ("*",)
COMPLETION = {"prompt": "x", "max_tokens": 3}
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/fake", "/v1/tokenize", "/v1/none"]


@pytest.fixture(scope="module")
def anybody() -> Iterator[Loopback]:
    with loopback(api_keys=(KEY,), allowed_origins=ANY) as running:
        yield running


@pytest.fixture(scope="module")
def named() -> Iterator[Loopback]:
    with loopback(
        allowed_origins=(PAGE, "http://localhost:3000"), allowed_methods=("POST",), allowed_headers=("Authorization",)
    ) as running:
        yield running


def preflight(
    server: Loopback,
    path: str = "/v1/completions",
    *,
    origin: str = PAGE,
    method: str = "POST",
    headers: str | None = None,
) -> httpx.Response:
    asked = {"Origin": origin, "Access-Control-Request-Method": method}
    if headers is not None:
        asked["Access-Control-Request-Headers"] = headers
    return server.request("OPTIONS", path, headers=asked)


def cors_of(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


@pytest.mark.parametrize("path", PATHS)
def test_a_preflight_needs_no_key(anybody: Loopback, path: str) -> None:
    answer = preflight(anybody, path, headers="authorization,content-type")
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "POST" in answer.headers["access-control-allow-methods"].split(", ")
    assert answer.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "access-control-allow-credentials" not in answer.headers
    assert anybody.frontend.requests == []


def test_options_that_is_no_preflight_needs_the_key(anybody: Loopback) -> None:
    for headers in ({}, {"Origin": PAGE}, {"Access-Control-Request-Method": "POST"}):
        assert anybody.request("OPTIONS", "/v1/models", headers=headers).status_code == 401
    assert anybody.request("OPTIONS", "/v1/models", headers=BEARER).status_code == 405


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/v1/models", BEARER, 200),
        ("GET", "/metrics", BEARER, 200),
        ("GET", "/health", {}, 200),
        ("GET", "/v1/models", {}, 401),
        ("GET", "/v1/none", BEARER, 404),
        ("GET", "/v1/completions", BEARER, 405),
        ("POST", "/v1/completions", BEARER, 415),
        ("GET", "/v1//models", BEARER, 400),
        ("GET", "/livez", {"X-Long": "x" * 40_000}, 431),
    ],
)
def test_answers_and_errors_can_be_read(
    anybody: Loopback, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    answer = anybody.request(method, path, headers={"Origin": PAGE, **headers})
    assert answer.status_code == status
    assert cors_of(answer) == {"access-control-allow-origin": "*"}
    plain = anybody.request(method, path, headers=headers)
    assert (plain.status_code, cors_of(plain)) == (status, {})
    assert plain.content == answer.content or status == 431  # which counts the headers
    assert "vary" not in plain.headers


@pytest.mark.parametrize(
    ("frontend", "status"),
    [
        (FakeFrontend(refuses=OverloadedError("full")), 429),
        (FakeFrontend(refuses=EngineDeadError("gone")), 503),
        (FakeFrontend(refuses=ValueError("unforeseen")), 500),
    ],
    ids=["full", "dead", "unforeseen"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_refuses(frontend: FakeFrontend, status: int, stream: bool) -> None:
    with loopback(frontend, allowed_origins=ANY) as server:
        answer = server.post("/v1/completions", {**COMPLETION, "stream": stream}, headers={"Origin": PAGE})
    assert answer.status_code == status
    assert cors_of(answer) == {"access-control-allow-origin": "*"}


def test_a_server_that_is_not_ready() -> None:
    with loopback(FakeFrontend(state=FakeHealth("recovering", ready=False)), allowed_origins=ANY) as server:
        answer = server.get("/readyz", headers={"Origin": PAGE})
    assert (answer.status_code, cors_of(answer)) == (503, {"access-control-allow-origin": "*"})


def test_a_stream_is_the_same_with_and_without_an_origin(anybody: Loopback) -> None:
    body = {**COMPLETION, "stream": True}
    answers = [anybody.post("/v1/completions", body, headers={**BEARER, **more}) for more in ({"Origin": PAGE}, {})]
    assert [cors_of(answer) for answer in answers] == [{"access-control-allow-origin": "*"}, {}]
    for answer in answers:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["x-request-id"]
        assert answer.text.count("data: ") == 5
        assert answer.text.endswith("data: [DONE]\n\n")


def test_named_origins(named: Loopback) -> None:
    for page in (PAGE, "http://localhost:3000"):
        answer = preflight(named, origin=page, headers="authorization, content-type")
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == page
        assert answer.headers["access-control-allow-methods"] == "POST"
        assert "Authorization" in answer.headers["access-control-allow-headers"].split(", ")
        answer = named.post("/v1/completions", COMPLETION, headers={"Origin": page})
        assert cors_of(answer) == {"access-control-allow-origin": page}
        assert answer.headers["vary"] == "Origin"


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        ({"origin": OTHER}, "origin"),
        ({"origin": PAGE + ".evil.com"}, "origin"),
        ({"origin": PAGE.upper()}, "origin"),
        ({"origin": PAGE + ":8443"}, "origin"),
        ({"origin": "null"}, "origin"),
        ({"origin": ""}, "origin"),
        ({"method": "GET"}, "method"),
        ({"headers": "authorization, x-other"}, "headers"),
    ],
)
def test_a_preflight_that_is_refused_says_what_of_it(named: Loopback, asked: dict[str, Any], wrong: str) -> None:
    answer = preflight(named, **asked)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("cors_refused", "invalid_request_error")
    assert wrong in error["message"].split(",")[0]
    assert "--allowed-origins" in error["message"]
    assert PAGE not in error["message"], "who may ask is nobody's business"
    assert ("access-control-allow-origin" in answer.headers) == (wrong != "origin")


def test_another_origin_is_answered_without_the_header(named: Loopback) -> None:
    answer = named.post("/v1/completions", COMPLETION, headers={"Origin": OTHER})
    assert (answer.status_code, cors_of(answer)) == (200, {})


def test_credentials_name_the_origin_even_where_any_may_ask() -> None:
    """Browsers take no ``*`` together with credentials."""
    with loopback(allowed_origins=ANY, allow_credentials=True) as server:
        asked, answer = preflight(server, headers="x-mine"), server.get("/v1/models", headers={"Origin": PAGE})
    allowed = {"access-control-allow-origin": PAGE, "access-control-allow-credentials": "true"}
    assert cors_of(answer) == allowed
    assert answer.headers["vary"] == "Origin"
    assert cors_of(asked).items() >= allowed.items()
    assert "*" not in cors_of(asked).values()


def test_no_origins_is_no_cors() -> None:
    with loopback() as server:
        assert preflight(server).status_code == 405
        answer = server.get("/v1/models", headers={"Origin": PAGE})
        assert (answer.status_code, cors_of(answer), "vary" in answer.headers) == (200, {}, False)


def test_requests_without_an_origin_go_straight_through() -> None:
    """Not one call more a streamed chunk: the very ``send`` of the server is handed on."""
    handed: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        handed.append((scope, receive, send))

    async def receive() -> Any: ...

    async def send(message: Any) -> None: ...

    edge = with_origins(app, ServerConfig(allowed_origins=ANY))
    scope = {"type": "http", "method": "POST", "headers": [(b"host", b"x")]}
    anyio.run(edge, scope, receive, send)
    assert handed == [(scope, receive, send)]
    anyio.run(edge, {**scope, "headers": [(b"origin", PAGE.encode())]}, receive, send)
    assert handed[1][2] is not send
    assert with_origins(app, ServerConfig()) is app
