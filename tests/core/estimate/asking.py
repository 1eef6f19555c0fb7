"""Short ways to ask for an estimate in tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aphro_core.estimate.cards import GIB, find_card
from aphro_core.estimate.estimate import Estimate, estimate
from aphro_core.estimate.question import DeviceFacts, Question, parse_engine
from aphro_core.estimate.source import build_source


def question(config: Mapping[str, Any], gpu: str = "H100", engine: str = "vllm:0.19.0", **changes: Any) -> Question:
    """About one card; ``gib`` is its memory if it is not the table's."""
    card = find_card(gpu)
    total = round(changes.pop("gib", card.total_gib) * GIB)
    device = DeviceFacts(kind="cuda", total_bytes=total, card=card)
    return Question(source=build_source("model", config), device=device, version=parse_engine(engine), **changes)


def ask(config: Mapping[str, Any], tp: int = 1, pp: int = 1, **changes: Any) -> Estimate:
    return estimate(question(config, **changes), tp, pp)
