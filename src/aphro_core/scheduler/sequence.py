"""One sequence as the scheduler sees it: its tokens, how far they are computed, and its block table."""

from __future__ import annotations

import msgspec

from aphro_core.messages.requests import AddSequence
from aphro_core.messages.steps import NewSequence, TokenLogprobs
from aphro_core.request import FinishReason
from aphro_core.scheduler.block_manager import block_hash, root_hash


class Sequence:
    """Prompt and output so far. ``arrival`` orders sequences; ``max_len`` is the length in tokens at which it ends.

    ``num_computed`` counts the tokens whose keys and values are written by plans handed out so far, and ``num_sent``
    the tokens that the workers were given. Both start again from nothing after a preemption.
    """

    __slots__ = (
        "add",
        "arrival",
        "block_hashes",
        "block_table",
        "is_aborted",
        "is_in_flight",
        "is_known_to_workers",
        "max_len",
        "num_cached",
        "num_computed",
        "num_registered",
        "num_sent",
        "prompt_logprobs",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(self, add: AddSequence, *, arrival: int, max_model_len: int) -> None:
        self.add = add
        self.arrival = arrival
        self.max_len = min(len(add.prompt_token_ids) + add.max_tokens, max_model_len)
        self.token_ids = add.prompt_token_ids + add.output_token_ids
        self.stop_token_ids = frozenset(add.stop_token_ids)
        self.block_table: list[int] = []  # empty unless the sequence runs
        self.block_hashes: list[bytes] = []  # of its first full blocks, as far as somebody asked
        self.num_computed = 0
        self.num_registered = 0  # blocks, from the first, that are in the prefix cache
        self.num_sent = 0
        self.num_cached: int | None = None  # prompt tokens found in the cache when it first ran
        self.is_in_flight = False
        self.is_aborted = False
        self.is_known_to_workers = False
        # those who were given tokens before were given the prompt's logprobs with the first of them
        wanted = add.sampling.prompt_logprobs is not None and not add.output_token_ids
        self.prompt_logprobs: list[TokenLogprobs] | None = [] if wanted else None

    @property
    def seq_id(self) -> int:
        return self.add.seq_id

    @property
    def num_pending(self) -> int:
        """Known tokens that no plan has covered yet: 1 for a sequence that decodes."""
        return len(self.token_ids) - self.num_computed

    @property
    def has_new_output(self) -> bool:
        """Whether a token was drawn since it was added."""
        return len(self.token_ids) > len(self.add.prompt_token_ids) + len(self.add.output_token_ids)

    def finish_reason(self) -> FinishReason | None:
        """Why nothing comes after the last token, None while something does."""
        if len(self.token_ids) > len(self.add.prompt_token_ids) and self.token_ids[-1] in self.stop_token_ids:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_len else None

    def hash_blocks(self, num_blocks: int, block_size: int) -> list[bytes]:
        """The hashes of its first full blocks, at least ``num_blocks``; each is computed once in its life."""
        known = self.block_hashes
        if len(known) < num_blocks:
            parent = known[-1] if known else root_hash(self.add.cache_salt)
            for start in range(len(known) * block_size, num_blocks * block_size, block_size):
                parent = block_hash(parent, self.token_ids[start : start + block_size])
                known.append(parent)
        return known

    def introduce(self) -> NewSequence:
        """What the workers get to know of it before its first row, or its first row after a preemption."""
        sampling = self.add.sampling
        if self.prompt_logprobs is None and sampling.prompt_logprobs is not None:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        self.is_known_to_workers = True
        self.num_sent = len(self.token_ids)
        return NewSequence(
            seq_id=self.seq_id,
            token_ids=self.token_ids.copy(),
            num_prompt_tokens=len(self.add.prompt_token_ids),
            sampling=sampling,
            seed=self.add.seed,
            stop_token_ids=self.add.stop_token_ids,
        )

    def unsent_token_ids(self) -> list[int]:
        """The tokens that the workers do not know, which after this call they do."""
        token_ids = self.token_ids[self.num_sent :]
        self.num_sent += len(token_ids)
        return token_ids

    def restart(self) -> None:
        """Forget everything that was computed (its blocks are gone): the tokens so far become the prompt."""
        self.block_table = []
        self.num_computed = self.num_registered = 0
        if self.prompt_logprobs is not None:
            self.prompt_logprobs = []
