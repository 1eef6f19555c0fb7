"""One sequence as the scheduler sees it: its tokens, how far they are computed, and its block table."""

from __future__ import annotations

import msgspec

from aphro_core.messages.requests import AddSequence
from aphro_core.messages.steps import NewSequence, TokenLogprobs
from aphro_core.request import FinishReason
from aphro_core.scheduler.block_manager import block_hash, root_hash


class Sequence:
    """Prompt and output so far. ``arrival`` orders sequences; ``max_len`` is the length in tokens at which it ends.

    ``num_computed`` counts the tokens whose keys and values are in the cache once the plans handed out are done, and
    ``num_sent`` the tokens that the workers were given. Both start again after a preemption. ``num_unread`` tokens
    behind ``token_ids`` are drawn by plans in flight: the workers have them, nobody here has seen them.
    """

    __slots__ = (
        "add",
        "arrival",
        "block_hashes",
        "block_table",
        "last_planned",
        "max_len",
        "needs_its_tokens",
        "num_cached",
        "num_computed",
        "num_in_flight",
        "num_registered",
        "num_sent",
        "num_unread",
        "prompt_logprobs",
        "seq_id",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(self, add: AddSequence, *, arrival: int, max_model_len: int) -> None:
        self.add = add
        self.seq_id = add.seq_id
        self.arrival = arrival
        self.max_len = min(len(add.prompt_token_ids) + add.max_tokens, max_model_len)
        self.token_ids = add.prompt_token_ids + add.output_token_ids
        self.stop_token_ids = frozenset(add.stop_token_ids)
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []  # of its first full blocks, as far as they were asked for
        self.num_computed = 0
        self.num_registered = 0  # blocks, from the first, that are in the prefix cache
        self.num_sent = 0
        self.num_cached: int | None = None  # prompt tokens found in the prefix cache when it first ran
        self.num_in_flight = 0  # plans that hold a row of it and are not answered
        self.num_unread = 0
        self.last_planned = 0  # step id of the last plan with a row of it
        # penalties count tokens: nobody can draw the next one who has not read the one before
        dials = (add.sampling.repetition_penalty, add.sampling.frequency_penalty, add.sampling.presence_penalty)
        self.needs_its_tokens = dials != (1.0, 0.0, 0.0)
        # None: not wanted, or delivered. Whoever has got tokens has got these with the first of them.
        wanted = add.sampling.prompt_logprobs is not None and not add.output_token_ids
        self.prompt_logprobs: list[TokenLogprobs] | None = [] if wanted else None

    @property
    def is_running(self) -> bool:
        """Whether it has blocks; otherwise it waits."""
        return bool(self.block_table)

    @property
    def is_in_flight(self) -> bool:
        return self.num_in_flight > 0

    @property
    def num_pending(self) -> int:
        """Tokens that no plan has covered yet, unread ones included: 1 for a sequence that decodes."""
        return len(self.token_ids) + self.num_unread - self.num_computed

    @property
    def is_full(self) -> bool:
        """Whether the plans in flight draw its last token: the length at which it ends is known beforehand."""
        return len(self.token_ids) + self.num_unread >= self.max_len

    def end(self) -> tuple[FinishReason | None, int | None]:
        """Why no token comes after the last one, and the stop token if it was one; (None, None) if one comes."""
        last = self.token_ids[-1]
        if last in self.stop_token_ids and len(self.token_ids) > len(self.add.prompt_token_ids):
            return "stop", last
        return ("length", None) if len(self.token_ids) >= self.max_len else (None, None)

    def hash_blocks(self, num_blocks: int, block_size: int) -> list[bytes]:
        """The hashes of its first full blocks, ``num_blocks`` or more; each is computed once in its life."""
        known = self.block_hashes
        if len(known) < num_blocks:
            parent = known[-1] if known else root_hash(self.add.cache_salt)
            for start in range(len(known) * block_size, num_blocks * block_size, block_size):
                parent = block_hash(parent, self.token_ids[start : start + block_size])
                known.append(parent)
        return known

    def introduce(self) -> NewSequence:
        """What the workers are told before its first row, and before its first row after a preemption."""
        sampling = self.add.sampling
        if self.prompt_logprobs is None and sampling.prompt_logprobs is not None:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        self.num_sent = len(self.token_ids)
        return NewSequence(
            seq_id=self.seq_id,
            token_ids=self.token_ids.copy(),
            num_prompt_tokens=len(self.add.prompt_token_ids),
            sampling=sampling,
            seed=self.add.seed,
            stop_token_ids=self.add.stop_token_ids,
        )

    def restart(self) -> None:
        """Nothing is computed any more, its blocks are gone: the tokens so far are computed again, like a prompt."""
        self.num_computed = 0
        if self.prompt_logprobs is not None:
            self.prompt_logprobs = []

    def take_token(self, token_id: int) -> tuple[FinishReason | None, int | None]:
        """Append the token that was drawn; what :meth:`end` says then."""
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids or len(self.token_ids) >= self.max_len:
            return self.end()
        return None, None

    @property
    def has_first_output(self) -> bool:
        """Whether :meth:`take_first_output` has anything to say."""
        return bool(self.num_cached) or self.prompt_logprobs is not None

    def take_first_output(self) -> tuple[list[TokenLogprobs] | None, int]:
        """What goes with its first output only: the prompt's logprobs and how many prompt tokens were cached."""
        prompt_logprobs, num_cached = self.prompt_logprobs, self.num_cached or 0
        self.prompt_logprobs, self.num_cached = None, 0
        return prompt_logprobs, num_cached
