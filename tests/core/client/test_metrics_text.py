"""Metrics read back: aphro's own rendering, vLLM's names, counters that began anew."""

from __future__ import annotations

import pytest

from aphro_core.client.metrics_text import parse_scrape, read_load
from aphro_core.errors import ServerError
from aphro_core.frontend.metrics import Metrics
from aphro_core.messages.requests import EngineStats

VLLM = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 3.0
# TYPE vllm:gpu_cache_usage_perc gauge
vllm:gpu_cache_usage_perc{model_name="m"} 0.5
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{model_name="m"} 300.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{le="0.1",model_name="m"} 4.0
vllm:time_to_first_token_seconds_bucket{le="+Inf",model_name="m"} 4.0
vllm:time_to_first_token_seconds_count{model_name="m"} 4.0
vllm:time_to_first_token_seconds_sum{model_name="m"} 0.2
"""


def test_own_metrics_come_back() -> None:
    metrics = Metrics("m")
    metrics.num_blocks = 8
    before = parse_scrape(metrics.render().decode(), at=10.0)
    metrics.take_request(3)
    metrics.take_first_token(20, 0.03)
    metrics.take_step(EngineStats(1, 2, 0, 4, 6, 0, 0), 1.0, 30, {0.03: 10})
    load = read_load(before, parse_scrape(metrics.render().decode(), at=12.0))
    assert (load.running, load.waiting, load.kv_share, load.kv_blocks) == (2, 1, 0.5, 8)
    assert (load.output_rate, load.prompt_rate, load.preemptions, load.recoveries) == (15.0, 10.0, 6, 0)
    assert load.first_token is not None
    assert 0.02 <= load.first_token <= 0.04
    assert load.between_tokens is not None
    assert 0.025 <= load.between_tokens <= 0.05


def test_vllm_is_understood() -> None:
    scrape = parse_scrape(VLLM, at=1.0)
    load = read_load(None, scrape)
    assert (load.running, load.kv_share, load.output_rate, load.first_token) == (5, 0.5, None, None)
    assert (load.waiting, load.recoveries, scrape.model, scrape.ranks) == (None, None, "m", ())
    assert read_load(parse_scrape("", at=0.0), scrape).first_token == pytest.approx(0.05)


def test_a_server_that_began_anew() -> None:
    scrape = parse_scrape(VLLM, at=3.0)
    earlier = parse_scrape("# TYPE x:generation_tokens_total counter\nx:generation_tokens_total 9000.0\n", at=1.0)
    assert read_load(earlier, scrape).output_rate == 150.0


@pytest.mark.parametrize("text", ["<html>no</html>", "a{b=c} d", "name value"])
def test_no_metrics(text: str) -> None:
    with pytest.raises(ServerError, match="no Prometheus text"):
        parse_scrape(text, at=0.0)
