"""What a row of an error table is: a wording, what it means, and how much it explains."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum


class Tier(IntEnum):
    """How much a message explains. The first of the lowest tier is the root cause."""

    CAUSE = 0
    WEAK = 1  # a cause, unless somebody else failed first and so is not there
    SUSPECT = 2  # a warning; the cause, if something failed and nothing better explains it
    SYMPTOM = 3  # something hung or ended, not why
    CONSEQUENCE = 4  # another rank's failure, seen from here
    TRAIL = 5  # the way that an error took through NCCL
    NOTE = 6  # worth a warning; never a failure


@dataclass(frozen=True, slots=True)
class ErrorRule:
    """``title`` may name groups of ``words``; ``where``, if given, must be in the place in NCCL's source that speaks.

    A record of level WARN is matched, and bare text unless ``is_general``; INFO only if ``in_info``. Where the words
    stand in prose too (``in_prose``), bare text has to be a line that reports the error.
    """

    id: str
    tier: Tier
    words: re.Pattern[str]
    title: str
    in_info: bool = False
    is_general: bool = False  # words that other programs use too
    where: str = ""
    in_prose: bool = False  # words that people use when they tell of an error


def rule(
    id: str,
    tier: Tier,
    words: str,
    title: str,
    *,
    in_info: bool = False,
    is_general: bool = False,
    where: str = "",
    in_prose: bool = False,
) -> ErrorRule:
    return ErrorRule(id, tier, re.compile(words, re.IGNORECASE), title, in_info, is_general, where, in_prose)
