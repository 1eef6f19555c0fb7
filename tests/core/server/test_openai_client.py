"""The official client against a real server: streamed or whole, both endpoints, log-probabilities, n, usage."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.core.server.fake_frontend import ByteTokenizer, FakeFrontend
from tests.core.server.loopback import Loopback, loopback

TEXT = "Hello, wörld 🙂"  # letters of 1, 2 and 4 bytes, so of as many tokens
NUM_TOKENS = len(TEXT.encode())
HELLO = [{"role": "user", "content": "hi"}]
PROMPT_TOKENS = len(ByteTokenizer().encode_chat(HELLO))


@pytest.fixture(scope="module")
def server() -> Iterator[Loopback]:
    with loopback(FakeFrontend(TEXT, num_cached_tokens=3)) as running:
        yield running


@pytest.fixture
def client(server: Loopback) -> openai.OpenAI:
    server.frontend.requests.clear()
    return server.openai()


def test_chat_whole(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=HELLO, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.message.content for choice in answer.choices] == [TEXT, TEXT]
    assert [choice.message.role for choice in answer.choices] == ["assistant"] * 2
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 2
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "fake"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == PROMPT_TOKENS
    assert answer.usage.completion_tokens == 2 * NUM_TOKENS
    assert answer.usage.total_tokens == PROMPT_TOKENS + 2 * NUM_TOKENS
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_chat_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="fake", messages=HELLO, n=2, stream=True, stream_options={"include_usage": True}
        )
    )
    *pieces, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 2 * NUM_TOKENS
    assert all("usage" in piece.model_fields_set and piece.usage is None for piece in pieces)
    assert len({chunk.id for chunk in chunks}) == 1
    for index in (0, 1):
        own = [piece.choices[0] for piece in pieces if piece.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert all(choice.delta.role is None for choice in own[1:])
        assert "".join(choice.delta.content or "" for choice in own) == TEXT
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["stop"]


def test_stream_without_usage_has_none(client: openai.OpenAI, server: Loopback) -> None:
    raw = server.post("/v1/chat/completions", {"messages": HELLO, "stream": True}).text
    assert "usage" not in raw
    assert raw.endswith("data: [DONE]\n\n")


def test_completion_whole_and_streamed_agree(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="fake", prompt="abc", max_tokens=5)
    chunks = list(client.completions.create(model="fake", prompt="abc", max_tokens=5, stream=True))
    assert whole.choices[0].text == TEXT[:5]
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT[:5]
    assert whole.choices[0].finish_reason == "length"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert whole.id.startswith("cmpl-")
    assert whole.object == chunks[0].object == "text_completion"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (4, 5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_letter_of_several_tokens_comes_whole(client: openai.OpenAI, stream: bool) -> None:
    if stream:
        pieces = [
            c.choices[0].text for c in client.completions.create(model="fake", prompt="x", max_tokens=99, stream=True)
        ]
    else:
        pieces = [client.completions.create(model="fake", prompt="x", max_tokens=99).choices[0].text]
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


def test_batch_numbers_choices_over_prompts_then_n(client: openai.OpenAI, server: Loopback) -> None:
    answer = client.completions.create(model="fake", prompt=["a", "bb"], n=2, echo=True, max_tokens=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == ["aH", "aH", "bbH", "bbH"]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2 + 3
    assert answer.usage.completion_tokens == 4
    assert len({request.request_id for request in server.frontend.requests}) == 2


def test_batch_streamed(client: openai.OpenAI) -> None:
    texts: dict[int, str] = {}
    options = {"prompt": [[97], [98, 98]], "n": 2, "max_tokens": 5, "echo": True}
    for chunk in client.completions.create(model="fake", **options, stream=True):
        texts[chunk.choices[0].index] = texts.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert texts == {0: "a" + TEXT[:5], 1: "a" + TEXT[:5], 2: "bb" + TEXT[:5], 3: "bb" + TEXT[:5]}


@pytest.mark.parametrize("prompt", ["hi", [104, 105]], ids=["text", "ids"])
def test_prompt_kinds_reach_the_engine_as_ids(client: openai.OpenAI, server: Loopback, prompt: str | list[int]) -> None:
    client.completions.create(model="fake", prompt=prompt, max_tokens=1)
    (request,) = server.frontend.requests
    assert list(request.prompt_token_ids) == ([256, 104, 105] if prompt == "hi" else prompt)


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=HELLO, logprobs=True, top_logprobs=3, max_tokens=2)
    assert answer.choices[0].logprobs is not None
    first, second = answer.choices[0].logprobs.content or []
    assert (first.token, first.bytes, first.logprob) == ("H", [72], -2.0)
    assert second.token == "e"
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("I", -1.0), ("H", -2.0), ("J", -3.0)]


def test_chat_logprobs_when_the_drawn_token_is_not_among_the_top(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=HELLO, logprobs=True, top_logprobs=1, max_tokens=1)
    assert answer.choices[0].logprobs is not None
    (only,) = answer.choices[0].logprobs.content or []
    assert (only.token, [top.token for top in only.top_logprobs]) == ("H", ["I"])


def test_chat_logprobs_without_top(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=HELLO, logprobs=True, max_tokens=1)
    assert answer.choices[0].logprobs is not None
    (only,) = answer.choices[0].logprobs.content or []
    assert only.top_logprobs == []


def test_completion_logprobs_streamed_equal_whole(client: openai.OpenAI) -> None:
    options = {"model": "fake", "prompt": "ab", "max_tokens": 4, "logprobs": 1, "echo": True}
    whole = client.completions.create(**options).choices[0].logprobs
    assert whole is not None
    assert whole.tokens == ["<s>", "a", "b", "H", "e", "l", "l"]
    assert whole.token_logprobs == [None, -2.0, -2.0, -2.0, -2.0, -2.0, -2.0]
    assert whole.text_offset == [0, 3, 4, 5, 6, 7, 8]
    assert whole.top_logprobs is not None
    assert whole.top_logprobs[0] is None
    assert whole.top_logprobs[3] == {"H": -2.0, "I": -1.0}
    joined: dict[str, list[object]] = {"tokens": [], "token_logprobs": [], "text_offset": [], "top_logprobs": []}
    for chunk in client.completions.create(**options, stream=True):
        part = chunk.choices[0].logprobs
        assert part is not None
        joined = {name: values + getattr(part, name) for name, values in joined.items()}
    assert joined == {name: getattr(whole, name) for name in joined}


def test_scoring_a_prompt_shows_and_counts_no_output(client: openai.OpenAI, server: Loopback) -> None:
    answer = client.completions.create(model="fake", prompt="ab", max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].text == "ab"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == ["<s>", "a", "b"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    assert server.frontend.requests[0].sampling.max_tokens == 1


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError, match="'other' is not served here, allowed: 'fake'"):
        client.models.retrieve("other")


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="fake", messages=HELLO, temperature=-1)
    assert wrong.value.param == "temperature"
    assert "temperature is -1" in wrong.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=HELLO)
    assert missing.value.code == "model_not_found"


def test_an_error_in_a_stream_is_raised_by_the_client() -> None:
    frontend = FakeFrontend(hold=3, dies=RuntimeError("/root/secret-path"))
    with loopback(frontend) as server:
        stream = server.openai().chat.completions.create(model="fake", messages=HELLO, stream=True)
        pieces: list[str] = []
        with pytest.raises(openai.APIError, match="internal error") as raised:  # noqa: PT012
            for chunk in stream:
                pieces.append(chunk.choices[0].delta.content or "")
    assert "".join(pieces) == TEXT[:3]
    assert "secret" not in str(raised.value)


def test_without_a_tokenizer_ids_go_in_and_come_out() -> None:
    with loopback(FakeFrontend(tokenizer=None)) as server:
        body = {"prompt": [1, 2], "max_tokens": 2, "return_token_ids": True, "logprobs": 0}
        choice = server.post("/v1/completions", body).json()["choices"][0]
        assert choice["token_ids"] == [72, 101]
        assert choice["prompt_token_ids"] == [1, 2]
        assert choice["logprobs"]["token_logprobs"] == [-2.0, -2.0]
        refused = server.post("/v1/completions", {"prompt": "text"})
        assert refused.status_code == 400
        assert "needs a tokenizer" in refused.json()["error"]["message"]
        assert server.post("/v1/chat/completions", {"messages": HELLO}).json()["error"]["param"] == "messages"


def test_tokens_there_and_back(server: Loopback) -> None:
    for prefix in ("", "/v1"):
        answer = server.post(f"{prefix}/tokenize", {"prompt": "hé", "return_token_strs": True}).json()
        assert answer["tokens"] == [256, 104, 195, 169]
        assert (answer["count"], answer["max_model_len"]) == (4, 4096)
        assert answer["token_strs"][1] == "h"
        assert server.post(f"{prefix}/detokenize", {"tokens": [104, 195, 169]}).json() == {"prompt": "hé"}
    chat = server.post("/v1/tokenize", {"messages": HELLO, "add_generation_prompt": False}).json()
    assert bytes(chat["tokens"][1:]).decode() == "<user>hi"
    wrong = server.post("/v1/detokenize", {"tokens": [104, 260]}).json()["error"]
    assert (wrong["param"], wrong["message"]) == ("tokens", "tokens has the token id 260, allowed: 0 to 259")
