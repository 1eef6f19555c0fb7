"""JSON lists of origins, methods and headers: what is understood, and what a refusal says."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from aphro_cli.cors_options import ALL, parse_headers, parse_methods, parse_origins
from aphro_core.errors import UsageError

PARSERS = {
    "--allowed-origins": parse_origins,
    "--allowed-methods": parse_methods,
    "--allowed-headers": parse_headers,
}


@pytest.mark.parametrize("parse", PARSERS.values(), ids=PARSERS)
def test_all_and_none(parse: Callable[[str], tuple[str, ...]]) -> None:
    assert parse(ALL) == ("*",)
    assert parse(" [ ] ") == ()


@pytest.mark.parametrize(
    "origin",
    [
        "http://a",
        "https://chat.example.com",
        "http://localhost:3000",
        "http://127.0.0.1:8080",
        "http://[::1]:8080",
        "http://a:443",
        "https://a:80",
        "null",
        "tauri://localhost",
        "chrome-extension://abcdefgh",
        "https://xn--bcher-kva.example",
    ],
)
def test_origins(origin: str) -> None:
    assert parse_origins(json.dumps(["http://first", origin])) == ("http://first", origin)


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "a",
        "a.example.com",
        "http://",
        "http://a/",
        "http://a/path",
        "http://a:80",
        "https://a:443",
        "http://a:",
        "http://a:0",
        "HTTP://a",
        "http://A",
        "http://*.example.com",
        "http://*",
        "http://user@a",
        "http://a b",
        "http://a\n",
        "http://bücher.example",
        "http://a,http://b",
        "Null",
    ],
)
def test_origins_that_no_browser_sends(origin: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_origins(json.dumps(["http://first", origin]))
    assert f"--allowed-origins has {origin!r}, allowed: " in refused.value.message
    assert refused.value.hint == "for example https://chat.example.com"


@pytest.mark.parametrize("method", ["", "post", "Get", "GET,POST", "GET POST", "**"])
def test_methods_that_are_none(method: str) -> None:
    assert parse_methods('["GET", "M-SEARCH"]') == ("GET", "M-SEARCH")
    with pytest.raises(UsageError) as refused:
        parse_methods(json.dumps([method]))
    assert f"--allowed-methods has {method!r}, allowed: " in refused.value.message


@pytest.mark.parametrize("header", ["", "X Y", "X-*", "X:", "X\r\nY", "ü"])
def test_headers_that_are_none(header: str) -> None:
    assert parse_headers('["Authorization", "x-request_id"]') == ("Authorization", "x-request_id")
    with pytest.raises(UsageError) as refused:
        parse_headers(json.dumps([header]))
    assert f"--allowed-headers has {header!r}, allowed: " in refused.value.message


@pytest.mark.parametrize("option", PARSERS)
@pytest.mark.parametrize(
    "text", ["", "*", "http://a", '"*"', "['*']", '["a"', "{}", "null", "[1]", '[["a"]]', "[" * 9**5]
)
def test_what_is_no_list_of_texts(option: str, text: str) -> None:
    with pytest.raises(UsageError) as refused:
        PARSERS[option](text)
    assert refused.value.message.startswith(f"{option} is ")
    assert "allowed: a JSON list of texts" in refused.value.message
    assert refused.value.hint is not None
    example = refused.value.hint.removeprefix(f"{option} '").removesuffix("'")
    assert PARSERS[option](example)
