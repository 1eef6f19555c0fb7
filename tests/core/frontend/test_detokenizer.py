"""Streamed text is the decoded text, in whole characters, cut at the right stop string."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aphro_core.frontend.detokenizer import Detokenizer, TextRules
from aphro_core.frontend.tokenizer import Tokenizer, open_tokenizer
from aphro_core.request import SamplingParams

shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
texts = st.text(st.sampled_from("abh ello wor1\n23é你好😀👩\u200d🚀\u0301ß"), max_size=30)


def detokenizer(tokenizer: Tokenizer, prompt: list[int] | None = None, **sampling: object) -> Detokenizer:
    return Detokenizer(TextRules.of(tokenizer, prompt or [0], SamplingParams(**sampling)))


def speak(tokenizer: Tokenizer, groups: list[list[int]], **options: object) -> list[str]:
    """What each push returns, then what ``finish`` does."""
    speaker = detokenizer(tokenizer, **options)
    return [*map(speaker.push, groups), speaker.finish()]


@shared
@given(st.lists(st.lists(st.integers(0, 275), max_size=4), max_size=20), st.booleans())
def test_random_bytes_decode_alike(byte_level: Tokenizer, groups: list[list[int]], skip: bool) -> None:
    """Any sequence of bytes, UTF-8 or not, and unknown ids: as the library decodes all of it at once."""
    flat = [token_id for group in groups for token_id in group]
    deltas = speak(byte_level, groups, skip_special_tokens=skip)
    assert "".join(deltas) == byte_level.decode(flat, skip)


@shared
@given(texts, st.integers(1, 4))
def test_characters_come_whole(byte_level: Tokenizer, text: str, size: int) -> None:
    ids = byte_level.encode(text)
    deltas = speak(byte_level, [ids[at : at + size] for at in range(0, len(ids), size)])
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas)


@shared
@given(texts)
def test_sentencepiece_decodes_alike(sentencepiece: Tokenizer, text: str) -> None:
    ids = sentencepiece.encode(text, add_special_tokens=False)
    deltas = speak(sentencepiece, [[token_id] for token_id in ids], prompt=[1])
    assert "".join(deltas) == sentencepiece.decode(ids) == text
    assert not any("\ufffd" in delta for delta in deltas)


@shared
@given(texts.filter(bool), texts)
def test_sentencepiece_goes_on_behind_a_prompt(sentencepiece: Tokenizer, prompt: str, text: str) -> None:
    """The first space of the answer stays: the one that is dropped was the prompt's."""
    ids = sentencepiece.encode(prompt)
    more = sentencepiece.encode(text, add_special_tokens=False)
    deltas = speak(sentencepiece, [[token_id] for token_id in more], prompt=ids)
    assert sentencepiece.decode(ids + more) == prompt + "".join(deltas)


def test_broken_bytes_show_when_they_are_certain(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    for tokenizer, prompt in ((byte_level, [0]), (sentencepiece, sentencepiece.encode("hello"))):
        id_of = {tokenizer.token_bytes(token_id): token_id for token_id in range(270)}
        parts = [b"\xf0", b"\x9f", b"a", b"\xff", b"\xe4", b"\xbd"]
        ids = [[id_of[part]] for part in parts]
        assert speak(tokenizer, ids, prompt=prompt) == ["", "", "\ufffda", "\ufffd", "", "", "\ufffd"]


@shared
@given(st.data(), texts.filter(lambda text: len(text) > 4))
def test_stops_wherever_tokens_are_cut(byte_level: Tokenizer, data: st.DataObject, text: str) -> None:
    start = data.draw(st.integers(0, len(text) - 2))
    stop = text[start : start + data.draw(st.integers(1, 4))]
    include = data.draw(st.booleans())
    ids = byte_level.encode(text)
    size = data.draw(st.integers(1, 5))
    speaker = detokenizer(byte_level, stop=[stop], include_stop_str_in_output=include)
    shown = ""
    for at in range(0, len(ids), size):
        shown += speaker.push(ids[at : at + size])
        assert text.startswith(shown)
        if speaker.stop_string is not None:
            break
    at = text.index(stop)
    assert speaker.stop_string == stop
    assert shown == text[: at + (len(stop) if include else 0)]
    # the token that completed it is the last one: without it the text does not yet have the stop string
    assert stop in byte_level.decode(ids[: speaker.num_tokens])
    assert stop not in byte_level.decode(ids[: speaker.num_tokens - 1])


def test_start_of_a_stop_string_is_held_back(byte_level: Tokenizer) -> None:
    speaker = detokenizer(byte_level, stop=["###", "#!"])
    ids = [byte_level.encode(char) for char in "a##b#"]
    assert [speaker.push(token) for token in ids] == ["a", "", "", "##b", ""]
    assert speaker.finish() == "#"
    assert speaker.stop_string is None


@pytest.mark.parametrize(("min_tokens", "shown"), [(0, ""), (2, "a."), (3, "a."), (4, "a.a."), (9, "a.a.a.a")])
def test_min_tokens_puts_stop_strings_off(byte_level: Tokenizer, min_tokens: int, shown: str) -> None:
    """ "a." ends with token 2, 4 and 6: one that ends within the first min_tokens does not count."""
    speaker = detokenizer(byte_level, stop=["a."], min_tokens=min_tokens)
    text = ""
    for char in "a.a.a.a":
        text += speaker.push(byte_level.encode(char))
        if speaker.stop_string is not None:
            break
    assert text + speaker.finish() == shown


def test_special_tokens_are_hidden_or_shown(byte_level: Tokenizer) -> None:
    ids = [0, *byte_level.encode("hello<工 tool>"), 1]
    assert "".join(speak(byte_level, [ids])) == "hello<工 tool>"
    assert "".join(speak(byte_level, [ids], skip_special_tokens=False)) == "<|start|>hello<工 tool><|end|>"


@shared
@given(st.lists(st.integers(0, 49160), max_size=40))
def test_smollm2_decodes_alike(smollm2: Tokenizer, ids: list[int]) -> None:
    assert "".join(speak(smollm2, [[token_id] for token_id in ids])) == smollm2.decode(ids)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return open_tokenizer(smollm2_gguf)
