"""KV blocks: who owns which, how many readers each has, and which full blocks can be found again by their content."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def root_hash(salt: str) -> bytes:
    """Where the chain of a sequence's block hashes begins: sequences with different salts share no block."""
    return hashlib.sha256(b"kv-block-root:" + salt.encode()).digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """32 bytes that name a full block's content: its tokens and, by ``parent``, all that come before them.

    A collision would hand one client's attention another client's keys, hence a cryptographic hash over fields of
    fixed width. Token ids must fit in 64 bits.
    """
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


class BlockManager:
    """``num_blocks`` blocks of ``block_size`` tokens, each with a count of the sequences that hold it.

    A block is in one of three states: held (count > 0), free, or cached: held by nobody, but its content is still
    there and named by a hash, so that it can be found again until its space is needed. Cached blocks count as free,
    and the one that was left longest ago goes first. Every operation is O(blocks it touches).
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks is {num_blocks} and block_size {block_size}, allowed: 1 and up")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block used last is the next one taken
        self._cached: OrderedDict[int, None] = OrderedDict()  # the block left longest ago first
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, the cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix of a chain of hashes. They are not held yet: see :meth:`hold`."""
        found = []
        for name in hashes:
            block_id = self._by_hash.get(name)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def num_unheld(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks would leave the free ones if they were held."""
        return sum(not self._ref_counts[block_id] for block_id in block_ids)

    def hold(self, block_ids: Iterable[int]) -> None:
        """Add one reader to each of these found blocks."""
        for block_id in block_ids:
            if not self._ref_counts[block_id]:
                del self._cached[block_id]
            self._ref_counts[block_id] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Blocks for one new owner, content forgotten. The caller has looked at :attr:`num_free` before."""
        assert num_blocks <= self.num_free, f"{num_blocks} blocks wanted, {self.num_free} are free"
        block_ids = [self._free.pop() if self._free else self._evict() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        return block_ids

    def release(self, block_ids: Iterable[int]) -> None:
        """Take one reader from each block of a sequence.

        The last block goes first, so that the head of a prefix, which more sequences share, is kept longest.
        """
        for block_id in reversed(tuple(block_ids)):
            assert self._ref_counts[block_id] > 0, f"block {block_id} is released and nobody holds it"
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id]:
                continue
            if self._hashes[block_id] is None:
                self._free.append(block_id)
            else:
                self._cached[block_id] = None

    def register(self, block_id: int, name: bytes) -> None:
        """Make a full block findable by its hash. The first block with a content keeps the name."""
        assert self._ref_counts[block_id] > 0, f"block {block_id} is registered and nobody holds it"
        if self._by_hash.setdefault(name, block_id) == block_id:
            self._hashes[block_id] = name

    def _evict(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        name = self._hashes[block_id]
        assert name is not None
        self._hashes[block_id] = None
        del self._by_hash[name]
        return block_id
