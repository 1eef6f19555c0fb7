"""Blocks: counts, the order in which content is forgotten, and hashes that tell every prefix apart."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from aphro_core.scheduler.block_manager import BlockManager, block_hash, root_hash
from tests.core.scheduler.invariants import check_blocks


def named(text: str) -> bytes:
    return block_hash(root_hash(""), list(text.encode()))


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (-1, 16), (16, 0)])
def test_sizes_start_at_one(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=r"allowed: 1 and up"):
        BlockManager(num_blocks, block_size)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_for_rounds_up(num_tokens: int, num_blocks: int) -> None:
    assert BlockManager(8, 16).blocks_for(num_tokens) == num_blocks


def test_allocated_blocks_are_distinct_and_never_more_than_there_are() -> None:
    blocks = BlockManager(4, 16)
    assert sorted(blocks.allocate(3) + blocks.allocate(1)) == [0, 1, 2, 3]
    assert (blocks.num_free, blocks.num_used) == (0, 4)
    with pytest.raises(AssertionError, match="1 blocks wanted, 0 are free"):
        blocks.allocate(1)


def test_a_block_is_free_when_its_last_reader_leaves() -> None:
    blocks = BlockManager(2, 16)
    table = blocks.allocate(1)
    blocks.register(table[0], named("a"))
    blocks.hold(blocks.find([named("a")]))
    blocks.release(table)
    assert blocks.num_free == 1
    blocks.release(table)
    assert blocks.num_free == 2
    with pytest.raises(AssertionError, match="nobody holds it"):
        blocks.release(table)


def test_a_block_that_nobody_holds_is_found_until_its_space_is_needed() -> None:
    blocks = BlockManager(2, 16)
    table = blocks.allocate(1)
    blocks.register(table[0], named("a"))
    blocks.release(table)
    assert blocks.find([named("a")]) == table
    assert blocks.num_unheld(table) == 1
    other = blocks.allocate(1)
    assert other != table, "a block without content goes first"
    assert blocks.allocate(1) == table
    assert blocks.find([named("a")]) == []


def test_the_block_left_longest_ago_goes_first_and_of_a_sequence_its_tail() -> None:
    blocks = BlockManager(4, 16)
    first, second = blocks.allocate(2), blocks.allocate(2)
    for block_id, name in zip(first + second, "abcd", strict=True):
        blocks.register(block_id, named(name))
    blocks.release(first)
    blocks.release(second)
    blocks.hold(blocks.find([named("b")]))  # used again, so the youngest from now on
    blocks.release(first[1:])
    assert blocks.allocate(4) == [first[0], second[1], second[0], first[1]]


def test_only_the_head_of_a_chain_that_is_whole_is_found() -> None:
    blocks = BlockManager(4, 16)
    table = blocks.allocate(3)
    for block_id, name in zip(table, "abc", strict=True):
        blocks.register(block_id, named(name))
    assert blocks.find(map(named, "abc")) == table
    assert blocks.find(map(named, "abxc")) == table[:2]
    assert blocks.find(map(named, "xabc")) == []


def test_the_first_block_with_a_content_keeps_the_name() -> None:
    blocks = BlockManager(2, 16)
    first, second = blocks.allocate(1), blocks.allocate(1)
    blocks.register(first[0], named("a"))
    blocks.register(second[0], named("a"))
    assert blocks.find([named("a")]) == first
    blocks.release(second)
    assert blocks.find([named("a")]) == first
    assert blocks.allocate(1) == second, "the second one has no name, so its content is not kept"


@given(st.lists(st.lists(st.integers(0, 2**40), min_size=2, max_size=2), min_size=1, max_size=4), st.text(max_size=3))
def test_a_hash_depends_on_every_token_before_it_and_on_the_salt(chunks: list[list[int]], salt: str) -> None:
    def last_hash(salt: str, chunks: list[list[int]]) -> bytes:
        parent = root_hash(salt)
        for chunk in chunks:
            parent = block_hash(parent, chunk)
        return parent

    original = last_hash(salt, chunks)
    assert len(original) >= 16
    assert last_hash(salt, chunks) == original
    assert last_hash(salt + "x", chunks) != original
    assert last_hash(salt, [*chunks, [0, 0]]) != original
    for row, chunk in enumerate(chunks):
        for column in range(len(chunk)):
            changed = [list(tokens) for tokens in chunks]
            changed[row][column] += 1
            assert last_hash(salt, changed) != original


class Blocks(RuleBasedStateMachine):
    """Sequences take, share, name and leave blocks in any order; ``content`` says what a found block must hold."""

    NUM_BLOCKS = 6
    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(self.NUM_BLOCKS, 16)
        self.live: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @rule(target=tables, num_blocks=st.integers(1, 3))
    def allocate(self, num_blocks: int) -> list[int]:
        if num_blocks > self.blocks.num_free:
            return []
        table = self.blocks.allocate(num_blocks)
        for block_id in table:
            self.content.pop(block_id, None)
        self.live.append(table)
        return table

    @rule(table=tables, name=st.sampled_from("abcd"))
    def register(self, table: list[int], name: str) -> None:
        if any(table is live for live in self.live) and table[0] not in self.content:
            self.blocks.register(table[0], named(name))
            self.content[table[0]] = named(name)

    @rule(target=tables, names=st.text("abcd", min_size=1, max_size=3))
    def share(self, names: str) -> list[int]:
        found = self.blocks.find(map(named, names))
        assert [self.content[block_id] for block_id in found] == [named(name) for name in names][: len(found)]
        num_free = self.blocks.num_free
        num_unheld = self.blocks.num_unheld(set(found))
        self.blocks.hold(found)
        assert self.blocks.num_free == num_free - num_unheld
        if found:
            self.live.append(found)
        return found

    @rule(table=consumes(tables))
    def release(self, table: list[int]) -> None:
        if any(table is live for live in self.live):
            self.live = [live for live in self.live if live is not table]
            self.blocks.release(table)

    @invariant()
    def everything_adds_up(self) -> None:
        check_blocks(self.blocks, self.live)


Blocks.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestBlocks = Blocks.TestCase
