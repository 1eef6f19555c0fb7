"""``aphro doctor explain ID``: what a check or a finding means, and what to do about it in general."""

from __future__ import annotations

import difflib
import textwrap
from typing import Final

from aphro_core.doctor import doctor
from aphro_core.doctor.nccl_log.topics import TOPICS
from aphro_core.errors import UsageError

_WIDTH: Final = 100


def known_ids() -> list[str]:
    return [*doctor.CHECKS, *sorted(TOPICS)]


def explain(id: str) -> str:
    """Text on one check or finding, or on all whose id begins so. Raises UsageError for an unknown id."""
    ids = [known for known in known_ids() if known in (id, f"log.{id}")]
    ids = ids or [known for known in known_ids() if known.startswith(id)]
    if not ids:
        close = difflib.get_close_matches(id, known_ids(), 3, 0.4)
        raise UsageError(f"no check or finding is called {id!r}", hint=f"one of {', '.join(close or known_ids())}")
    return "\n".join(doctor.explain(known) if known in doctor.CHECKS else _explain_topic(known) for known in ids)


def _explain_topic(id: str) -> str:
    topic = TOPICS[id]
    meaning = textwrap.fill(topic.meaning, _WIDTH)
    return f"{id}\n\n{meaning}\n\n{textwrap.indent(topic.remedy, '  ')}\n"
