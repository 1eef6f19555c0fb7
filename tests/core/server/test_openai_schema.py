"""Every wrong body is refused by name, every known field arrives, and nothing that a client sends is a server error."""

from __future__ import annotations

import logging
import time
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aphro_core.errors import RequestError
from aphro_core.server.openai import Generation, chat_of, completion_of
from aphro_core.server.prompts import PromptEncoder
from aphro_core.server.refusals import HttpError
from aphro_core.server.schema import BodyParser, ChatBody, CompletionBody
from aphro_core.server.unsupported import IGNORED, REFUSED
from tests.core.server.fake_frontend import FakeFrontend

HELLO = [{"role": "user", "content": "hi"}]


def completion(data: bytes) -> Generation:
    body = BodyParser().parse(data, CompletionBody)
    frontend = FakeFrontend()

    async def convert() -> Generation:
        return await completion_of(body, frontend, PromptEncoder(frontend), "salt")

    return anyio.run(convert)


def chat(data: bytes) -> Generation:
    body = BodyParser().parse(data, ChatBody)
    frontend = FakeFrontend()

    async def convert() -> Generation:
        return await chat_of(body, frontend, PromptEncoder(frontend), "salt")

    return anyio.run(convert)


def completion_with(**fields: Any) -> Generation:
    return completion(msgspec.json.encode({"prompt": "x", **fields}))


def chat_with(**fields: Any) -> Generation:
    return chat(msgspec.json.encode({"messages": HELLO, **fields}))


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temperature": "hot"}, "temperature", "temperature: expected float or null, got str"),
        ({"temperature": 101}, "temperature", "temperature is 101.0, allowed: 0.0 to 100.0"),
        ({"top_p": 0}, "top_p", "top_p is 0.0, allowed: more than 0, up to 1"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0, allowed: 1 and up"),
        ({"max_tokens": True}, "max_tokens", "max_tokens: expected int or null, got bool"),
        ({"max_tokens": 10**30}, "max_tokens", "max_tokens: expected int <= 9223372036854775807"),
        ({"n": 0}, "n", "n is 0, allowed: 1 to 128"),
        ({"stop": ["a"] * 65}, "stop", "stop has 65 entries, allowed: up to 64"),
        ({"stop": [1]}, "stop[0]", "stop[0]: expected str, got int"),
        ({"logprobs": 21}, "logprobs", "logprobs is 21, allowed: 0 to 20"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "logit_bias has the key 'a', allowed: token ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "logit_bias has 1: 101.0"),
        ({"logit_bias": [1]}, "logit_bias", "logit_bias: expected object or null, got array"),
        ({"best_of": 3, "n": 2}, "best_of", "best_of is 3, allowed: the same as n (2)"),
        ({"suffix": "end"}, "suffix", "suffix is not supported by this server, leave it out"),
        ({"prompt": []}, "prompt", "prompt is an empty or a mixed list"),
        ({"prompt": ["a", 1]}, "prompt", "prompt is an empty or a mixed list"),
        ({"prompt": [[1], [2, "x"]]}, "prompt[1][1]", "prompt[1][1]: expected int, got str"),
        ({"prompt": [5, 260]}, "prompt", "prompt has the token id 260, allowed: 0 to 259"),
        ({"prompt": [[5], [-1]]}, "prompt[1]", "prompt[1] has the token id -1, allowed: 0 to 259"),
        ({"prompt": ["a"] * 1025}, "prompt", "1025 prompts of 1 choices each, allowed: up to 1024 choices"),
        ({"prompt": ["a"] * 9, "n": 128}, "prompt", "9 prompts of 128 choices each"),
        ({"prompt": "x" * (512 * 4096 + 1)}, "prompt", "prompt has 2097153 characters, allowed: 4096 tokens"),
        ({"stream_options": {}}, "stream_options", "allowed: only with stream: true"),
        ({"stream": "yes"}, "stream", "stream: expected bool or null, got str"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:20],
)
def test_a_wrong_completion_is_named(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        completion_with(**fields)
    assert refused.value.field == param
    assert message in refused.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [*HELLO, {"role": "assistant"}]}, "messages[1].content"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"__class__": 1}}, "chat_template_kwargs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"echo": True}, "echo"),
    ],
)
def test_a_wrong_chat_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        chat_with(**fields)
    assert refused.value.field == param
    assert refused.value.message.startswith(param)


@pytest.mark.parametrize("name", sorted(set(REFUSED) - {"echo", "add_special_tokens"}))
def test_what_would_change_the_answer_is_refused_what_asks_for_nothing_is_not(name: str) -> None:
    for harmless in REFUSED[name]:
        assert completion_with(**{name: harmless}).requests
        assert chat_with(**{name: harmless}).requests
    for make in (completion_with, chat_with):
        with pytest.raises(RequestError, match=f"^{name} is not supported"):
            make(**{name: {"meaningful": 1}})


@pytest.mark.parametrize(
    ("fields", "plain"),
    [
        ({"max_tokens": 3.0, "top_k": 40.0, "n": 2.0}, {"max_tokens": 3, "top_k": 40, "n": 2}),
        ({"logprobs": False}, {}),
        ({"seed": -1}, {}),
        ({"seed": -1.0}, {}),
    ],
)
def test_the_same_in_the_words_of_other_clients(fields: dict[str, Any], plain: dict[str, Any]) -> None:
    """Whole numbers of languages without integers, and what means nothing."""
    (request,), (expected,) = completion_with(**fields).requests, completion_with(**plain).requests
    assert request.sampling == expected.sampling


@pytest.mark.parametrize("fields", [{"max_tokens": 2.5}, {"logprobs": True}, {"seed": -2}, {"n": 1e40}])
def test_what_is_not_the_same_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        completion_with(**fields)


def test_a_byte_order_mark_is_no_part_of_the_body() -> None:
    assert completion(b'\xef\xbb\xbf{"prompt": "x"}').requests


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_what_cannot_change_the_answer_is_ignored(name: str) -> None:
    assert chat_with(**{name: "anything"}).requests


def test_an_unknown_field_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    parser = BodyParser()
    with caplog.at_level(logging.DEBUG, "aphro_core.server.schema"):
        for _ in range(3):
            parser.parse(b'{"prompt": "x", "tempreature": 1}', CompletionBody)
    assert [record.getMessage() for record in caplog.records] == ["ignoring the unknown field 'tempreature'"]


def test_every_sampling_field_arrives() -> None:
    fields = {
        "n": 3,
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 5,
        "min_p": 0.125,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
        "seed": 2**63 - 1,
        "stop": ["a", "b"],
        "stop_token_ids": [1, 2],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    bias = {"logit_bias": {"5": -1.5}}
    for make in (completion_with, chat_with):
        sampling = make(**fields, **bias).requests[0].sampling
        arrived = {name: getattr(sampling, name) for name in fields}
        assert arrived == {**fields, "stop": ("a", "b"), "stop_token_ids": (1, 2)}
        assert dict(sampling.logit_bias) == {5: -1.5}


def test_null_is_the_default() -> None:
    names = [name for name in CompletionBody.__struct_fields__ if name != "prompt"]
    given = completion_with(**dict.fromkeys(names)).requests[0].sampling
    assert given == completion_with().requests[0].sampling
    assert given.max_tokens == 16


def test_a_chat_may_fill_the_context() -> None:
    assert chat_with().requests[0].sampling.max_tokens is None
    assert chat_with(max_tokens=5, max_completion_tokens=9).requests[0].sampling.max_tokens == 9


def test_messages_reach_the_template_as_text() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    generation = chat_with(messages=messages, chat_template_kwargs={"enable_thinking": False})
    text = bytes(generation.requests[0].prompt_token_ids[1:]).decode()
    assert text == "<system>be brief<user>a\nb[enable_thinking=False]<assistant>"


def test_the_model_may_be_left_out_but_not_be_another() -> None:
    assert completion_with(model="fake").requests
    with pytest.raises(HttpError) as refused:
        completion_with(model="other")
    assert (refused.value.status, refused.value.code, refused.value.param) == (404, "model_not_found", "model")


def test_cache_salt_narrows_what_the_key_shares() -> None:
    assert completion_with().requests[0].cache_salt == "salt"
    assert completion_with(cache_salt="mine").requests[0].cache_salt == "salt:mine"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"{} {}",
        b"\xff",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}',
        b'{"prompt": 1e999}',
        b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"x": ' * 50_000 + b"1" + b"}" * 50_000,
    ],
    ids=lambda data: repr(data[:24]),
)
def test_a_body_that_is_no_request_is_refused(data: bytes) -> None:
    for make in (completion, chat):
        with pytest.raises(RequestError):
            make(data)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from(sorted({*CompletionBody.__struct_fields__, *ChatBody.__struct_fields__, *REFUSED} - {"model"}))


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_nothing_a_client_sends_is_a_server_error(fields: dict[str, Any]) -> None:
    """A generation, or a RequestError: nothing else comes out."""
    for make, base in ((completion, {"prompt": "x"}), (chat, {"messages": HELLO})):
        try:
            generation = make(msgspec.json.encode({**base, **fields}))
        except RequestError:
            continue
        assert generation.requests


MANY = 500_000


@pytest.mark.parametrize(
    "fields",
    [
        b'"logit_bias": {%s}' % b",".join(b'"%d": 1.0' % n for n in range(MANY)),
        b'"stop": [%s]' % b",".join([b'"a"'] * MANY),
        b'"stop_token_ids": [%s]' % b",".join([b"1"] * MANY),
        b'"tools": [%s]' % b",".join([b"{}"] * MANY),
        b",".join(b'"f%d": 1' % n for n in range(MANY)),
    ],
    ids=lambda fields: fields[:12].decode(),
)
def test_a_field_with_far_too_many_entries_is_refused_before_they_are_made(fields: bytes) -> None:
    began = time.process_time()
    with pytest.raises(RequestError):
        completion(b'{"prompt": "x", ' + fields + b"}")
    assert time.process_time() - began < 1.0, "every other client waits meanwhile"


@pytest.mark.parametrize(
    ("head", "value", "tail"),
    [
        (b'{"prompt":[', b"1,", b"1]}"),
        (b'{"prompt":[', b"[],", b"[]]}"),
        (b'{"prompt":[', b"[1],", b"[1]]}"),
        (b'{"prompt":[', b'"a",', b'"a"]}'),
        (b'{"messages":[', b'{"role":"user","content":""},', b"{}]}"),
        (b'{"messages":[{"role":"user","content":"a","tool_calls":[', b"{},", b"{}]}]}"),
        (b'{"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"a":[', b"[],", b"[]]}}"),
        (b'{"a":0', b',"a":[]', b"}"),
    ],
)
def test_a_body_of_millions_of_values_holds_nobody_up(head: bytes, value: bytes, tail: bytes) -> None:
    data = head + value * (31 * 2**20 // len(value)) + tail
    began = time.process_time()
    with pytest.raises(RequestError, match="the body has more than"):
        BodyParser().parse(data, ChatBody if b"messages" in data[:20] else CompletionBody)
    assert time.process_time() - began < 0.2


def test_the_longest_prompts_of_ids_and_texts_with_many_signs_pass() -> None:
    ids = BodyParser().parse(b'{"prompt":[' + b"1," * (2**20 - 1) + b"1]}", CompletionBody)
    assert len(ids.prompt) == 2**20
    BodyParser().parse(msgspec.json.encode({"prompt": "f(a, b)[0] = {x: 1};\n" * 100_000}), CompletionBody)


def test_variables_of_a_template_are_few_bytes() -> None:
    with pytest.raises(RequestError, match="chat_template_kwargs takes more than 65536 bytes"):
        chat_with(chat_template_kwargs={"a": "x" * 65536})
