"""Scheduler, journal and epochs over many seeds. ``SIMULATION_SEEDS=10000`` takes more of them."""

from __future__ import annotations

import os

import pytest

from tests.faults.simulation import simulate

NUM_SEEDS = int(os.environ.get("SIMULATION_SEEDS", "1000"))
NUM_BATCHES = 10


@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_every_history_ends_well(batch: int) -> None:
    num_deaths = num_failed_steps = 0
    for seed in range(batch, NUM_SEEDS, NUM_BATCHES):
        try:
            history = simulate(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}: simulate({seed}) repeats it")
            raise
        num_deaths += history.num_deaths
        num_failed_steps += history.num_failed_steps
    assert num_deaths > NUM_SEEDS / NUM_BATCHES / 2, "engines hardly died"
    assert num_failed_steps > 0
