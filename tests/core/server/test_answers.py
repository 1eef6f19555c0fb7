"""Corners of the answers' JSON: what a number cannot say, letters that look alike, choices out of step."""

from __future__ import annotations

from typing import Any

import anyio
import msgspec
import pytest

from aphro_core.errors import OverloadedError
from aphro_core.request import Logprob, OutputDelta, PositionLogprobs, Request, SamplingParams
from aphro_core.server.answers import Answer, ChatAnswer, CompletionAnswer
from aphro_core.server.openai import Generation
from tests.core.server.fake_frontend import ByteTokenizer

ANSWERS: list[type[Answer]] = [CompletionAnswer, ChatAnswer]


def generation(n: int = 1, prompts: int = 1, **fields: Any) -> Generation:
    requests = [Request(f"r{index}", [97, 98], SamplingParams(n=n), "ab") for index in range(prompts)]
    return Generation(**{"id": "cmpl-1", "stream": False, "include_usage": False, "num_logprobs": None, **fields},
                      requests=requests)  # fmt: skip


def whole(answer: Answer) -> Any:
    return msgspec.json.decode(anyio.run(answer.whole))


def delta(position: PositionLogprobs, **fields: Any) -> OutputDelta:
    return OutputDelta(index=0, text="x", token_ids=[next(iter(position))], logprobs=[position], **fields)


def test_minus_infinity_is_a_number() -> None:
    position = {120: Logprob(-float("inf"), 9, "x"), 121: Logprob(-1.0, 1, "y")}
    completion = CompletionAnswer(generation(num_logprobs=1), "m", ByteTokenizer())
    completion.add(0, delta(position))
    logprobs = whole(completion)["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-9999.0]
    assert logprobs["top_logprobs"] == [{"x": -9999.0, "y": -1.0}]
    chat = ChatAnswer(generation(num_logprobs=1), "m", ByteTokenizer())
    chat.add(0, delta(position))
    assert whole(chat)["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


def test_of_two_tokens_that_read_alike_the_likelier_one_counts() -> None:
    position = {200: Logprob(-5.0, 3, "\ufffd"), 201: Logprob(-1.0, 1, "\ufffd"), 202: Logprob(-2.0, 2, "\ufffd")}
    answer = CompletionAnswer(generation(num_logprobs=2), "m", ByteTokenizer())
    answer.add(0, delta(position))
    assert whole(answer)["choices"][0]["logprobs"]["top_logprobs"] == [{"\ufffd": -1.0}]


def test_chat_bytes_are_those_of_the_token_not_of_its_text() -> None:
    answer = ChatAnswer(generation(num_logprobs=0), "m", ByteTokenizer())
    answer.add(0, delta({195: Logprob(-1.0, 1, "\ufffd")}))
    assert whole(answer)["choices"][0]["logprobs"]["content"][0]["bytes"] == [195]


def test_tokens_as_ids() -> None:
    answer = CompletionAnswer(generation(num_logprobs=0, tokens_as_ids=True), "m", ByteTokenizer())
    answer.add(0, delta({120: Logprob(-1.0, 1, "x")}))
    logprobs = whole(answer)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:120"]
    assert logprobs["top_logprobs"] == [{"token_id:120": -1.0}]


@pytest.mark.parametrize("kind", ANSWERS)
def test_no_logprobs_is_null(kind: type[Answer]) -> None:
    answer = kind(generation(), "m", ByteTokenizer())
    answer.add(0, OutputDelta(0, "x", [120]))
    assert whole(answer)["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("kind", ANSWERS)
def test_choices_that_end_at_different_times_keep_their_own(kind: type[Answer]) -> None:
    answer = kind(generation(n=2, prompts=2), "m", ByteTokenizer())
    came = [(1, 1, "d", "length"), (0, 0, "a", None), (1, 0, "c", "stop"), (0, 0, "A", "stop"), (0, 1, "b", "stop")]
    for prompt, index, text, reason in came:
        answer.add(prompt, OutputDelta(index, text, [1], finish_reason=reason, num_cached_tokens=prompt))
    answered = whole(answer)
    texts = [choice["text"] if "text" in choice else choice["message"]["content"] for choice in answered["choices"]]
    assert texts == ["aA", "b", "c", "d"]
    assert [choice["finish_reason"] for choice in answered["choices"]] == ["stop", "stop", "stop", "length"]
    assert answered["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 5,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_what_ended_a_choice_is_said_in_both_forms() -> None:
    stopped = OutputDelta(0, "x", [120], finish_reason="stop", stop_reason="END")
    answer = ChatAnswer(generation(), "m", ByteTokenizer())
    assert msgspec.json.decode(answer.chunk(0, stopped))["choices"][0]["stop_reason"] == "END"
    answer = ChatAnswer(generation(), "m", ByteTokenizer())
    answer.add(0, stopped)
    assert whole(answer)["choices"][0]["stop_reason"] == "END"


@pytest.mark.parametrize("kind", ANSWERS)
def test_an_aborted_choice_is_an_error_not_an_answer(kind: type[Answer]) -> None:
    answer = kind(generation(), "m", ByteTokenizer())
    with pytest.raises(OverloadedError):
        answer.add(0, OutputDelta(0, "", [], finish_reason="abort"))
    with pytest.raises(OverloadedError):
        answer.chunk(0, OutputDelta(0, "", [], finish_reason="abort"))


@pytest.mark.parametrize("kind", ANSWERS)
def test_others_run_while_a_long_answer_is_written(kind: type[Answer]) -> None:
    answer = kind(generation(num_logprobs=2), "m", ByteTokenizer())
    position = {120: Logprob(-1.0, 1, "x"), 121: Logprob(-2.0, 2, "y")}
    for _ in range(1000):
        answer.add(0, delta(position))
    num_turns = 0

    async def count() -> None:
        nonlocal num_turns
        while True:
            num_turns += 1
            await anyio.lowlevel.checkpoint()

    async def scenario() -> bytes:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count)
            data = await answer.whole()
            tasks.cancel_scope.cancel()
        return data

    logprobs = msgspec.json.decode(anyio.run(scenario))["choices"][0]["logprobs"]
    assert num_turns >= 10
    assert len(logprobs["content" if kind is ChatAnswer else "tokens"]) == 1000


def test_a_chunk_that_tells_of_the_prompt_is_the_same_in_turns() -> None:
    chunks = []
    for is_long in (False, True):
        answer = CompletionAnswer(generation(num_logprobs=1, echo=True), "m", ByteTokenizer())
        first = delta({120: Logprob(-1.0, 1, "x")}, prompt_logprobs=[None, {98: Logprob(-2.0, 1, "b")}])
        data = anyio.run(answer.long_chunk, 0, first) if is_long else answer.chunk(0, first)
        chunks.append({**msgspec.json.decode(data), "created": 0})
    assert chunks[0] == chunks[1]
    assert chunks[0]["choices"][0]["logprobs"]["tokens"] == ["a", "b", "x"]
