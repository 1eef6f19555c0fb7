"""Tokenizers of GGUF files and folders: the ids that others give, chats, and errors that say what to do."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from aphro_core.errors import ModelError, RequestError
from aphro_core.frontend.gguf_tokenizer import PRE_TOKENIZERS, read_gguf_tokenizer
from aphro_core.frontend.tokenizer import Tokenizer, open_tokenizer
from tests.core.frontend.vocabularies import (
    CHATML,
    byte_level_metadata,
    open_with,
    sentencepiece_metadata,
    write_gguf,
)

HELLO = [{"role": "user", "content": "hello"}]
shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return open_tokenizer(smollm2_gguf)


# --- ids ---


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world 1234\n", [19556, 905, 216, 33, 34, 35, 36, 198]),
        (
            "I'm  naïve: 你好 😀\r\n\tdef f(x):",
            [
                57,
                5248,
                216,
                15486,
                46494,
                42,
                216,
                18645,
                250,
                48392,
                138,
                40303,
                218,
                2738,
                197,
                1604,
                275,
                24,
                104,
                727,
            ],
        ),
        ("<|im_start|>user\nhi<|im_end|>", [1, 4093, 198, 6004, 2]),
        ("", []),
    ],
)
def test_smollm2_has_the_ids_of_llama_cpp(smollm2: Tokenizer, text: str, ids: list[int]) -> None:
    assert smollm2.encode(text) == ids
    assert smollm2.decode(ids, skip_special_tokens=False) == text


def test_smollm2_chats(smollm2: Tokenizer) -> None:
    ids = smollm2.encode_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert smollm2.decode(ids, skip_special_tokens=False) == text
    assert ids == smollm2.encode(text)
    assert smollm2.eos_token_ids == (2,)
    assert smollm2.vocab_size == 49152


WORDS = {
    "default": ["I", "'", "Ll", " pay", "  ", "$", "123", "4", ",", " ABCdef", "\n\n", " x"],
    "gpt-2": ["I", "'", "Ll", " pay", " ", " $", "1234", ",", " ABCdef", "\n\n", " x"],
    "smollm": ["I", "'", "Ll", " pay", " ", " $", "1", "2", "3", "4", ",", " ABCdef", "\n\n", " x"],
    "llama-bpe": ["I", "'Ll", " pay", " ", " $", "123", "4", ",", " ABCdef", "\n\n", " x"],
    "qwen2": ["I", "'Ll", " pay", " ", " $", "1", "2", "3", "4", ",", " ABCdef", "\n\n", " x"],
    "tekken": ["I", "'Ll", " pay", " ", " $", "1", "2", "3", "4", ",", " ABCdef", "\n\n", " x"],
    "deepseek-coder": ["I", "'", "Ll", " pay", "  $", "1", "2", "3", "4", ",", " ABCdef", "\n", "\n", " x"],
}


@pytest.mark.parametrize("name", WORDS)
def test_words_of_each_pre_tokenizer(tmp_path: Path, name: str) -> None:
    data = read_gguf_tokenizer(write_gguf(tmp_path / "a.gguf", byte_level_metadata(**{"tokenizer.ggml.pre": name})))
    words = data.backend.pre_tokenizer.pre_tokenize_str("I'Ll pay  $1234, ABCdef\n\n x")
    assert [word.replace("Ġ", " ").replace("Ċ", "\n") for word, _ in words] == WORDS[name]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer_gives_the_text_back(tmp_path: Path, name: str) -> None:
    tokenizer = open_with(tmp_path, byte_level_metadata(**{"tokenizer.ggml.pre": name}))
    text = "I'Ll pay  $1234, ABCdef\n\n x é你好 😀\t-- hello world\r\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert (ids[0] == 0) is PRE_TOKENIZERS[name].add_bos
    assert " world" in map(tokenizer.token_text, ids)


def test_a_word_that_is_a_token_stays_one_where_merges_are_ignored(tmp_path: Path) -> None:
    """ "world" has no merges that make it without its space."""
    tokens = byte_level_metadata()["tokenizer.ggml.tokens"]
    changes = {
        "tokenizer.ggml.tokens": [*tokens, "owl"],
        "tokenizer.ggml.token_type": [*byte_level_metadata()["tokenizer.ggml.token_type"], 1],
    }
    for name, count in (("llama-bpe", 2), ("smaug-bpe", 3)):
        tokenizer = open_with(tmp_path, byte_level_metadata(**{"tokenizer.ggml.pre": name}, **changes))
        assert len(tokenizer.encode("owl")) == count


def test_qwen2_composes_characters(tmp_path: Path) -> None:
    for name, text in (("qwen2", "\u00e9"), ("llama-bpe", "e\u0301")):
        tokenizer = open_with(tmp_path, byte_level_metadata(**{"tokenizer.ggml.pre": name}))
        assert tokenizer.decode(tokenizer.encode("e\u0301")) == text


@shared
@given(st.text(max_size=40))
def test_sentencepiece_gives_the_text_back(sentencepiece: Tokenizer, text: str) -> None:
    if not any(special in text for special in ("<s>", "</s>", "<unk>", "\u2581", "<0x")):
        ids = sentencepiece.encode(text)
        assert ids[0] == 1
        assert sentencepiece.decode(ids) == text


def test_sentencepiece_merges_by_score(sentencepiece: Tokenizer) -> None:
    assert [sentencepiece.token_text(token_id) for token_id in sentencepiece.encode("hello world")] == [
        "<s>", " hello", " wor", "ld",
    ]  # fmt: skip
    # "el" is better than "lo", so that the "l" is not there any more for "lo"
    assert [sentencepiece.token_text(token_id) for token_id in sentencepiece.encode("elo")] == ["<s>", " ", "el", "o"]
    assert sentencepiece.token_text(sentencepiece.encode("你")[-1]) == "你"
    assert [sentencepiece.token_bytes(token_id) for token_id in sentencepiece.encode("好")[-3:]] == [
        b"\xe5", b"\xa5", b"\xbd",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "tokens"),
    [
        ({}, ["<s>", " hello"]),
        ({"add_bos_token": False}, [" hello"]),
        ({"add_eos_token": True}, ["<s>", " hello", "</s>"]),
        ({"add_space_prefix": False, "add_bos_token": False}, ["h", "ello"]),
    ],
)
def test_flags_of_a_file_are_honoured(tmp_path: Path, flags: dict[str, bool], tokens: list[str]) -> None:
    named = {f"tokenizer.ggml.{name}": flag for name, flag in flags.items()}
    tokenizer = open_with(tmp_path, sentencepiece_metadata(**named))
    encoded = tokenizer.encode("hello")
    assert [tokenizer.token_text(token_id) for token_id in encoded] == tokens
    assert tokenizer.decode(encoded) == "hello"
    plain = [token for token in tokens if token not in ("<s>", "</s>")]
    assert list(map(tokenizer.token_text, tokenizer.encode("hello", add_special_tokens=False))) == plain


def test_ends_of_an_answer(tmp_path: Path) -> None:
    metadata = byte_level_metadata(**{"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 1})
    assert open_with(tmp_path, metadata).eos_token_ids == (1, 5)


def test_bytes_of_tokens(byte_level: Tokenizer) -> None:
    (first, second) = byte_level.encode("ß")
    assert (byte_level.token_bytes(first), byte_level.token_bytes(second)) == (b"\xc3", b"\x9f")
    assert byte_level.token_text(first) == "\ufffd"
    assert (byte_level.token_bytes(1), byte_level.token_text(1)) == (b"<|end|>", "<|end|>")
    assert (byte_level.token_bytes(10**6), byte_level.token_text(10**6)) == (b"", "")
    assert byte_level.bos_token_id == 0


@pytest.mark.parametrize("text", ["a\ud800b", 7, None])
def test_what_is_no_text_is_refused(byte_level: Tokenizer, text: Any) -> None:
    with pytest.raises(RequestError, match=r"half a surrogate pair at character 1|is a (int|NoneType)") as caught:
        byte_level.encode(text)
    assert caught.value.field == "prompt"


# --- chats ---


def test_a_template_decides_on_the_beginning(tmp_path: Path) -> None:
    """A template that writes the first token gets it once, though the tokenizer adds one to plain text."""
    metadata = byte_level_metadata(**{"tokenizer.ggml.add_bos_token": True})
    tokenizer = open_with(tmp_path, metadata, chat_template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    assert tokenizer.encode_chat(HELLO) == tokenizer.encode("hello<|end|>")
    assert tokenizer.encode_chat(HELLO).count(0) == 1


def test_template_arguments(tmp_path: Path) -> None:
    template = "{{ messages | length }}{% if add_generation_prompt %}+{% endif %}{{ style }}"
    tokenizer = open_with(tmp_path, byte_level_metadata(), chat_template=template)
    assert tokenizer.decode(tokenizer.encode_chat(HELLO, style="x")) == "1+x"
    assert tokenizer.decode(tokenizer.encode_chat(HELLO, False)) == "1"
    for name in ("messages", "chat_template"):
        with pytest.raises(RequestError, match=name) as caught:
            tokenizer.encode_chat(HELLO, **{name: "{{ 7 * 7 }}"})
        assert caught.value.field == "chat_template_kwargs"


def test_template_for_tools(tmp_path: Path) -> None:
    metadata = byte_level_metadata(
        **{"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "{{ tools[0].name }}"}
    )
    tokenizer = open_with(tmp_path, metadata)
    assert tokenizer.decode(tokenizer.encode_chat(HELLO, tools=[{"name": "clock"}])) == "clock"
    assert tokenizer.decode(tokenizer.encode_chat(HELLO), False) == "<|start|>user: hello<|end|><|start|>assistant: "


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses"),
        ("{{ messages[7].content.x }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_that_refuses_is_the_requests_fault(tmp_path: Path, template: str, complaint: str) -> None:
    tokenizer = open_with(tmp_path, byte_level_metadata(), chat_template=template)
    with pytest.raises(RequestError, match=complaint) as caught:
        tokenizer.encode_chat(HELLO)
    assert caught.value.field == "messages"


def test_a_broken_template_is_known_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"--chat-template cannot be used at line 2") as caught:
        open_with(tmp_path, byte_level_metadata(), chat_template="{{ messages }}\n{% for %}")
    assert caught.value.hint is not None
    with pytest.raises(ModelError, match=r"model\.gguf cannot be used"):
        open_with(tmp_path, byte_level_metadata(**{"tokenizer.chat_template": "{% endif %}"}))


def test_no_template(tmp_path: Path) -> None:
    tokenizer = open_with(tmp_path, byte_level_metadata(**{"tokenizer.chat_template": None}))
    assert tokenizer.chat_template is None
    with pytest.raises(RequestError, match="--chat-template") as caught:
        tokenizer.encode_chat(HELLO)
    assert caught.value.field == "messages"


# --- damaged files ---


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tokenizer.ggml.pre": "klingon"}, "pre is 'klingon', allowed: command-r, .*smollm"),
        ({"tokenizer.ggml.pre": None}, "pre is missing"),
        ({"tokenizer.ggml.pre": 3}, "pre is 3, expected a value of type str"),
        ({"tokenizer.ggml.model": "bert"}, "model is 'bert', allowed"),
        ({"tokenizer.ggml.tokens": None}, "tokens is missing"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokens is missing or no list of str"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token_type has 2 entries, expected 271"),
        ({"tokenizer.ggml.merges": ["hello"]}, "merges has 'hello'"),
        ({"tokenizer.ggml.merges": ["x yz"]}, "no tokenizer can be built"),
        ({"tokenizer.ggml.eos_token_id": 271}, "eos_token_id is 271, allowed: 0 to 270"),
        ({"tokenizer.ggml.tokens": ["a"] * 271}, "'a' twice"),
    ],
)
def test_wrong_metadata_is_named(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint) as caught:
        open_with(tmp_path, byte_level_metadata(**changes))
    assert "model.gguf" in caught.value.message
    assert caught.value.hint is not None


# --- folders ---


def write_folder(folder: Path, backend: Backend, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | config))
    return folder


@pytest.fixture
def backend(tmp_path: Path) -> Backend:
    return read_gguf_tokenizer(write_gguf(tmp_path / "a.gguf", byte_level_metadata())).backend


def test_a_folder_speaks_as_its_gguf(tmp_path: Path, backend: Backend, byte_level: Tokenizer) -> None:
    folder = write_folder(tmp_path / "model", backend, chat_template=CHATML)
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 9}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    tokenizer = open_tokenizer(folder)
    for text in ("hello world 123é", "<|start|>a<|end|>", "你好 😀\n\n"):
        assert tokenizer.encode(text) == byte_level.encode(text)
    assert tokenizer.encode_chat(HELLO) == byte_level.encode_chat(HELLO)
    assert tokenizer.eos_token_ids == (7, 9, 1)
    assert tokenizer.bos_token_id == 0
    assert tokenizer.vocab_size == byte_level.vocab_size


def test_limits_written_into_a_tokenizer_are_not_its_users(tmp_path: Path, backend: Backend) -> None:
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = open_tokenizer(write_folder(tmp_path / "model", backend))
    assert len(tokenizer.encode("hello world hello world")) == 5


def test_an_older_format_is_converted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = byte_level_metadata()["tokenizer.ggml.tokens"]
    merges = byte_level_metadata()["tokenizer.ggml.merges"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: at for at, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|end|>"}')
    with caplog.at_level(logging.WARNING, logger="aphro_core"):
        tokenizer = open_tokenizer(tmp_path)
    assert "has no tokenizer.json" in caplog.text
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"
    assert 1 in tokenizer.eos_token_ids


def test_folders_that_do_not_work(tmp_path: Path, backend: Backend) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer, looked for: tokenizer\.json") as caught:
        open_tokenizer(tmp_path)
    assert "--skip-tokenizer-init" in (caught.value.hint or "")
    folder = write_folder(tmp_path / "model", backend)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read as JSON"):
        open_tokenizer(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="has a list, expected an object"):
        open_tokenizer(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ModelError, match="cannot be read"):
        open_tokenizer(folder)


def test_code_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    auto_map = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(auto_map))
    with pytest.raises(ModelError, match="is Python code"):
        open_tokenizer(tmp_path)


def test_an_unknown_decoder_is_refused(tmp_path: Path) -> None:
    backend = Backend(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="a decoder of WordPiece, allowed: ByteLevel"):
        open_tokenizer(write_folder(tmp_path / "model", backend))


def test_torch_is_not_loaded(tmp_path: Path, backend: Backend) -> None:
    """The API process is there to speak: a second of import and 200 MB belong to the workers."""
    folder = write_folder(tmp_path / "model", backend, chat_template=CHATML)
    gguf_path = write_gguf(tmp_path / "b.gguf", byte_level_metadata())
    code = (
        "import sys; from pathlib import Path; from aphro_core.frontend.tokenizer import open_tokenizer\n"
        "import aphro_core.frontend.frontend\n"
        f"for path in {[str(folder), str(gguf_path)]}:\n"
        "    open_tokenizer(Path(path)).encode_chat([{'role': 'user', 'content': 'x'}])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"
