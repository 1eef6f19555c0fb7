"""The truth about each live request: what was asked, what it has got; enough to start it again in another engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import msgspec

from aphro_core.errors import OverloadedError
from aphro_core.messages.requests import AddSequence
from aphro_core.request import MAX_SEED, FinishReason, Request


@dataclass(slots=True)
class Choice:
    """One of the ``n`` answers of a request. ``output_token_ids`` is what the client has got or is about to get."""

    seq_id: int
    index: int
    seed: int
    output_token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Row:
    """One request. ``max_tokens`` counts the output tokens of each choice; ``eos_token_ids`` end it, unless ignored."""

    request: Request
    prompt_token_ids: list[int]
    max_tokens: int
    eos_token_ids: tuple[int, ...]
    choices: list[Choice]

    @property
    def is_finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def num_output_tokens(self) -> int:
        return sum(len(choice.output_token_ids) for choice in self.choices)

    def add_sequence(self, choice: Choice) -> AddSequence:
        """What the engine needs to start a choice, or to go on with it behind the tokens it has."""
        sampling = self.request.sampling
        if choice.index > 0 and sampling.prompt_logprobs is not None:  # the same for all, so the first one answers
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        return AddSequence(
            seq_id=choice.seq_id,
            prompt_token_ids=self.prompt_token_ids,
            sampling=sampling,
            seed=choice.seed,
            max_tokens=self.max_tokens,
            stop_token_ids=list(dict.fromkeys([*self.eos_token_ids, *sampling.stop_token_ids])),
            output_token_ids=choice.output_token_ids.copy(),
            cache_salt=self.request.cache_salt,
        )


class RequestTable:
    """The rows of at most ``max_rows`` requests. A row lives from ``open`` to ``close``, a choice until it finishes."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._rows: dict[int, Row] = {}  # by the seq_id of the first choice
        self._last_seq_id = 0

    def __len__(self) -> int:
        return len(self._rows)

    def check_room(self) -> None:
        """Raises OverloadedError when no further request can be taken."""
        if len(self._rows) >= self._max_rows:
            raise OverloadedError(f"{len(self._rows)} requests are open, allowed: {self._max_rows}; try again later")

    def open(self, request: Request, *, max_tokens: int, eos_token_ids: tuple[int, ...], seed: int) -> Row:
        """A new row; its choices are seeded from ``seed``. Raises OverloadedError when the table is full."""
        self.check_room()
        first = self._last_seq_id + 1
        choices = [Choice(first + index, index, choice_seed(seed, index)) for index in range(request.sampling.n)]
        self._last_seq_id += len(choices)
        row = Row(request, list(request.prompt_token_ids), max_tokens, eos_token_ids, choices)
        self._rows[first] = row
        return row

    def close(self, row: Row) -> list[int]:
        """Forget a row. What was not finished is aborted: its seq_ids, to tell the engine."""
        del self._rows[row.choices[0].seq_id]
        left = [choice for choice in row.choices if choice.finish_reason is None]
        for choice in left:
            choice.finish_reason = "abort"
        return [choice.seq_id for choice in left]

    def __iter__(self) -> Iterator[Row]:
        """Oldest first."""
        return iter(self._rows.values())


_GOLDEN: Final = 0x9E3779B97F4A7C15
_MASK: Final = 2**64 - 1


def choice_seed(seed: int, index: int) -> int:
    """The seed of a choice, fixed for ever: the request's own for the first, SplitMix64 of (seed, index) for others."""
    if index == 0:
        return seed
    mixed = (seed + index * _GOLDEN) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return (mixed ^ (mixed >> 31)) & MAX_SEED
