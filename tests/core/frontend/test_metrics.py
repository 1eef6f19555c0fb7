"""What a scrape reads: names and numbers."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from aphro_core.frontend.metrics import Histogram, Metrics
from aphro_core.messages.requests import EngineReady, EngineStats
from aphro_core.messages.steps import WorkerLoaded


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def read(metrics: Metrics) -> dict[str, float]:
    """ "name{the other labels}" -> value, every sample of model "m"."""
    samples = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "m"
            samples[sample.name + "".join(f"{{{value}}}" for value in labels.values())] = sample.value
    return samples


def stats(**changes: int) -> EngineStats:
    values = dict.fromkeys(EngineStats.__struct_fields__, 0) | changes
    return EngineStats(**values)


def test_all_names_are_there_before_the_first_request() -> None:
    samples = read(Metrics("m"))
    expected = """num_requests_running num_requests_waiting kv_cache_usage_perc kv_cache_num_blocks engine_steps_total
    num_preemptions_total prefix_cache_queries_total prefix_cache_hits_total prompt_tokens_total generation_tokens_total
    time_to_first_token_seconds_count inter_token_latency_seconds_sum e2e_request_latency_seconds_count
    request_prompt_tokens_count request_generation_tokens_sum"""
    for name in expected.split():
        assert samples[f"aphro:{name}"] == 0, name
    for reason in ("stop", "length", "abort"):
        assert samples[f"aphro:request_success_total{{{reason}}}"] == 0
    assert "aphro:engine_step_age_seconds" not in samples, "there was no step yet"


def test_a_request_is_counted() -> None:
    clock = Clock()
    metrics = Metrics("m", clock)
    metrics.num_blocks = 8
    metrics.take_request(2)
    assert read(metrics)["aphro:num_requests_waiting"] == 2
    metrics.take_first_token(5, 0.03)
    figures = stats(
        step=3, num_running=1, num_blocks_used=2, num_preemptions=4, num_prefix_queries=50, num_prefix_hits=16
    )
    metrics.take_step(figures, clock.now, 2, {0.004: 3, 0.2: 1})
    clock.now += 1.5
    samples = read(metrics)
    assert samples["aphro:num_requests_running"] == 1
    assert samples["aphro:num_requests_waiting"] == 1
    assert samples["aphro:kv_cache_usage_perc"] == 0.25
    assert samples["aphro:engine_steps_total"] == 3
    assert samples["aphro:engine_step_age_seconds"] == 1.5
    assert samples["aphro:num_preemptions_total"] == 4
    assert samples["aphro:prefix_cache_queries_total"] == 50
    assert samples["aphro:prefix_cache_hits_total"] == 16
    assert samples["aphro:prompt_tokens_total"] == 5
    assert samples["aphro:generation_tokens_total"] == 2
    assert samples["aphro:inter_token_latency_seconds_count"] == 4
    assert samples["aphro:inter_token_latency_seconds_sum"] == pytest.approx(0.212)
    assert samples["aphro:inter_token_latency_seconds_bucket{0.005}"] == 3
    metrics.take_finished("stop")
    metrics.take_finished("abort")
    metrics.take_answered(5, 2, 0.4)
    samples = read(metrics)
    assert samples["aphro:request_success_total{stop}"] == 1
    assert samples["aphro:request_success_total{abort}"] == 1
    assert samples["aphro:e2e_request_latency_seconds_bucket{0.5}"] == 1
    assert samples["aphro:request_prompt_tokens_sum"] == 5
    # the engine has not stepped since, but nothing is open any more
    assert samples["aphro:num_requests_running"] == 0
    assert samples["aphro:kv_cache_usage_perc"] == 0


def test_histogram_bounds_are_inclusive_and_cumulative() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    histogram.observe(2.0, times=2)
    buckets = [
        (sample.labels["le"], sample.value)
        for sample in histogram.family("x", "", "m").samples
        if "le" in sample.labels
    ]
    assert buckets == [("1.0", 2), ("2.0", 5), ("+Inf", 6)]


def test_ranks_say_where_they_are_and_what_they_hold() -> None:
    metrics = Metrics("m")
    ranks = [WorkerLoaded(rank, 1, "vm", f"cuda:{rank}", 700 + rank, 0, 0, 10, 99, 0) for rank in (0, 1)]
    metrics.take_engine(EngineReady(8, 64, ranks))
    samples = read(metrics)
    assert samples["aphro:kv_cache_num_blocks"] == 8
    assert samples["aphro:rank_weights_bytes{cuda:1}{vm}{1}"] == 701
    assert samples["aphro:rank_kv_cache_bytes{cuda:0}{vm}{0}"] == 80
