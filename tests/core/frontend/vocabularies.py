"""Small tokenizers of both kinds, as GGUF metadata: what the tests of the frontend speak."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import gguf
from tokenizers import pre_tokenizers

from aphro_core.frontend.tokenizer import Tokenizer, open_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

CHATML: Final = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + ': ' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant: ' }}{% endif %}"
)


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    """256 bytes, a few merges, <|start|> (the first id) and <|end|> (the second)."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "Ġwor l", "Ġworl d", "1 2", "12 3", "Ã ©"]
    merged = [merge.replace(" ", "") for merge in merges]
    tokens = ["<|start|>", "<|end|>", *letters, *merged, "<工 tool>"]
    types = [CONTROL, CONTROL, *[NORMAL] * (len(letters) + len(merged)), USER_DEFINED]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": CHATML,
    } | changes


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """<unk>, <s>, </s>, 256 bytes, then pieces, the best first."""
    pieces = ["▁h", "el", "lo", "ello", "▁hello", "▁w", "or", "▁wor", "ld", *"▁helowrdé你"]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *pieces]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | changes


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    """A GGUF file without tensors. A value None leaves the key out."""
    writer = gguf.GGUFWriter(path, str(metadata["general.architecture"]))
    writers = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for key, value in metadata.items():
        if key != "general.architecture" and value is not None:
            writers[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def open_with(folder: Path, metadata: dict[str, Any], **options: Any) -> Tokenizer:
    return open_tokenizer(write_gguf(folder / "model.gguf", metadata), **options)
