"""Requests that take too long: to their first token, and in all."""

from __future__ import annotations

import time

import pytest

from tests.core.server.fake_frontend import FakeFrontend
from tests.core.server.loopback import loopback

BODY = {"prompt": [1, 2], "max_tokens": 5}


@pytest.mark.parametrize("stream", [False, True])
def test_one_that_gets_no_token_in_time_is_told_so(stream: bool) -> None:
    with loopback(FakeFrontend(hold=0), queue_timeout_seconds=0.3) as server:
        began = time.monotonic()
        answer = server.post("/v1/completions", {**BODY, "stream": stream})
        assert time.monotonic() - began < 2.0
        if stream:
            assert "has waited 0.3 s for its first token" in answer.text
        else:
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "5"


def test_one_that_does_not_end_in_time_is_told_so() -> None:
    with loopback(FakeFrontend(hold=2), request_timeout_seconds=0.3) as server:
        answer = server.post("/v1/completions", BODY)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "request_timeout"
