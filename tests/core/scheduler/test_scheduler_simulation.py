"""Thousands of random runs: whatever the order of events, every client gets the tokens that it would get alone."""

from __future__ import annotations

import random

import pytest

from aphro_core.errors import RequestError
from aphro_core.messages.requests import AddSequence
from tests.core.scheduler.simulation import Setup, Simulation, sequence

NUM_SEEDS = 2400
NUM_BATCHES = 24


def random_setup(rng: random.Random) -> Setup:
    """Small limits; the cache mostly holds two or three of the longest sequences, so that they fight for it."""
    block_size, max_model_len = rng.choice([1, 2, 3, 4]), rng.randint(4, 40)
    return Setup(
        num_blocks=max(1, int(max_model_len / block_size * rng.choice([1.0, 1.3, 2.0]))),
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=rng.choice([1, 2, 4, 6]),
        max_num_batched_tokens=rng.choice([1, 2, 5, 8, 16, 64]),
        max_num_prefill_tokens=rng.choice([None, None, 64]),
        context_per_token=rng.choice([None, None, 1, 6]),
        free_context=rng.choice([0, 0, 10]),
        tokens_unit=rng.choice([1, 4]),
        run_ahead=(run_ahead := rng.choice([0, 1, 1, 2])),
        max_in_flight=run_ahead + rng.randint(1, 4),
        enable_prefix_caching=rng.random() < 0.7,
        vocab_size=rng.choice([3, 50]),
    )


def random_sequence(rng: random.Random, seq_id: int, setup: Setup) -> AddSequence:
    """Few different tokens and some long runs of them, so that prompts are often prefixes of each other."""
    length = rng.randint(1, rng.choice([2, 6, setup.max_model_len]))
    prompt = [rng.choice([0, 1])] * length
    if rng.random() < 0.5:
        prompt[rng.randrange(length) :] = [2] * rng.randint(1, 3)
    return sequence(
        seq_id,
        prompt,
        max_tokens=rng.randint(1, 32),
        stop=(1,) if rng.random() < 0.2 else (),
        salt=rng.choice(["", "", "other"]),
        prompt_logprobs=rng.random() < 0.15,
        repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.1]),
    )


class RandomRun:
    """One seed: a random setup and random operations on it."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.simulation = Simulation(random_setup(self._rng))
        self._num_ids = 0

    def run(self) -> None:
        operations = [self._add, self.simulation.schedule, self._answer, self._abort, self.simulation.restart]
        for _ in range(self._rng.randint(5, 40)):
            self._rng.choices(operations, [4, 6, 6, 0.8, 0.1])[0]()
        self.simulation.drain()

    def _add(self) -> None:
        for _ in range(self._rng.choice([1, 1, 3])):
            self._try_add(self._num_ids)
            self._num_ids += 1

    def _try_add(self, seq_id: int) -> None:
        try:
            self.simulation.add(random_sequence(self._rng, seq_id, self.simulation.setup))
        except RequestError:
            assert seq_id not in self.simulation.clients

    def _answer(self) -> None:
        if self.simulation.in_flight:
            self.simulation.answer()

    def _abort(self) -> None:
        """Any ids, known or not; sometimes one of them comes back at once."""
        seq_ids = self._rng.sample(range(self._num_ids + 2), k=min(self._num_ids, 2))
        self.simulation.abort(seq_ids)
        for seq_id in seq_ids:
            if seq_id < self._num_ids and seq_id not in self.simulation.clients and self._rng.random() < 0.3:
                self._try_add(seq_id)


@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_any_order_of_events_gives_the_tokens_of_a_lonely_run(batch: int) -> None:
    num_preemptions = num_hits = 0
    for seed in range(batch, NUM_SEEDS, NUM_BATCHES):
        run = RandomRun(seed)
        try:
            run.run()
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        num_preemptions += run.simulation.num_preemptions
        num_hits += run.simulation.scheduler.stats().num_prefix_hits
    assert num_preemptions > 40, "the runs are too easy to mean anything"
    assert num_hits > 40
