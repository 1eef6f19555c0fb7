"""Encoding a long prompt takes a while, and nobody else waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import anyio
import pytest

from aphro_core.errors import RequestError
from aphro_core.server.exchange import BodyReader
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


def test_what_cannot_fit_is_refused_before_it_is_looked_at() -> None:
    encoder = PromptEncoder(FakeFrontend(max_model_len=8))
    for num_tokens, fits in ((7, True), (8, False), (10**6, False)):
        if fits:
            assert encoder.check_prompt([1] * num_tokens, "prompt") == [1] * num_tokens
        else:
            with pytest.raises(RequestError, match=f"prompt has {num_tokens} tokens, allowed: up to 7"):
                encoder.check_prompt([1] * num_tokens, "prompt")
    chat = [{"role": "user", "content": ""}] * 9
    with pytest.raises(RequestError, match="messages has 9 entries"):
        anyio.run(encoder.encode_chat, chat, True, {})
    with pytest.raises(RequestError, match="tokens has 65537 token ids"):
        anyio.run(encoder.decode_text, [1] * 65537, "tokens")


def test_clients_that_leave_do_not_add_up_to_threads() -> None:
    """What they began goes on; what they had not begun does not begin."""
    tokenizer = SlowTokenizer()
    encoder = PromptEncoder(FakeFrontend(tokenizer=tokenizer))

    async def scenario() -> None:
        with anyio.move_on_after(0.1):
            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(encoder.encode, LONG, True, "prompt")
        await anyio.sleep(0.6)

    anyio.run(scenario)
    assert len(tokenizer.threads) <= 4


def test_texts_that_wait_to_be_tokenised_are_few_and_counted() -> None:
    tokenizer = SlowTokenizer()
    reader = BodyReader(max_bytes=200_000, max_unparsed_bytes=300_000)
    with loopback(FakeFrontend(tokenizer=tokenizer), reader=reader, max_queued_requests=1) as server:
        asking = threading.Thread(target=lambda: server.post("/tokenize", {"prompt": LONG}))
        asking.start()
        wait_for(lambda: bool(tokenizer.threads))
        refused = server.post("/tokenize", {"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert refused.headers["retry-after"]
        asking.join()
        assert server.post("/tokenize", {"prompt": "x"}).status_code == 200


def test_a_body_counts_until_it_is_token_ids() -> None:
    tokenizer = SlowTokenizer()
    reader = BodyReader(max_bytes=200_000, max_unparsed_bytes=300_000)
    with loopback(FakeFrontend(tokenizer=tokenizer, max_model_len=400_000), reader=reader) as server:
        body = {"prompt": "x" * 190_000, "max_tokens": 1}
        asking = threading.Thread(target=lambda: server.post("/v1/completions", body))
        asking.start()
        wait_for(lambda: bool(tokenizer.threads))
        assert server.post("/v1/completions", body).status_code == 429
        asking.join()
        assert server.post("/v1/completions", body).status_code == 200
