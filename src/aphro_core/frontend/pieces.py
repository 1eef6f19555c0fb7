"""The bytes that each token stands for, so that text is made by joining bytes instead of decoding again and again."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any, Final

from tokenizers import Tokenizer as Backend

ToBytes = Callable[[str], bytes]

DECODERS: Final = ("ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "none")


class Pieces(dict[int, bytes]):
    """Token id -> its bytes, worked out when first asked for. Empty for the ``hidden`` ids and for unknown ones."""

    def __init__(self, backend: Backend, to_bytes: ToBytes, hidden: Collection[int] = ()) -> None:
        super().__init__()
        self._token_of = backend.id_to_token
        self._to_bytes = to_bytes
        self._hidden = hidden

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._hidden else self._token_of(token_id)
        piece = self[token_id] = b"" if token is None else self._to_bytes(token)
        return piece


def read_decoder(backend: Backend) -> tuple[ToBytes, bool] | None:
    """(token -> bytes, whether a space at the start of a text is dropped); None for a decoder that is not known here.

    What is known joins its tokens without looking at their neighbours, one exception aside: bytes of ``ByteFallback``
    that are no UTF-8 become one U+FFFD a broken character here, one a byte of the whole run there.
    """
    if backend.decoder is None:
        return (lambda token: f" {token}".encode()), True
    described = json.loads(backend.decoder.__getstate__())
    steps = described["decoders"] if described["type"] == "Sequence" else [described]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level(), False
    replaced = [_replacement(step) for step in steps if step["type"] == "Replace"]
    strips = [step for step in steps if step["type"] == "Strip"]
    is_known = set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"} and None not in replaced
    if not is_known or strips not in ([], [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]):
        return None
    if strips and kinds[-2:] != ["Fuse", "Strip"]:  # before they are fused, it strips each token
        return None
    return _sentencepiece([pair for pair in replaced if pair is not None], "ByteFallback" in kinds), bool(strips)


def _replacement(step: dict[str, Any]) -> tuple[str, str] | None:
    pattern = step["pattern"].get("String")
    return None if pattern is None else (pattern, step["content"])


def byte_alphabet() -> dict[int, str]:
    """GPT-2's alphabet: a printable character for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}


def _byte_level() -> ToBytes:
    byte_of = {letter: byte for byte, letter in byte_alphabet().items()}

    def to_bytes(token: str) -> bytes:
        try:
            return bytes(map(byte_of.__getitem__, token))
        except KeyError:  # an added token with a character from outside the alphabet stands for itself
            return token.encode()

    return to_bytes


def _sentencepiece(replaced: list[tuple[str, str]], has_byte_tokens: bool) -> ToBytes:
    def to_bytes(token: str) -> bytes:
        for old, new in replaced:
            token = token.replace(old, new)
        if has_byte_tokens and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes.fromhex(token[3:5])
            except ValueError:
                pass
        return token.encode()

    return to_bytes
