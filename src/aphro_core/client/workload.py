"""What a benchmark sends: how long prompts and answers are, when each request arrives, and what it says."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from aphro_core.errors import UsageError

# common words, a token each in most vocabularies
WORDS: Final = tuple(
    """the of and to in is that for it as was with be by on not he his but at are this have from or had an they which
    one you were all her she there would their we him been has when who will no more if out so up said what its about
    than into them can only other time new some could these two may first then do any like my now over such our man
    me even most made after also well many must before back through years much where your way down should because long
    each""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Lengths:
    """Tokens, each number from ``least`` to ``most`` as likely."""

    least: int
    most: int

    def draw(self, source: random.Random) -> int:
        return source.randint(self.least, self.most)

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}-{self.most}"


def parse_lengths(text: str, flag: str) -> Lengths:
    """``128`` or ``64-512``. Raises UsageError."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    lengths = Lengths(int(found[1]), int(found[2] or found[1])) if found else Lengths(0, 0)
    if not 1 <= lengths.least <= lengths.most:
        raise UsageError(f"{flag} is {text!r}, allowed: tokens, 1 and up, or a range such as 64-512")
    return lengths


@dataclass(frozen=True, slots=True)
class Planned:
    """One request: when it arrives (seconds from the start), and how many tokens go in and come out."""

    number: int
    arrives_at: float
    input_tokens: int
    output_tokens: int


def plan_requests(count: int, rate: float, inputs: Lengths, outputs: Lengths, seed: int) -> list[Planned]:
    """``rate`` requests a second on average with independent gaps (a Poisson process); infinite: all at once."""
    source = random.Random(f"plan/{seed}")
    now, planned = 0.0, []
    for number in range(count):
        if number and not math.isinf(rate):
            now += source.expovariate(rate)
        planned.append(Planned(number, now, inputs.draw(source), outputs.draw(source)))
    return planned


def prompt_ids(known_ids: Sequence[int], planned: Planned, seed: int) -> list[int]:
    """Exactly ``input_tokens`` ids; no two requests begin alike, so that no prefix cache helps."""
    source = random.Random(f"ids/{seed}/{planned.number}")
    return source.choices(known_ids, k=planned.input_tokens)


def prompt_words(planned: Planned, seed: int) -> str:
    """About ``input_tokens`` tokens of text, for servers that cannot be asked how they tokenise."""
    source = random.Random(f"words/{seed}/{planned.number}")
    return " ".join(source.choices(WORDS, k=planned.input_tokens))
