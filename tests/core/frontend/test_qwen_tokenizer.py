"""qwen.tiktoken as tiktoken reads it: merges by rank within the published pattern's pieces, special tokens behind."""

from __future__ import annotations

import base64
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from aphro_core.errors import ModelError
from aphro_core.frontend.qwen_tokenizer import _PATTERN, FILE_NAME
from aphro_core.frontend.tokenizer import Tokenizer, open_tokenizer

MERGED = [b"he", b"ll", b"hell", b"hello", b" w", b"or", b" wor", b" world", b"\xc3\xa9", b"ab", b"bc", b"abc", b"\n\n"]
TOKENS = [*(bytes([byte]) for byte in range(256)), *MERGED]


def write_vocabulary(folder: Path, tokens: list[bytes] = TOKENS) -> None:
    lines = [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    (folder / FILE_NAME).write_bytes(b"\n".join(lines) + b"\n")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("qwen")
    write_vocabulary(folder)
    return open_tokenizer(folder)


def by_rank(text: str) -> list[int]:
    """Byte pair encoding as tiktoken does it: of all neighbours the pair with the lowest rank, the leftmost first."""
    ranks = {token: rank for rank, token in enumerate(TOKENS)}
    split = pre_tokenizers.Split(Regex(_PATTERN), "isolated")
    ids = []
    for piece, _ in split.pre_tokenize_str(unicodedata.normalize("NFC", text)):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            joined = [(ranks[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
            if not joined:
                break
            _, at = min(joined)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("helo wrdabc é\n1'sS你😀"), max_size=24))
def test_ids_are_those_of_merging_by_rank_and_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == by_rank(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_special_tokens_follow_the_ranks(tokenizer: Tokenizer) -> None:
    first = len(TOKENS)
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|><|extra_0|>") == [
        first,
        first + 1,
        first + 2,
        first + 3,
    ]
    assert tokenizer.vocab_size == first + 208
    assert list(tokenizer.eos_token_ids) == [first, first + 2]


def test_a_chat_is_chatml(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"aGk= 0\n", "incomplete"),
        (b"not base64! 0\n", "cannot be read"),
        (b"aGk= zero\n", "cannot be read"),
        (b"aGk=\n", "cannot be read"),
    ],
)
def test_a_damaged_file_is_named(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(ModelError, match=f"{FILE_NAME}.*{problem}"):
        open_tokenizer(tmp_path)
