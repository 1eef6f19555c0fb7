"""A rank driven by hand-made plans: scattered blocks, chunks of any size, prefix hits. Shared by the runner's tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from aphro_core.checkpoint.open import open_checkpoint
from aphro_core.distributed.links import Links
from aphro_core.distributed.stage_links import StageLink
from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.layers.decoder import Decoder
from aphro_core.messages.steps import NewSequence, ScheduledSequence, StepPlan, StepResult
from aphro_core.models.registry import load_spec
from aphro_core.parallel.shard import ShardingPlan, build_plan
from aphro_core.request import SamplingParams
from aphro_core.worker.kv_cache import allocate_kv_cache
from aphro_core.worker.loader import load_weights
from aphro_core.worker.model_runner import ModelRunner

CPU = torch.device("cpu")
BLOCK_SIZE = 8
NUM_BLOCKS = 96
GREEDY = SamplingParams(temperature=0.0, logprobs=5)


def sharding_plan(folder: Path, tp: int, pp: int) -> ShardingPlan:
    with open_checkpoint(folder) as checkpoint:
        return build_plan(load_spec(checkpoint.hf_config), tp, pp)


def build_runner(
    folder: Path,
    plan: ShardingPlan,
    rank: int = 0,
    links: Links | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    is_deterministic: bool = False,
) -> ModelRunner:
    with open_checkpoint(folder) as checkpoint:
        spec, shard = load_spec(checkpoint.hf_config), plan.ranks[rank]
        weights = load_weights(checkpoint, spec, shard, dtype, CPU)
    links = links or Links(TensorParallelGroup(0, 1), StageLink(None, None))
    decoder = Decoder(spec, shard, weights, links.tensor, is_deterministic=is_deterministic)
    caches = allocate_kv_cache(shard, spec, NUM_BLOCKS, BLOCK_SIZE, dtype, CPU)
    for cache in caches:
        cache.fill_(float("nan"))  # whatever reads a key that nobody wrote shows
    sizes: dict[str, Any] = {"block_size": BLOCK_SIZE, "dtype": dtype, "device": CPU}
    return ModelRunner(spec, shard, decoder, caches, links, **sizes, is_deterministic=is_deterministic)


class Planner:
    """Makes legal plans, as the scheduler would: tokens and blocks are handed over once, block tables are scattered."""

    def __init__(self, seed: int = 0) -> None:
        self._free = list(range(NUM_BLOCKS))
        random.Random(seed).shuffle(self._free)
        self._step = 0
        self._new: list[NewSequence] = []
        self._released: list[int] = []
        self.tokens: dict[int, list[int]] = {}
        self.tables: dict[int, list[int]] = {}
        self._computed: dict[int, int] = {}
        self._known_tokens: dict[int, int] = {}  # to the workers
        self._known_blocks: dict[int, int] = {}
        self.drawing: list[int] = []  # the sequences that the last plan draws for

    def add(
        self,
        seq_id: int,
        tokens: Sequence[int],
        sampling: SamplingParams = GREEDY,
        *,
        shared_blocks: Sequence[int] = (),
        num_prompt_tokens: int | None = None,
    ) -> None:
        """``shared_blocks`` hold the first tokens already: a prefix hit."""
        prompt = len(tokens) if num_prompt_tokens is None else num_prompt_tokens
        self._new.append(NewSequence(seq_id, list(tokens), prompt, sampling, seed=seq_id))
        self.tokens[seq_id] = list(tokens)
        self.tables[seq_id] = list(shared_blocks)
        self._computed[seq_id] = len(shared_blocks) * BLOCK_SIZE
        self._known_tokens[seq_id] = len(tokens)
        self._known_blocks[seq_id] = 0

    def release(self, seq_id: int) -> None:
        """Its blocks come back first in, first out, so that the next sequence gets them with what stands in them."""
        self._released.append(seq_id)
        self._free += reversed(self.tables.pop(seq_id))

    def remaining(self, seq_id: int) -> int:
        """Known tokens that are not computed yet: 1 in decode."""
        return len(self.tokens[seq_id]) - self._computed[seq_id]

    def plan(self, shares: dict[int, int]) -> StepPlan:
        """``shares``: sequence -> how many of its tokens to compute."""
        self._step += 1
        scheduled = [self._schedule(seq_id, count) for seq_id, count in shares.items()]
        plan = StepPlan(self._step, scheduled, self._new, self._released)
        self.drawing = [row.seq_id for row in scheduled if row.samples]
        self._new, self._released = [], []
        return plan

    def take(self, result: StepResult | None) -> StepResult:
        assert result is not None
        assert result.step_id == self._step
        for seq_id, token_id in zip(self.drawing, result.token_ids, strict=True):
            self.tokens[seq_id].append(token_id)
        return result

    def _schedule(self, seq_id: int, count: int) -> ScheduledSequence:
        tokens, table, start = self.tokens[seq_id], self.tables[seq_id], self._computed[seq_id]
        stop = start + count
        assert count
        assert stop <= len(tokens)
        table += [self._free.pop() for _ in range(-(-stop // BLOCK_SIZE) - len(table))]
        new_tokens, new_blocks = tokens[self._known_tokens[seq_id] :], table[self._known_blocks[seq_id] :]
        self._computed[seq_id] = stop
        self._known_tokens[seq_id], self._known_blocks[seq_id] = len(tokens), len(table)
        return ScheduledSequence(seq_id, start, count, new_tokens, new_blocks, samples=stop == len(tokens))
