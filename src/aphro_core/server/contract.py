"""What the server needs of a frontend, and nothing more: tests serve a fake through the same door."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from aphro_core.request import OutputDelta, Request


class Tokenizer(Protocol):
    """Text to ids and back. ``encode`` and ``encode_chat`` are called from threads when the text is long."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], /, add_generation_prompt: bool = True, **template_args: Any
    ) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def token_text(self, token_id: int) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class Health(Protocol):
    @property
    def phase(self) -> str: ...

    @property
    def ready(self) -> bool: ...


class Metrics(Protocol):
    @property
    def content_type(self) -> str: ...

    def render(self) -> bytes: ...


class Frontend(Protocol):
    """Owns the truth about each request. Everything but the tokenizer is used on one event loop."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def served_name(self) -> str: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def metrics(self) -> Metrics: ...

    def health(self) -> Health: ...

    def check_admission(self) -> None:
        """Raises what ``stream`` would raise of any request now."""

    def stream(self, request: Request) -> AbstractAsyncContextManager[AsyncIterator[OutputDelta]]:
        """Deltas of all choices of ``request``; leaving the block early aborts it.

        Raises RequestError, OverloadedError, or an AphroError when the engine is gone.
        """
        ...
