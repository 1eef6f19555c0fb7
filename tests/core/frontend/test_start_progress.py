"""Start phases of ranks, as a scrape shows them."""

from __future__ import annotations

from aphro_core.frontend.metrics import Metrics
from aphro_core.messages.requests import EngineProgress


def test_the_last_phase_of_each_rank() -> None:
    metrics = Metrics("m")
    metrics.starting.take(EngineProgress(rank=0, phase="rendezvous", done=1, total=1))
    metrics.starting.take(EngineProgress(rank=0, phase="weights", done=30, total=120))
    metrics.starting.take(EngineProgress(rank=1, phase="rendezvous", done=0, total=0))
    lines = metrics.render().decode().splitlines()
    assert 'aphro:rank_start_progress{model_name="m",phase="weights",rank="0"} 0.25' in lines
    assert 'aphro:rank_start_progress{model_name="m",phase="rendezvous",rank="1"} 0.0' in lines
    metrics.take_recovery()
    assert "rank_start_progress{" not in metrics.render().decode()
