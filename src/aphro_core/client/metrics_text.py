"""What a scrape of ``/metrics`` says: aphro's names, which are vLLM's behind another prefix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from aphro_core.client.percentiles import histogram_quantile
from aphro_core.errors import ServerError

_OLDER_NAMES: Final = {"gpu_cache_usage_perc": "kv_cache_usage_perc"}


@dataclass(frozen=True, slots=True)
class RankRow:
    """One rank of a server and what it holds, in bytes."""

    rank: int
    host: str
    device: str
    weights_bytes: int
    kv_bytes: int


@dataclass(frozen=True)
class Scrape:
    """``values``: name without prefix -> sum over all labels; ``histograms``: name -> upper bound -> count."""

    at: float  # seconds, of any clock that does not jump
    values: Mapping[str, float]
    histograms: Mapping[str, Mapping[float, float]]
    ranks: tuple[RankRow, ...] = ()
    model: str | None = None


def parse_scrape(text: str, at: float) -> Scrape:
    """Raises ServerError for what is no metrics text."""
    values: dict[str, float] = {}
    histograms: dict[str, dict[float, float]] = {}
    held: dict[tuple[int, str, str], dict[str, int]] = {}
    model = None
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.rpartition(":")[2]
                name = _OLDER_NAMES.get(name, name)
                model = sample.labels.get("model_name", model)
                if "le" in sample.labels:
                    counts = histograms.setdefault(name.removesuffix("_bucket"), {})
                    bound = float(sample.labels["le"])
                    counts[bound] = counts.get(bound, 0.0) + sample.value
                elif "rank" in sample.labels and "device" in sample.labels:
                    key = (int(sample.labels["rank"]), sample.labels.get("host", ""), sample.labels["device"])
                    held.setdefault(key, {})[name] = int(sample.value)
                else:
                    values[name] = values.get(name, 0.0) + sample.value
    except (ValueError, KeyError, IndexError) as error:
        raise ServerError(f"/metrics is no Prometheus text: {error}") from error
    ranks = tuple(
        RankRow(*key, sizes.get("rank_weights_bytes", 0), sizes.get("rank_kv_cache_bytes", 0))
        for key, sizes in sorted(held.items())
    )
    return Scrape(at, values, histograms, ranks, model)


@dataclass(frozen=True)
class Load:
    """What a server does, from two scrapes; None is what they do not tell. Rates are per second, times in seconds."""

    running: int | None
    waiting: int | None
    kv_share: float | None  # 0 to 1
    kv_blocks: int | None
    output_rate: float | None
    prompt_rate: float | None
    first_token: float | None  # the median of what came between the scrapes
    between_tokens: float | None
    preemptions: int | None  # since the server's start
    recoveries: int | None


def read_load(before: Scrape | None, now: Scrape) -> Load:
    """Without an earlier scrape there are no rates and no times."""

    def count(name: str) -> int | None:
        return int(now.values[name]) if name in now.values else None

    def rate(name: str) -> float | None:
        if before is None or name not in now.values or now.at <= before.at:
            return None
        gained = now.values[name] - before.values.get(name, 0.0)
        return (gained if gained >= 0 else now.values[name]) / (now.at - before.at)  # fallen: the server began anew

    def median(name: str) -> float | None:
        earlier = before.histograms.get(name, {}) if before is not None else None
        return None if earlier is None else histogram_quantile(earlier, now.histograms.get(name, {}), 0.5)

    return Load(
        running=count("num_requests_running"),
        waiting=count("num_requests_waiting"),
        kv_share=now.values.get("kv_cache_usage_perc"),
        kv_blocks=count("kv_cache_num_blocks"),
        output_rate=rate("generation_tokens_total"),
        prompt_rate=rate("prompt_tokens_total"),
        first_token=median("time_to_first_token_seconds"),
        between_tokens=median("inter_token_latency_seconds"),
        preemptions=count("num_preemptions_total"),
        recoveries=count("engine_recoveries_total"),
    )
