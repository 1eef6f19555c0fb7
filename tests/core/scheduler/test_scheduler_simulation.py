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
    return Setup(
        num_blocks=rng.randint(2, 20),
        block_size=rng.choice([1, 2, 3, 4]),
        max_model_len=rng.randint(4, 32),
        max_num_seqs=rng.randint(1, 6),
        max_num_batched_tokens=rng.choice([1, 2, 5, 8, 16, 64]),
        max_in_flight=rng.randint(1, 4),
        enable_prefix_caching=rng.random() < 0.8,
        vocab_size=rng.choice([3, 50]),
    )


def random_sequence(rng: random.Random, seq_id: int, setup: Setup) -> AddSequence:
    """Few tokens and lengths, so that prompts are often prefixes of each other."""
    length = rng.randint(1, max(1, setup.max_model_len - 2))
    prompt = [rng.choice([0, 1])] * length
    if rng.random() < 0.5:
        prompt[rng.randrange(length) :] = [2] * rng.randint(1, 3)
    return sequence(
        seq_id,
        prompt,
        max_tokens=rng.randint(1, 24),
        stop=(1,) if rng.random() < 0.3 else (),
        salt=rng.choice(["", "", "other"]),
        prompt_logprobs=rng.random() < 0.15,
    )


def run(seed: int) -> Simulation:
    rng = random.Random(seed)
    simulation = Simulation(random_setup(rng))
    next_id = 0
    for _ in range(rng.randint(5, 40)):
        match rng.choices(["add", "schedule", "answer", "abort", "restart"], [4, 6, 6, 0.8, 0.1])[0]:
            case "add":
                for _ in range(rng.choice([1, 1, 3])):
                    try:
                        simulation.add(random_sequence(rng, next_id, simulation.setup))
                    except RequestError:
                        continue
                    next_id += 1
            case "schedule":
                simulation.schedule()
            case "answer":
                if simulation.in_flight:
                    simulation.answer()
            case "abort":
                simulation.abort(rng.sample(range(next_id + 2), k=min(next_id, 2)))
            case "restart":
                simulation.restart()
    simulation.drain()
    return simulation


@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_any_order_of_events_gives_the_tokens_of_a_lonely_run(batch: int) -> None:
    num_preemptions = num_hits = 0
    for seed in range(batch, NUM_SEEDS, NUM_BATCHES):
        try:
            simulation = run(seed)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
        num_preemptions += simulation.num_preemptions
        num_hits += simulation.scheduler.stats().num_prefix_hits
    assert num_preemptions > 20, "the runs are too easy to mean anything"
    assert num_hits > 20
