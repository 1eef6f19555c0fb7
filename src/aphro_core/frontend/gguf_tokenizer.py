"""A tokenizer from a GGUF file: its vocabulary, merges and flags as a pipeline of the ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from aphro_core.checkpoint.file import ModelFile
from aphro_core.checkpoint.gguf_header import GGUFHeader
from aphro_core.errors import ModelError
from aphro_core.frontend.tokenizer_data import TokenizerData

_KEY: Final = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6  # token types
_SPACE: Final = "\u2581"  # what SentencePiece writes for a space
_SENTENCEPIECE_IDS: Final = {"bos": 1, "eos": 2, "unknown": 0}  # where the file does not say
_CONVERT_AGAIN: Final = "convert the model again with a current convert_hf_to_gguf.py"


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """How text is cut into words, which merges never cross: by each pattern in turn."""

    splits: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token stays one
    add_bos: bool = False  # where the file does not say
    nfc: bool = False


# The patterns are those of the models' own tokenizer.json, which is what the models were trained with.
_GPT2_WORDS: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_TEKKEN_WORDS: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2: Final = PreTokenizer(splits=(_GPT2_WORDS,))
_DIGITS_GPT2: Final = PreTokenizer(splits=(r"\p{N}", _GPT2_WORDS))
_LLAMA3: Final = PreTokenizer(splits=(_LLAMA3_WORDS,), ignore_merges=True, add_bos=True)
_QWEN2: Final = PreTokenizer(splits=(_LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}"),), nfc=True)

PRE_TOKENIZERS: Final[dict[str, PreTokenizer]] = {
    "command-r": _DIGITS_GPT2,
    "deepseek-coder": PreTokenizer(
        splits=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
    ),
    "deepseek-r1-qwen": _QWEN2,
    "default": PreTokenizer(splits=(r"[\p{P}$+<=>^~|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9]{3}")),
    "falcon3": _LLAMA3,
    "gpt-2": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "megrez": _QWEN2,
    "minerva-7b": _DIGITS_GPT2,
    "olmo": _GPT2,
    "phi-2": _GPT2,
    "qwen2": _QWEN2,
    "refact": _DIGITS_GPT2,
    "smaug-bpe": PreTokenizer(splits=(_LLAMA3_WORDS,)),
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "tekken": PreTokenizer(splits=(_TEKKEN_WORDS,), ignore_merges=True, add_bos=True),
}


class _Metadata:
    """The tokenizer's keys of one file, checked: the file is untrusted."""

    def __init__(self, header: GGUFHeader, path: Path) -> None:
        self._header = header
        self.path = path
        self.tokens: list[str] = self.array("tokens", str, None)
        self.types: list[int] = self.array("token_type", int, len(self.tokens), default=[1] * len(self.tokens))
        self.model: str = self.value("model", str, "")

    def array(self, name: str, kind: type, length: int | None, *, default: list[Any] | None = None) -> list[Any]:
        found = self._header.value(_KEY + name, default)
        if not isinstance(found, list) or not found or not all(isinstance(item, kind) for item in found):
            raise self.wrong(f"{_KEY}{name} is missing or no list of {kind.__name__}")
        if length is not None and len(found) != length:
            raise self.wrong(f"{_KEY}{name} has {len(found)} entries, expected {length}, one a token")
        return found

    def value(self, name: str, kind: type, default: Any) -> Any:
        found = self._header.value(_KEY + name, default)
        if found is not default and not isinstance(found, kind):
            raise self.wrong(f"{_KEY}{name} is {found!r}, expected a value of type {kind.__name__}")
        return found

    def token_id(self, name: str) -> int | None:
        default = _SENTENCEPIECE_IDS.get(name) if self.model == "llama" else None
        found: int | None = self.value(f"{name}_token_id", int, default)
        if found is not None and not 0 <= found < len(self.tokens):
            raise self.wrong(f"{_KEY}{name}_token_id is {found}, allowed: 0 to {len(self.tokens) - 1}")
        return found

    def chat_templates(self) -> dict[str, str]:
        found = {"default": self._header.value("tokenizer.chat_template")}
        names = self._header.value("tokenizer.chat_templates")
        for name in names if isinstance(names, list) else []:
            found[str(name)] = self._header.value(f"tokenizer.chat_template.{name}")
        return {name: template for name, template in found.items() if isinstance(template, str)}

    def wrong(self, problem: str) -> ModelError:
        return ModelError(f"{self.path}: {problem}", hint=_CONVERT_AGAIN)


def read_gguf_tokenizer(path: Path) -> TokenizerData:
    """Raises ModelError that names the key: not there, of a wrong type, or a tokenizer that is not known here."""
    with ModelFile(path) as file:
        header = GGUFHeader(file)
        try:
            return _build(_Metadata(header, path))
        finally:
            header.close()


def _build(data: _Metadata) -> TokenizerData:
    try:
        if data.model == "gpt2":
            backend, add_bos = _byte_level_bpe(data)
        elif data.model == "llama":
            backend, add_bos = _sentencepiece_bpe(data), True
        else:
            raise data.wrong(
                f"{_KEY}model is {data.model!r}, allowed: 'gpt2' (byte-level BPE), 'llama' (SentencePiece)"
            )
        _add_tokens(backend, data)
        ids = {name: data.token_id(name) for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
        front = ids["bos"] if data.value("add_bos_token", bool, add_bos) else None
        back = ids["eos"] if data.value("add_eos_token", bool, False) else None
        _frame(backend, data.tokens, front, back)
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # the library raises its plain Exception, for merges of unknown tokens for example
        raise data.wrong(f"no tokenizer can be built from its metadata: {error}") from error
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    special = {label: data.tokens[found] for name, label in names.items() if (found := ids[name]) is not None}
    ends = dict.fromkeys(found for name in ("eos", "eot", "eom") if (found := ids[name]) is not None)
    return TokenizerData(backend, special, ids["bos"], tuple(ends), data.chat_templates())


def _byte_level_bpe(data: _Metadata) -> tuple[Tokenizer, bool]:
    """(tokenizer, whether a beginning-of-sequence token is usual)."""
    name = data.value("pre", str, None)
    rules = PRE_TOKENIZERS.get(name)
    if rules is None:
        what = f"{_KEY}pre is {name!r}" if name is not None else f"{_KEY}pre is missing"
        raise data.wrong(f"{what}, allowed: {', '.join(PRE_TOKENIZERS)}")
    merges = [_pair(merge, data) for merge in data.array("merges", str, None)]
    backend = Tokenizer(models.BPE(_vocabulary(data), merges, ignore_merges=rules.ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rules.splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    if rules.nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend, rules.add_bos


def _pair(merge: str, data: _Metadata) -> tuple[str, str]:
    first, space, second = merge.partition(" ")
    if not (first and space and second):
        raise data.wrong(f"{_KEY}merges has {merge[:80]!r}, expected two tokens with a space between")
    return first, second


def _sentencepiece_bpe(data: _Metadata) -> Tokenizer:
    """SentencePiece's BPE, as Hugging Face converts it: the score of a piece ranks the merges that make it."""
    vocabulary = _vocabulary(data)
    merges = _merges_of(data, data.array("scores", float, len(data.tokens)))
    unknown = data.token_id("unknown")
    unk_token = None if unknown is None else data.tokens[unknown]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    add_space = data.value("add_space_prefix", bool, True)
    before = [normalizers.Prepend(_SPACE)] if add_space else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if add_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return backend


def _merges_of(data: _Metadata, scores: Sequence[float]) -> list[tuple[str, str]]:
    left_out = (_UNKNOWN, _CONTROL, _UNUSED, _BYTE)  # never the result of a merge
    ids = {
        token: at for at, (token, kind) in enumerate(zip(data.tokens, data.types, strict=True)) if kind not in left_out
    }
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, at in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((scores[at], cut, len(right), left, right))
    ranked.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in ranked]


def _vocabulary(data: _Metadata) -> dict[str, int]:
    vocabulary = {token: at for at, token in enumerate(data.tokens)}
    if len(vocabulary) != len(data.tokens):
        twice = next(token for at, token in enumerate(data.tokens) if vocabulary[token] != at)
        raise data.wrong(f"{_KEY}tokens has {twice[:80]!r} twice")
    return vocabulary


def _add_tokens(backend: Tokenizer, data: _Metadata) -> None:
    """Control tokens are found in text and hidden from output; user-defined ones are found in text."""
    added = [
        AddedToken(token, special=kind in (_CONTROL, _UNKNOWN), normalized=False)
        for token, kind in zip(data.tokens, data.types, strict=True)
        if token and (kind in (_CONTROL, _UNKNOWN) or (kind == _USER_DEFINED and _SPACE not in token))
    ]
    backend.add_tokens(added)


def _frame(backend: Tokenizer, tokens: Sequence[str], front: int | None, back: int | None) -> None:
    """Put these tokens before and behind every text that is encoded with its special tokens."""
    before = [tokens[front]] if front is not None else []
    behind = [tokens[back]] if back is not None else []
    ids = [(tokens[token_id], token_id) for token_id in (front, back) if token_id is not None]
    if ids:
        single = [*before, "$A", *behind]
        backend.post_processor = processors.TemplateProcessing(
            single=single, pair=[*single, "$B:1"], special_tokens=ids
        )
