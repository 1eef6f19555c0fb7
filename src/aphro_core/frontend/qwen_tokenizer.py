"""The tokenizer of Qwen (v1) from its own vocabulary file, qwen.tiktoken, without the Python beside it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from aphro_core.errors import ModelError
from aphro_core.frontend.pieces import byte_alphabet
from aphro_core.frontend.tokenizer_data import WITHOUT_TOKENIZER, TokenizerData

FILE_NAME: Final = "qwen.tiktoken"

# Published with the model (tokenization_qwen.py): how text is cut before the merges, and what follows the ranks.
_PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END_OF_TEXT, _IM_START, _IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_SPECIAL_TOKENS: Final = (_END_OF_TEXT, _IM_START, _IM_END, *(f"<|extra_{i}|>" for i in range(205)))
_MAX_FILE_BYTES: Final = 64 * 2**20

# The chat format of the published chat models (make_context), as a template.
_CHATML: Final = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def read_qwen_tokenizer(folder: Path) -> TokenizerData:
    """Raises ModelError for a file that is no list of base64 tokens and ranks."""
    ranks = _read_ranks(folder / FILE_NAME)
    letters = byte_alphabet()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    backend = Backend(
        models.BPE(
            vocab={written[token]: rank for token, rank in ranks.items()},
            merges=[(written[left], written[right]) for left, right in _merges(ranks)],
            ignore_merges=True,  # a piece that is a token is that token
        )
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS])
    first = len(ranks)  # the special tokens' ids follow the ranks, in their order
    return TokenizerData(
        backend=backend,
        special_tokens={"eos_token": _END_OF_TEXT},
        bos_token_id=None,
        eos_token_ids=(first, first + _SPECIAL_TOKENS.index(_IM_END)),
        chat_templates={"default": _CHATML},
    )


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Lines of ``base64 rank``: token -> rank, which is its id. All single bytes must be there."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ModelError(f"{path} has {path.stat().st_size} bytes, allowed: {_MAX_FILE_BYTES}")
        lines = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError, binascii.Error) as error:
        raise ModelError(f"{path} cannot be read as tokens and ranks: {error}", hint=WITHOUT_TOKENIZER) from error
    is_complete = all(bytes([byte]) in ranks for byte in range(256))
    if sorted(ranks.values()) != list(range(len(lines))) or not is_complete:
        raise ModelError(
            f"{path} is incomplete: expected ranks from 0 up without gaps, all 256 bytes among them",
            hint=WITHOUT_TOKENIZER,
        )
    return ranks


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a token, the token with the lowest rank first: what merging by rank does."""
    found = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(ranks[left], ranks[right], left, right) for left, right in parts if left in ranks and right in ranks]
        found += [(left, right) for a, b, left, right in sorted(known) if max(a, b) < rank]
    return found
