"""Keys: every route but the open three needs one, whatever the path or the header is dressed up as."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aphro_core.config import ServerConfig
from aphro_core.errors import UsageError
from aphro_core.server.app import build_app
from aphro_core.server.auth import OPEN_PATHS, Keys
from aphro_core.server.refusals import HttpError
from tests.core.server.fake_frontend import FakeFrontend
from tests.core.server.loopback import Loopback, loopback

KEY, OTHER = "sk-first", "sk-zweiter-schlüssel"
GUARDED = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/fake"),
    ("POST", "/v1/tokenize"),
    ("POST", "/tokenize"),
    ("POST", "/v1/detokenize"),
    ("POST", "/detokenize"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/openapi.json"),
    ("GET", "/ping"),
    ("GET", "/no-such-path"),
]
WAYS_AROUND = [
    lambda path: path,
    lambda path: "/" + path,
    lambda path: path + "/",
    lambda path: path.upper(),
    lambda path: path.replace("/", "/%2e/", 1),
    lambda path: "/livez/.." + path,
    lambda path: "/livez/%2e%2e" + path,
    lambda path: path + "?x=/livez",
    lambda path: path + "#/livez",
    lambda path: path + ";/livez",
    lambda path: "http://x" + path,
    lambda path: path.replace("o", "%6f"),
    lambda path: path + "%00",
]


@pytest.fixture(scope="module")
def server() -> Iterator[Loopback]:
    with loopback(api_keys=(KEY, OTHER)) as running:
        yield running


def status_of(server: Loopback, method: str, target: str, *headers: str) -> int:
    lines = [f"{method} {target} HTTP/1.1", "Host: x", "Connection: close", "Content-Length: 0", *headers, "", ""]
    return int(server.raw("\r\n".join(lines).encode()).split(b" ", 2)[1])


@pytest.mark.parametrize("way", range(len(WAYS_AROUND)))
def test_no_way_around_the_key(server: Loopback, way: int) -> None:
    for method, path in GUARDED:
        target = WAYS_AROUND[way](path)
        assert status_of(server, method, target) in (400, 401), target  # a # in a target is not HTTP
    assert server.frontend.requests == []


def test_every_route_is_guarded_or_open() -> None:
    """A new route is in one of the two lists, so this file tests it."""
    app = build_app(FakeFrontend(), ServerConfig())
    routed = {route.path.replace("{model:path}", "fake") for route in app._routes()}
    assert routed == (OPEN_PATHS | {path for _, path in GUARDED}) - {"/no-such-path"}


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_open_paths_need_no_key_but_only_as_they_are_written(server: Loopback, path: str) -> None:
    assert status_of(server, "GET", path) == 200
    for target in ("/" + path, path + "/", path.upper(), path + "/x", path + "%2f"):
        assert status_of(server, "GET", target) == 401, target


@pytest.mark.parametrize(
    "header",
    [
        "Authorization: Bearer",
        "Authorization: Bearer ",
        "Authorization: Bearer wrong",
        f"Authorization: {KEY}",
        f"Authorization: Basic {KEY}",
        f"Authorization: Bearer {KEY}x",
        f"Authorization: Bearer {KEY[:-1]}",
        f"Authorization: Bearer {KEY.upper()}",
        f"Authorization: Bearer {KEY}\r\nAuthorization: Bearer {KEY}",
        f"Authorization: Bearer {KEY}, Bearer {KEY}",
        f"X-Api-Key: {KEY}",
        f"Cookie: Authorization=Bearer {KEY}",
    ],
)
def test_what_is_no_key(server: Loopback, header: str) -> None:
    assert status_of(server, "GET", "/v1/models", header) == 401


@pytest.mark.parametrize(
    "header", [f"Authorization: Bearer {KEY}", f"authorization: bearer  {KEY} ", f"Authorization: Bearer {OTHER}"]
)
def test_what_is_a_key(server: Loopback, header: str) -> None:
    assert status_of(server, "GET", "/v1/models", header) == 200


def test_a_refusal_says_what_is_missing(server: Loopback) -> None:
    answer = server.get("/v1/models")
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "Authorization: Bearer" in answer.json()["error"]["message"]


def test_the_official_client_gets_in(server: Loopback) -> None:
    assert [model.id for model in server.openai(KEY).models.list()] == ["fake"]


def test_keys_do_not_share_their_prefix_cache(server: Loopback) -> None:
    server.frontend.requests.clear()
    for key in (KEY, KEY, "sk-zweiter-schlüssel"):
        headers = {"Authorization": f"Bearer {key}".encode()}
        assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}, headers=headers).status_code == 200
    first, again, other = [request.cache_salt for request in server.frontend.requests]
    server.frontend.requests.clear()
    assert first == again != other
    assert KEY not in first


def test_every_key_is_compared_however_the_first_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(ours: bytes, given: bytes) -> bool:
        compared.append(ours)
        return ours == given

    monkeypatch.setattr("hmac.compare_digest", compare)
    keys = Keys(["a", "b", "c"])
    keys.admit({"path": "/v1/models", "headers": [(b"authorization", b"Bearer a")]})
    assert len(set(compared)) == 3
    with pytest.raises(HttpError):
        keys.admit({"path": "/v1/models", "headers": []})
    assert len(compared) == 6


def test_without_keys_everybody_may_ask() -> None:
    assert Keys([]).admit({"path": "/v1/models", "headers": []}) == ""


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_key_is_no_key(empty: str) -> None:
    with pytest.raises(UsageError, match="API key is empty"):
        build_app(FakeFrontend(), ServerConfig(api_keys=("good", empty)))
