"""What is true of a scheduler's state after every operation."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from aphro_core.scheduler.block_manager import BlockManager
from aphro_core.scheduler.scheduler import Scheduler
from aphro_core.scheduler.sequence import Sequence


def check_state(scheduler: Scheduler, max_num_seqs: int) -> None:
    waiting = scheduler._waiting
    places = [sequence for sent in scheduler._in_flight._plans for sequence in sent.sequences]
    in_flight = list({id(sequence): sequence for sequence in places}.values())
    leaving = [sequence for sequence in in_flight if scheduler._sequences.get(sequence.seq_id) is not sequence]
    assert {sequence.seq_id for sequence in leaving} == scheduler._leaving
    assert len(scheduler._running) + len(leaving) <= max_num_seqs

    queued = [*waiting._preempted, *waiting._never_ran.values()]
    check_order(scheduler._running)
    check_order(queued)
    assert {id(s) for s in [*scheduler._running, *queued]} == {id(s) for s in scheduler._sequences.values()}
    assert waiting.num_tokens == sum(len(sequence.token_ids) for sequence in queued)
    for sequence in queued:
        assert not sequence.is_running
        assert not sequence.is_in_flight
        assert not sequence.num_computed

    draws = Counter(
        id(one)
        for sent in scheduler._in_flight._plans
        for samples, one in zip(sent.samples, sent.sequences, strict=True)
        if samples
    )
    for sequence in in_flight:
        assert 1 <= sequence.num_in_flight == sum(one is sequence for one in places) <= 1 + scheduler._run_ahead
        assert sequence.num_unread == draws[id(sequence)]
    assert {id(s) for s in scheduler._running if s.is_in_flight} == {id(s) for s in in_flight} - {
        id(s) for s in leaving
    }
    for sequence in [*scheduler._running, *leaving]:
        assert sequence.is_running
        assert sequence.is_in_flight or not sequence.num_unread
        # the tokens of one that leaves are dropped
        assert sequence in leaving or sequence.num_pending >= (0 if sequence.is_in_flight else 1)
    check_blocks(scheduler._blocks, [sequence.block_table for sequence in [*scheduler._running, *leaving]])


def check_order(sequences: list[Sequence]) -> None:
    assert all(first.arrival < second.arrival for first, second in pairwise(sequences))


def check_blocks(blocks: BlockManager, block_tables: list[list[int]]) -> None:
    """Every block is held as often as tables name it, or free, or cached; names and blocks belong together."""
    held = Counter(block_id for table in block_tables for block_id in table)
    assert blocks._ref_counts == [held[block_id] for block_id in range(blocks.num_blocks)]
    assert sorted([*held, *blocks._free, *blocks._cached]) == list(range(blocks.num_blocks))
    assert blocks.num_free + blocks.num_used == blocks.num_blocks
    assert blocks.num_used == len(held)
    assert {name: block_id for block_id, name in enumerate(blocks._hashes) if name is not None} == blocks._by_hash
    assert set(blocks._cached) <= set(blocks._by_hash.values())
    assert not set(blocks._free) & set(blocks._by_hash.values())
