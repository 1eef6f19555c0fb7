"""A benchmark's figures: what was recorded of each request, and the report of them all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from aphro_core.client.percentiles import Spread, spread

LATENCIES: Final = {  # key of the report -> what a table calls it
    "time_to_first_token_seconds": "first token",
    "inter_token_latency_seconds": "between tokens",
    "time_per_output_token_seconds": "per output token",
    "request_latency_seconds": "whole request",
}


@dataclass(slots=True)
class Record:
    """One request, in seconds on one clock. ``gaps``: between two arrivals of text. ``error`` None: a whole answer."""

    number: int
    started_at: float
    first_at: float | None = None
    ended_at: float | None = None
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def is_whole(self) -> bool:
        return self.error is None and self.ended_at is not None

    @property
    def first_token(self) -> float | None:
        return None if self.first_at is None else self.first_at - self.started_at

    @property
    def latency(self) -> float | None:
        return None if self.ended_at is None else self.ended_at - self.started_at

    @property
    def per_output_token(self) -> float | None:
        """Mean time of the tokens behind the first."""
        if self.first_at is None or self.ended_at is None or self.output_tokens < 2:
            return None
        return (self.ended_at - self.first_at) / (self.output_tokens - 1)


@dataclass(frozen=True)
class BenchReport:
    """Rates are of whole answers over the time from the first request's start to the last one's end."""

    seconds: float
    num_requests: int
    num_whole: int
    errors: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    latencies: dict[str, Spread | None]
    client_cpu_share: float  # of one core: near 1 this client, not the server, is what was measured

    @property
    def requests_per_second(self) -> float:
        return self.num_whole / self.seconds if self.seconds else 0.0

    @property
    def output_tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds if self.seconds else 0.0

    @property
    def total_tokens_per_second(self) -> float:
        return (self.prompt_tokens + self.output_tokens) / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """Stable keys; a latency is null where nothing was measured."""
        return {
            "duration_seconds": self.seconds,
            "requests": self.num_requests,
            "completed": self.num_whole,
            "failed": sum(self.errors.values()),
            "errors": self.errors,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "requests_per_second": self.requests_per_second,
            "output_tokens_per_second": self.output_tokens_per_second,
            "total_tokens_per_second": self.total_tokens_per_second,
            **{name: found.to_json() if found else None for name, found in self.latencies.items()},
            "client_cpu_share": self.client_cpu_share,
        }


def build_report(records: Sequence[Record], num_requests: int, cpu_seconds: float) -> BenchReport:
    """Failed and unfinished requests count in nothing but their own number."""
    whole = [record for record in records if record.is_whole]
    ends = [record.ended_at for record in records if record.ended_at is not None]
    seconds = max(ends) - min(record.started_at for record in records) if ends else 0.0
    measured: dict[str, Sequence[float | None]] = {
        "time_to_first_token_seconds": [record.first_token for record in whole],
        "inter_token_latency_seconds": [gap for record in whole for gap in record.gaps],
        "time_per_output_token_seconds": [record.per_output_token for record in whole],
        "request_latency_seconds": [record.latency for record in whole],
    }
    return BenchReport(
        seconds=seconds,
        num_requests=num_requests,
        num_whole=len(whole),
        errors=dict(Counter(record.error for record in records if record.error is not None).most_common()),
        prompt_tokens=sum(record.prompt_tokens for record in whole),
        output_tokens=sum(record.output_tokens for record in whole),
        latencies={name: spread([value for value in values if value is not None]) for name, values in measured.items()},
        client_cpu_share=cpu_seconds / seconds if seconds else 0.0,
    )


def rows_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Every request with all its times, for whoever wants to look closer."""
    return [asdict(record) for record in records]
