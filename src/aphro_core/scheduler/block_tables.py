"""Gives sequences their blocks: at the start from the prefix cache as far as it reaches, then one at a time."""

from __future__ import annotations

from itertools import islice

from aphro_core.scheduler.block_manager import BlockManager
from aphro_core.scheduler.sequence import Sequence


class BlockTables:
    """Fills, grows and takes back the block tables of sequences, and keeps what is full in the prefix cache.

    Two rules of the workers make it safe to register a block when the step that fills it is scheduled, before its
    content exists. They apply plans in order, and in each layer they write the keys and values of all tokens of a plan
    before any of its rows reads. So later plans may read it, and rows of the same plan too: n equal prompts share one
    prefill. If the sequence that fills it is aborted on the way, its step is computed all the same.
    """

    def __init__(self, blocks: BlockManager, *, enable_prefix_caching: bool) -> None:
        self._blocks = blocks
        self._enable_prefix_caching = enable_prefix_caching
        self.num_prefix_queries = 0  # prompt tokens looked up, when their sequence first ran
        self.num_prefix_hits = 0  # prompt tokens found

    def fill(self, sequence: Sequence, num_spare: int) -> bool:
        """Give it blocks for all tokens that it has. False, and nothing done, unless ``num_spare`` blocks stay free.

        Sets ``num_computed`` to the tokens whose keys and values were found; at least one token is left to compute.
        """
        blocks, num_tokens = self._blocks, len(sequence.token_ids)
        found = self._find_prefix(sequence)
        num_new = blocks.blocks_for(num_tokens) - len(found)
        if num_new + blocks.num_unheld(found) + num_spare > blocks.num_free:
            return False
        blocks.hold(found)
        sequence.block_table = found + blocks.allocate(num_new)
        sequence.num_registered = len(found)
        sequence.num_computed = len(found) * blocks.block_size
        if sequence.num_cached is None:
            self._count_first_lookup(sequence)
        return True

    def grow(self, sequence: Sequence) -> list[int] | None:
        """Make room for the token that it decodes next: the ids of the new blocks, None if there is no free one."""
        if len(sequence.block_table) * self._blocks.block_size > sequence.num_computed:
            return []
        if not self._blocks.num_free:
            return None
        new_block_ids = self._blocks.allocate(1)
        sequence.block_table += new_block_ids
        return new_block_ids

    def register(self, sequence: Sequence) -> None:
        """Let others find the blocks that its steps, as far as scheduled, fill with tokens that are known."""
        num_full = min(sequence.num_computed, len(sequence.token_ids)) // self._blocks.block_size
        if num_full <= sequence.num_registered or not self._enable_prefix_caching:
            return
        hashes = sequence.hash_blocks(num_full, self._blocks.block_size)
        for index in range(sequence.num_registered, num_full):
            self._blocks.register(sequence.block_table[index], hashes[index])
        sequence.num_registered = num_full

    def release(self, sequence: Sequence) -> None:
        """Take all its blocks. It is in no plan that is still unanswered."""
        self._blocks.release(sequence.block_table)
        sequence.block_table = []

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        if not self._may_reuse(sequence):
            return []
        num_blocks = (len(sequence.token_ids) - 1) // self._blocks.block_size
        return self._blocks.find(islice(sequence.hash_blocks(num_blocks, self._blocks.block_size), num_blocks))

    def _may_reuse(self, sequence: Sequence) -> bool:
        # the logprobs of a prompt need every one of its rows computed
        return self._enable_prefix_caching and sequence.prompt_logprobs is None

    def _count_first_lookup(self, sequence: Sequence) -> None:
        num_prompt_tokens = len(sequence.add.prompt_token_ids)
        sequence.num_cached = min(sequence.num_computed, num_prompt_tokens)
        if self._may_reuse(sequence):
            self.num_prefix_queries += num_prompt_tokens
            self.num_prefix_hits += sequence.num_cached
