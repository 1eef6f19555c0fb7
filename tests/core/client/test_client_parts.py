"""The client's pure parts: addresses, event streams in any pieces, chunks, refusals, conversations."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphro_core.client.address import parse_base_url
from aphro_core.client.answers import choose_model, parse_models, parse_piece, refusal
from aphro_core.client.conversation import Conversation, Sampling, chat_body
from aphro_core.client.sse import EventReader
from aphro_core.errors import ExitCode, ServerError, UsageError


@pytest.mark.parametrize(
    ("typed", "base"),
    [
        ("node1", "http://node1:2242"),
        ("node1:8000", "http://node1:8000"),
        (":8000", "http://127.0.0.1:8000"),
        ("[::1]:8000/", "http://[::1]:8000"),
        ("http://127.0.0.1:2242/v1/", "http://127.0.0.1:2242"),
        ("https://example.org/models/v1", "https://example.org/models"),
        (" https://example.org ", "https://example.org"),
    ],
)
def test_addresses(typed: str, base: str) -> None:
    assert parse_base_url(typed) == base
    assert parse_base_url(base) == base


@pytest.mark.parametrize(
    "typed", ["", "ftp://x", "http://", "http://x:port", "x:99999", "http://u:p@x", "http://x?a=1"]
)
def test_no_addresses(typed: str) -> None:
    with pytest.raises(UsageError, match="not the address of a server") as refused:
        parse_base_url(typed)
    assert refused.value.hint


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:stop] for start, stop in pairwise(places)]


@given(
    events=st.lists(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n\x00")), min_size=1, max_size=3),
        max_size=5,
    ),
    line_end=st.sampled_from([b"\n", b"\r\n"]),
    comment=st.booleans(),
    cuts=st.lists(st.integers(0, 10_000), max_size=12),
)
def test_events_survive_any_cut(events: list[list[str]], line_end: bytes, comment: bool, cuts: list[int]) -> None:
    wire = b""
    for lines in events:
        wire += b": waiting" + line_end + line_end if comment else b""
        wire += b"event: x" + line_end
        wire += b"".join(b"data: " + line.encode() + line_end for line in lines) + line_end
    reader = EventReader()
    found = [event for piece in split(wire, cuts) for event in reader.feed(piece)]
    assert found == ["\n".join(lines).encode() for lines in events]


def test_an_event_without_its_blank_line_is_not_one() -> None:
    reader = EventReader()
    assert reader.feed(b"data: [DONE]\n") == []
    assert reader.feed(b"\n") == [b"[DONE]"]


def test_pieces() -> None:
    chat = parse_piece(b'{"choices":[{"index":0,"delta":{"content":"Hi","role":"assistant"},"finish_reason":null}]}')
    assert (chat.text, chat.finish_reason) == ("Hi", None)
    assert parse_piece(b'{"choices":[{"text":"there","finish_reason":"stop"}]}').finish_reason == "stop"
    assert parse_piece(b'{"choices":[{"delta":{"reasoning_content":"hm"}}]}').thinking == "hm"
    usage = parse_piece(b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}')
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 4)


@pytest.mark.parametrize("data", [b"<html>", b"[]", b'{"choices":{}}', b'{"error":{"message":"the engine died"}}'])
def test_pieces_that_are_none(data: bytes) -> None:
    with pytest.raises(ServerError) as broken:
        parse_piece(data)
    assert broken.value.exit_code is ExitCode.SERVER
    assert b"died" not in data or "the engine died" in broken.value.message


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error":{"message":"no such key"}}', "no such key"),
        (b'{"object":"error","message":"no such key"}', "no such key"),
        (b'{"detail":"no such key"}', "no such key"),
        (b"<h1>no\nsuch   key</h1>", "<h1>no such key</h1>"),
        (b"", "nothing"),
    ],
)
def test_refusals_say_what_the_server_says(body: bytes, said: str) -> None:
    error = refusal(401, body, "http://x/v1/models")
    assert error.message == f"http://x/v1/models was answered 401: {said}"
    assert "APHRO_API_KEY" in (error.hint or "")


def test_models() -> None:
    assert parse_models(b'{"data":[{"id":"a"},{"id":"b"}]}') == ["a", "b"]
    with pytest.raises(ServerError, match="/v1/models answers"):
        parse_models(b'{"models":[]}')
    assert choose_model(None, ["a"]) == "a"
    assert choose_model("c", ["a", "b"]) == "c"
    for served in ([], ["a", "b"]):
        with pytest.raises(UsageError, match=f"has {len(served)} models"):
            choose_model(None, served)


@given(st.lists(st.tuples(st.text(min_size=1), st.text())))
def test_a_conversation_alternates(exchanges: list[tuple[str, str]]) -> None:
    """Whatever was answered, also with nothing: no two questions in a row, and undo is the inverse of an exchange."""
    conversation = Conversation("be brief")
    for question, answer in exchanges:
        before = conversation.messages
        conversation.ask(question)
        conversation.answer(answer)
        if answer:
            after = conversation.messages
            assert conversation.undo()
            assert conversation.messages == before
            conversation.turns = [dict(message) for message in after[1:]]
        else:
            assert conversation.messages == before
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", *["user", "assistant"] * conversation.num_exchanges]


def test_a_body_has_only_what_was_asked_for() -> None:
    body = chat_body("m", [{"role": "user", "content": "x"}], Sampling(temperature=0.0))
    assert set(body) == {"model", "messages", "stream", "stream_options", "temperature"}
    assert json.loads(json.dumps(body)) == body
