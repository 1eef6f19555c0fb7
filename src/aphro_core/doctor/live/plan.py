"""What the live check measures: rounds of pairs, the sizes that an LLM sends, and what they cost a token. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from aphro_core.doctor.live.protocol import Timing, Work

_MIB: Final = 1 << 20
PREFILL_TOKENS: Final = 2048  # a chunk of a prompt, as the scheduler makes them by default
DECODE_ROWS: Final = 32  # sequences that decode together


@dataclass(frozen=True)
class ModelSizes:
    """What of a model decides how much its ranks say to each other. ``dtype_bytes``: of the hidden states."""

    name: str
    hidden_size: int
    num_layers: int
    dtype_bytes: int = 2

    def hidden_bytes(self, tokens: int) -> int:
        return tokens * self.hidden_size * self.dtype_bytes

    @property
    def num_all_reduces(self) -> int:
        """In one forward pass: one for the embedding, and in each layer one behind attention and one behind the MLP."""
        return 2 * self.num_layers + 1


ASSUMED_MODEL: Final = ModelSizes("a model of 32 layers and 4096 hidden", 4096, 32)


def rounds_of_pairs(num_ranks: int) -> list[list[tuple[int, int]]]:
    """Every pair once, in rounds whose pairs have no rank in common (the circle method): a round may run at once."""
    seats: list[int | None] = [*range(num_ranks), *([None] if num_ranks % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):
        opposite = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in opposite if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return [sorted(pairs) for pairs in rounds if pairs]


def pair_works(model: ModelSizes, *, is_cuda: bool) -> list[Work]:
    """Latency, a middle size, what saturates a link; and a hand-over from stage to stage, of decode and of prefill."""
    return [
        Work("all_reduce", 8),
        Work("all_reduce", _MIB),
        Work("all_reduce", (64 if is_cuda else 16) * _MIB, max_repeats=10),
        Work("hand_over", model.hidden_bytes(1)),
        Work("hand_over", model.hidden_bytes(PREFILL_TOKENS), max_repeats=10),
    ]


def group_works(model: ModelSizes, *, is_cuda: bool) -> list[Work]:
    """A tensor-parallel group's: the all-reduce of a decode step alone and batched, and of a prefill chunk."""
    works = [
        Work("all_reduce", model.hidden_bytes(1), max_repeats=200),
        Work("all_reduce", model.hidden_bytes(DECODE_ROWS), max_repeats=100),
        Work("all_reduce", model.hidden_bytes(PREFILL_TOKENS), max_repeats=10),
    ]
    graphs = [Work("graph_all_reduce", model.hidden_bytes(rows), max_repeats=200) for rows in (1, DECODE_ROWS)]
    return [*works, *graphs] if is_cuda else works


def ms_per_token(model: ModelSizes, decode: Timing) -> float:
    """Milliseconds that a decode step spends in all-reduces, if none overlaps with anything."""
    return 1000 * model.num_all_reduces * decode.seconds


def bus_bytes_per_second(timing: Timing, num_ranks: int) -> float:
    """Bytes that pass the slowest link: an all-reduce moves 2 (n - 1) / n of them through each (nccl-tests)."""
    factor = 1.0 if timing.kind == "hand_over" else 2 * (num_ranks - 1) / num_ranks
    return timing.num_bytes * factor / timing.seconds


def render_timings(timings: Sequence[Timing], num_ranks: int) -> str:
    """``all-reduce 8 B 0.05 ms, 1 MiB 1.2 ms (0.87 GB/s); hand-over ...``: GB/s is bus bandwidth."""
    parts: dict[str, list[str]] = {}
    for timing in timings:
        text = f"{render_bytes(timing.num_bytes)} "
        if not timing.repeats:
            text += f"left out (about {timing.seconds:.0f} s)"
        elif timing.num_bytes < _MIB:
            text += f"{1000 * timing.seconds:.3g} ms"
        else:
            rate = bus_bytes_per_second(timing, num_ranks) / 1e9
            text += f"{1000 * timing.seconds:.3g} ms ({rate:.3g} GB/s)"
        parts.setdefault(timing.kind.replace("_", "-"), []).append(text + ("" if timing.is_right else " WRONG"))
    return "; ".join(f"{kind} {', '.join(texts)}" for kind, texts in parts.items())


def render_bytes(num_bytes: int) -> str:
    for unit, size in (("MiB", _MIB), ("KiB", 1024)):
        if num_bytes >= size:
            return f"{num_bytes / size:g} {unit}" if num_bytes % size == 0 else f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} B"
