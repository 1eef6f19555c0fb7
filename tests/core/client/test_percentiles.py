"""Percentiles, of values and of histograms; the plan of a benchmark; its report."""

from __future__ import annotations

import json
import math
import random
import statistics
from bisect import bisect_left
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphro_core.client.bench_report import LATENCIES, Record, build_report, rows_of
from aphro_core.client.percentiles import SHARES, histogram_quantile, percentile, spread
from aphro_core.client.workload import Lengths, parse_lengths, plan_requests, prompt_ids, prompt_words
from aphro_core.errors import UsageError

VALUES = st.lists(st.floats(0, 1e6), min_size=2, max_size=200)


@given(VALUES)
def test_percentiles_are_those_of_the_standard_library(values: list[float]) -> None:
    expected = statistics.quantiles(values, n=100, method="inclusive")
    for share in SHARES.values():
        assert percentile(sorted(values), share) == pytest.approx(expected[round(share * 100) - 1], abs=1e-6)


@given(VALUES)
def test_a_spread_is_in_order(values: list[float]) -> None:
    found = spread(values)
    assert found is not None
    assert min(values) <= found.p50 <= found.p90 <= found.p95 <= found.p99 <= found.max == max(values)
    assert found.mean == pytest.approx(statistics.fmean(values))


def test_a_spread_of_one_and_of_none() -> None:
    one = spread([3.0])
    assert one is not None
    assert set(one.to_json().values()) == {3.0}
    assert spread([]) is None


BOUNDS = [0.1, 0.5, 1.0, 5.0, math.inf]


def histogram(values: list[float]) -> dict[float, float]:
    return {bound: float(sum(value <= bound for value in values)) for bound in BOUNDS}


@given(st.lists(st.floats(0.001, 4.9), max_size=50), st.lists(st.floats(0.001, 4.9), min_size=1), st.floats(0.01, 1))
def test_a_histograms_quantile_is_in_the_right_bucket(earlier: list[float], since: list[float], share: float) -> None:
    found = histogram_quantile(histogram(earlier), histogram(earlier + since), share)
    assert found is not None
    true = sorted(since)[max(math.ceil(len(since) * share) - 1, 0)]
    bucket = bisect_left(BOUNDS, true)
    assert (BOUNDS[bucket - 1] if bucket else 0.0) <= found <= BOUNDS[bucket] + 1e-9


def test_histograms_at_their_edges() -> None:
    assert histogram_quantile({}, {}, 0.5) is None
    assert histogram_quantile(histogram([1.0]), histogram([1.0]), 0.5) is None
    assert histogram_quantile({}, histogram([100.0]), 0.5) == 5.0  # beyond the last bound: at least that
    begun_anew = histogram_quantile(histogram([0.01] * 9), histogram([0.7]), 0.5)
    assert begun_anew is not None
    assert 0.5 <= begun_anew <= 1.0


@pytest.mark.parametrize(("text", "lengths"), [("1", (1, 1)), ("128", (128, 128)), (" 64-512 ", (64, 512))])
def test_lengths(text: str, lengths: tuple[int, int]) -> None:
    found = parse_lengths(text, "--input-length")
    assert (found.least, found.most) == lengths
    assert parse_lengths(str(found), "--input-length") == found


@pytest.mark.parametrize("text", ["", "0", "-1", "8-4", "many", "1.5", "1-2-3"])
def test_no_lengths(text: str) -> None:
    with pytest.raises(UsageError, match="--input-length is"):
        parse_lengths(text, "--input-length")


@given(st.integers(1, 60), st.floats(0.1, 1000), st.integers(0, 9))
def test_a_plan_is_one_of_its_seed(count: int, rate: float, seed: int) -> None:
    plan = plan_requests(count, rate, Lengths(3, 9), Lengths(1, 4), seed)
    assert plan == plan_requests(count, rate, Lengths(3, 9), Lengths(1, 4), seed)
    assert [each.number for each in plan] == list(range(count))
    assert plan[0].arrives_at == 0
    assert all(before.arrives_at <= after.arrives_at for before, after in pairwise(plan))
    assert all(3 <= each.input_tokens <= 9 and 1 <= each.output_tokens <= 4 for each in plan)
    assert all(len(prompt_ids([5, 6], each, seed)) == each.input_tokens for each in plan)
    assert all(len(prompt_words(each, seed).split()) == each.input_tokens for each in plan)


def test_arrivals_keep_their_rate() -> None:
    plan = plan_requests(2000, 50.0, Lengths(1, 1), Lengths(1, 1), seed=1)
    assert plan[-1].arrives_at == pytest.approx(2000 / 50, rel=0.1)
    assert {each.arrives_at for each in plan_requests(9, math.inf, Lengths(1, 1), Lengths(1, 1), 1)} == {0.0}


def test_a_report_of_known_times() -> None:
    whole = Record(0, 10.0, 10.5, 12.5, [1.0, 1.0], prompt_tokens=7, output_tokens=3)
    other = Record(1, 11.0, 11.1, 12.0, [0.9], prompt_tokens=5, output_tokens=2)
    failed = [Record(number, 10.0, ended_at=10.1, error="boom") for number in (2, 3)]
    report = build_report([whole, other, *failed], num_requests=5, cpu_seconds=0.5)
    assert (report.seconds, report.num_whole, report.errors) == (2.5, 2, {"boom": 2})
    assert (report.prompt_tokens, report.output_tokens) == (12, 5)
    assert (report.requests_per_second, report.output_tokens_per_second) == (0.8, 2.0)
    means = {name: found.mean for name, found in report.latencies.items() if found}
    assert means == pytest.approx(
        {
            "time_to_first_token_seconds": 0.3,
            "inter_token_latency_seconds": 2.9 / 3,
            "time_per_output_token_seconds": (1.0 + 0.9) / 2,
            "request_latency_seconds": 1.75,
        }
    )
    assert report.client_cpu_share == 0.2
    assert LATENCIES.keys() <= json.loads(json.dumps(report.to_json())).keys()
    assert [row["error"] for row in rows_of([whole, *failed])] == [None, "boom", "boom"]


def test_a_report_of_nothing() -> None:
    report = build_report([], num_requests=3, cpu_seconds=1.0)
    assert (report.seconds, report.output_tokens_per_second, report.client_cpu_share) == (0.0, 0.0, 0.0)
    assert set(report.latencies.values()) == {None}


def test_prompts_share_no_beginning() -> None:
    plan = plan_requests(50, math.inf, Lengths(32, 32), Lengths(1, 1), seed=random.randrange(10**6))
    heads = {tuple(prompt_ids(range(1000), each, 0)[:8]) for each in plan}
    assert len(heads) == 50
