"""Encoding a long prompt takes a while, and nobody else waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import anyio
import pytest

from aphro_core.errors import RequestError
from aphro_core.server.prompts import PromptEncoder
from tests.core.server.fake_frontend import ByteTokenizer, FakeFrontend
from tests.core.server.loopback import loopback, wait_for

LONG = "x" * 2001


class SlowTokenizer(ByteTokenizer):
    """Takes its time, and says in which threads it was called."""

    def __init__(self) -> None:
        self.threads: list[str] = []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.threads.append(threading.current_thread().name)
        if len(text) > 2000:
            time.sleep(0.5)
        return super().encode(text, add_special_tokens)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], /, add_generation_prompt: bool = True, **template_args: Any
    ) -> list[int]:
        return super().encode_chat(messages, add_generation_prompt, **template_args)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": LONG, "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}], "max_tokens": 1}),
        ("/tokenize", {"prompt": LONG}),
    ],
    ids=["completion", "chat", "tokenize"],
)
def test_others_are_answered_meanwhile(path: str, body: dict[str, Any]) -> None:
    tokenizer = SlowTokenizer()
    with loopback(FakeFrontend(tokenizer=tokenizer)) as server:
        answers: list[int] = []
        asking = threading.Thread(target=lambda: answers.append(server.post(path, body).status_code))
        asking.start()
        wait_for(lambda: bool(tokenizer.threads))
        start = time.monotonic()
        assert server.get("/livez").status_code == 200
        assert time.monotonic() - start < 0.4
        asking.join()
        assert answers == [200]


def test_a_short_text_is_encoded_where_it_is() -> None:
    tokenizer = SlowTokenizer()
    encoder = PromptEncoder(FakeFrontend(tokenizer=tokenizer))
    anyio.run(encoder.encode, "x" * 2000, True, "prompt")
    assert tokenizer.threads == [threading.current_thread().name]


def test_a_client_that_leaves_is_not_waited_for() -> None:
    tokenizer = SlowTokenizer()
    encoder = PromptEncoder(FakeFrontend(tokenizer=tokenizer))

    async def scenario() -> float:
        start = anyio.current_time()
        with anyio.move_on_after(0.05):
            await encoder.encode(LONG, True, "prompt")
        return anyio.current_time() - start

    assert anyio.run(scenario) < 0.4


def test_a_text_that_cannot_fit_is_refused_before_it_is_tried() -> None:
    tokenizer = SlowTokenizer()
    encoder = PromptEncoder(FakeFrontend(tokenizer=tokenizer, max_model_len=8))
    with pytest.raises(RequestError, match="prompt has 5000 characters, allowed: 8 tokens"):
        anyio.run(encoder.encode, "x" * 5000, True, "prompt")
    assert tokenizer.threads == []
