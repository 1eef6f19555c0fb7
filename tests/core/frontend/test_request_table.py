"""Rows of requests: ids, seeds, bounds, and what a new engine would be told."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphro_core.errors import OverloadedError
from aphro_core.frontend.request_table import RequestTable, Row, choice_seed
from aphro_core.messages.requests import AddSequence
from aphro_core.request import MAX_SEED, Request, SamplingParams


def open_row(table: RequestTable, *, seed: int = 7, **sampling: Any) -> Row:
    request = Request("r", (4, 5, 6), SamplingParams(**sampling), cache_salt="salt")
    return table.open(request, max_tokens=9, eos_token_ids=(2, 3), seed=seed)


def test_choices_are_sequences_of_their_own() -> None:
    table = RequestTable(4)
    first, second = open_row(table, n=3, stop_token_ids=[8, 2]), open_row(table)
    assert [choice.seq_id for choice in first.choices + second.choices] == [1, 2, 3, 4]
    added = first.add_sequence(first.choices[1])
    assert (added.prompt_token_ids, added.max_tokens, added.cache_salt) == ([4, 5, 6], 9, "salt")
    assert added.stop_token_ids == [2, 3, 8]
    assert added.output_token_ids == []
    assert len({choice.seed for choice in first.choices}) == 3


def test_only_the_first_choice_computes_prompt_logprobs() -> None:
    row = open_row(RequestTable(1), n=2, prompt_logprobs=3)
    added = [row.add_sequence(choice) for choice in row.choices]
    assert [each.sampling.prompt_logprobs for each in added] == [3, None]


def unfinished(table: RequestTable) -> list[AddSequence]:
    return [row.add_sequence(choice) for row in table for choice in row.choices if choice.finish_reason is None]


def test_open_choices_could_go_on_elsewhere() -> None:
    table = RequestTable(4)
    first, second = open_row(table, n=2), open_row(table)
    first.choices[0].output_token_ids += [10, 11]
    first.choices[1].finish_reason = "stop"
    again = unfinished(table)
    assert [(each.seq_id, each.output_token_ids) for each in again] == [(1, [10, 11]), (3, [])]
    first.choices[0].output_token_ids.append(12)
    assert again[0].output_token_ids == [10, 11], "a message does not change once it is made"
    assert table.close(first) == [1]
    assert table.close(second) == [3]
    assert unfinished(table) == []


def test_is_bounded() -> None:
    table = RequestTable(2)
    row = open_row(table)
    open_row(table)
    with pytest.raises(OverloadedError, match="2 requests are open, allowed: 2") as caught:
        open_row(table)
    assert not caught.value.draining
    table.close(row)
    assert len(table) == 1
    open_row(table)


@given(st.integers(0, MAX_SEED))
def test_seeds_are_fixed_legal_and_apart(seed: int) -> None:
    seeds = [choice_seed(seed, index) for index in range(128)]
    assert seeds[0] == seed
    assert all(0 <= each <= MAX_SEED for each in seeds)
    assert len(set(seeds)) == 128


def test_seeds_never_change() -> None:
    """A client that asks again with its seed gets the same choices from every version."""
    assert [choice_seed(42, index) for index in range(3)] == [42, 13679457532755275413 & MAX_SEED, 2949826092126892291]
