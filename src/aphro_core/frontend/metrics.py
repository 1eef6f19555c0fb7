"""What Prometheus is told, under the names that vLLM uses today; and the health record."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Literal

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from aphro_core.frontend.start_progress import StartProgress
from aphro_core.messages.requests import EngineReady, EngineStats
from aphro_core.messages.steps import WorkerLoaded
from aphro_core.request import FinishReason


def _bounds(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


# upper bounds, seconds: vLLM's, with finer ones between tokens for small models
_FIRST_TOKEN: Final = _bounds(".001 .005 .01 .02 .04 .06 .08 .1 .25 .5 .75 1 2.5 5 7.5 10 20 40 80 160 640 2560")
_BETWEEN_TOKENS: Final = _bounds(".001 .0025 .005 .01 .025 .05 .075 .1 .15 .2 .3 .4 .5 .75 1 2.5 5 7.5 10 20 40 80")
_WHOLE_REQUEST: Final = _bounds(".3 .5 .8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680")
_TOKENS: Final = tuple(float(digit * 10**power) for power in range(7) for digit in (1, 2, 5))

Phase = Literal["starting", "ready", "stalled", "recovering", "dead"]


@dataclass(frozen=True, slots=True)
class Health:
    """``ready``: requests are answered. ``seconds_since_step`` is None before the first step."""

    phase: Phase
    ready: bool
    detail: str
    step: int
    seconds_since_step: float | None


class Histogram:
    """Counts by upper bound. Unlike the client library's it takes many equal values in one call, and no lock."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, name: str, text: str, model_name: str) -> HistogramMetricFamily:
        labels = [*map(str, self._bounds), "+Inf"]
        buckets = list(zip(labels, map(float, accumulate(self._counts)), strict=True))
        family = HistogramMetricFamily(name, text, labels=["model_name"])
        family.add_metric([model_name], buckets, self._sum)
        return family


class Metrics(Collector):
    """Plain numbers, turned into families when somebody asks. One event loop writes and reads them."""

    content_type: Final = CONTENT_TYPE_LATEST

    def __init__(self, model_name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._model_name = model_name
        self._clock = clock
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self.stats: EngineStats | None = None
        self.num_blocks = 0
        self._ranks: Sequence[WorkerLoaded] = ()
        self._earlier = EngineStats(0, 0, 0, 0, 0, 0, 0)  # the sums of what came before the last death
        self._last_step_at: float | None = None
        self._num_open = 0  # choices
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._num_recoveries = self._num_failed_steps = 0
        self.starting = StartProgress()
        self._finished: dict[FinishReason, int] = {"stop": 0, "length": 0, "abort": 0}
        self._first_token = Histogram(_FIRST_TOKEN)
        self._between_tokens = Histogram(_BETWEEN_TOKENS)
        self._whole_request = Histogram(_WHOLE_REQUEST)
        self._prompt_sizes = Histogram(_TOKENS)
        self._generation_sizes = Histogram(_TOKENS)

    @property
    def seconds_since_step(self) -> float | None:
        return None if self._last_step_at is None else self._clock() - self._last_step_at

    def take_engine(self, ready: EngineReady) -> None:
        """An engine is there, the first one or another."""
        self.num_blocks = ready.num_blocks
        self._ranks = ready.ranks

    def take_request(self, num_choices: int) -> None:
        self._num_open += num_choices

    def take_first_token(self, num_prompt_tokens: int, seconds: float) -> None:
        self._num_prompt_tokens += num_prompt_tokens
        self._first_token.observe(seconds)

    def take_step(self, stats: EngineStats, now: float, num_tokens: int, intervals: Mapping[float, int]) -> None:
        """``intervals``: seconds since a choice's token before -> how many choices."""
        self.stats = stats
        self._last_step_at = now
        self._num_generation_tokens += num_tokens
        for seconds, times in intervals.items():
            self._between_tokens.observe(seconds, times)

    def take_recovery(self) -> None:
        """An engine has died and another one is started."""
        self._num_recoveries += 1
        self.starting.forget()
        self._forget_steps()

    def take_failed_step(self) -> None:
        """A step failed and its engine lives."""
        self._num_failed_steps += 1
        self._forget_steps()

    def _forget_steps(self) -> None:
        """The next step count begins anew; what the old one said stays in the counters."""
        if self.stats is not None:
            earlier, stats = self._earlier, self.stats
            self._earlier = EngineStats(
                earlier.step + stats.step,
                0,
                0,
                0,
                earlier.num_preemptions + stats.num_preemptions,
                earlier.num_prefix_queries + stats.num_prefix_queries,
                earlier.num_prefix_hits + stats.num_prefix_hits,
            )
            self.stats = None

    def take_finished(self, reason: FinishReason) -> None:
        """One choice is done, or given up."""
        self._num_open -= 1
        self._finished[reason] += 1

    def take_answered(self, num_prompt_tokens: int, num_output_tokens: int, seconds: float) -> None:
        """All choices of a request have finished."""
        self._whole_request.observe(seconds)
        self._prompt_sizes.observe(num_prompt_tokens)
        self._generation_sizes.observe(num_output_tokens)

    def render(self) -> bytes:
        """The text that a scrape gets, as ``content_type`` says."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield self.starting.family(self._model_name)
        yield from self._rank_gauges()
        yield from self._counters()
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From the request taken to its first token.", self._first_token),
            ("inter_token_latency_seconds", "Between two tokens of one choice.", self._between_tokens),
            ("e2e_request_latency_seconds", "From the request taken to its last token.", self._whole_request),
            ("request_prompt_tokens", "Prompt tokens of an answered request.", self._prompt_sizes),
            ("request_generation_tokens", "Generated tokens of an answered request.", self._generation_sizes),
        ):
            yield histogram.family(f"aphro:{name}", text, self._model_name)

    def _gauges(self) -> Iterator[Metric]:
        # the engine speaks only when it steps: what was aborted since then is not running any more
        stats = self.stats
        num_running = min(stats.num_running, self._num_open) if stats else 0
        used = stats.num_blocks_used / self.num_blocks if stats and self.num_blocks and self._num_open else 0.0
        for name, text, value in (
            ("num_requests_running", "Choices of requests that the engine computes.", num_running),
            ("num_requests_waiting", "Choices of requests that wait for the engine.", self._num_open - num_running),
            ("kv_cache_usage_perc", "Share of the KV cache blocks in use, 1 = all.", used),
            ("kv_cache_num_blocks", "KV cache blocks of the engine.", self.num_blocks),
            ("engine_step_age_seconds", "Since the last step; grows while idle.", self.seconds_since_step),
        ):
            if value is not None:
                family = GaugeMetricFamily(f"aphro:{name}", text, labels=["model_name"])
                family.add_metric([self._model_name], value)
                yield family

    def _rank_gauges(self) -> Iterator[Metric]:
        """What each rank holds; the labels say where it is."""
        sizes: tuple[tuple[str, str, Callable[[WorkerLoaded], int]], ...] = (
            ("rank_weights_bytes", "Weights on a rank.", lambda loaded: loaded.weights_bytes),
            ("rank_kv_cache_bytes", "KV cache on a rank.", lambda loaded: self.num_blocks * loaded.block_bytes),
        )
        for name, text, size in sizes if self._ranks else ():
            family = GaugeMetricFamily(f"aphro:{name}", text, labels=["model_name", "rank", "host", "device"])
            for loaded in self._ranks:
                family.add_metric([self._model_name, str(loaded.rank), loaded.host, loaded.device], size(loaded))
            yield family

    def _counters(self) -> Iterator[Metric]:
        stats, earlier = self.stats or EngineStats(0, 0, 0, 0, 0, 0, 0), self._earlier
        preemptions = earlier.num_preemptions + stats.num_preemptions
        for name, text, value in (
            ("engine_steps", "Steps of the engine.", earlier.step + stats.step),
            ("engine_recoveries", "Engines that died and were replaced.", self._num_recoveries),
            ("failed_steps", "Steps that failed while the engine lived on.", self._num_failed_steps),
            ("num_preemptions", "Sequences that gave up their blocks to others.", preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up.", earlier.num_prefix_queries + stats.num_prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found.", earlier.num_prefix_hits + stats.num_prefix_hits),
            ("prompt_tokens", "Prompt tokens computed or found in the cache.", self._num_prompt_tokens),
            ("generation_tokens", "Tokens generated.", self._num_generation_tokens),
        ):
            family = CounterMetricFamily(f"aphro:{name}", text, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family
        finished = CounterMetricFamily(
            "aphro:request_success", "Finished choices of requests.", labels=["model_name", "finished_reason"]
        )
        for reason, count in self._finished.items():
            finished.add_metric([self._model_name, reason], count)
        yield finished
