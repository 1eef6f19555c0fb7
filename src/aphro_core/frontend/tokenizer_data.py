"""What the readers of tokenizer files find: the pipeline, its special tokens and its chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import Tokenizer as Backend

WITHOUT_TOKENIZER: Final = "serve token ids alone: --skip-tokenizer-init, or LLM(..., skip_tokenizer_init=True)"


@dataclass(frozen=True)
class TokenizerData:
    """``special_tokens`` are variables of a template (``bos_token``); ``chat_templates`` go by name ("default")."""

    backend: Backend
    special_tokens: Mapping[str, Any]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    chat_templates: Mapping[str, str]
