"""What crosses between a tokenizer and the process that runs chat templates for it."""

from __future__ import annotations

from typing import Any

import msgspec


class Render(msgspec.Struct, frozen=True, tag="render"):
    template: str
    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    variables: dict[str, Any]


class Rendered(msgspec.Struct, frozen=True, tag="rendered"):
    text: str


class RenderRefused(msgspec.Struct, frozen=True, tag="refused"):
    message: str
    is_broken: bool = False
    is_over_limit: bool = False
    line: int | None = None


FromRenderer = Rendered | RenderRefused
