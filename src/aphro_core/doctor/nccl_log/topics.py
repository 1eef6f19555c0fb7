"""Each finding's meaning and remedy in general: what ``aphro doctor explain ID`` prints, and what remedies build on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from aphro_core.doctor.nccl_log import topics_errors, topics_network, topics_transports


@dataclass(frozen=True, slots=True)
class Topic:
    """``remedy`` is lines for a shell; what cannot be typed is a comment."""

    meaning: str
    remedy: str


def parse_topics(text: str) -> dict[str, Topic]:
    """Paragraphs: the id, the meaning over some lines, then the remedy's lines, each behind ``> ``."""
    topics = {}
    for paragraph in text.strip().split("\n\n"):
        id, *lines = paragraph.splitlines()
        remedy = [line[2:] for line in lines if line.startswith("> ")]
        meaning = [line for line in lines if not line.startswith("> ")]
        topics[id] = Topic(" ".join(meaning), "\n".join(remedy))
    return topics


TOPICS: Final[dict[str, Topic]] = {
    id: topic
    for tables in (topics_transports, topics_network, topics_errors)
    for id, topic in parse_topics(tables.TEXT).items()
}
