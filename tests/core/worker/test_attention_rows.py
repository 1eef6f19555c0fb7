"""Rows of a step as both builders make them, read by both ways of attention: what a dense attention gives."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aphro_core.layers.attention import PagedAttention
from aphro_core.layers.batch import PagedRows
from aphro_core.layers.gathered_attention import GatheredAttention
from aphro_core.layers.norm import RMSNorm
from aphro_core.layers.rotary import RotaryEmbedding, Rotation
from aphro_core.messages.steps import NewSequence, ScheduledSequence, StepPlan
from aphro_core.models.spec import RopeSpec
from aphro_core.request import SamplingParams
from aphro_core.worker import gathered_rows
from aphro_core.worker.gathered_rows import GatheredRowsBuilder
from aphro_core.worker.paged_inputs import PagedInputs
from aphro_core.worker.sequences import apply_plan
from aphro_core.worker.span import Span
from aphro_core.worker.step_memory import StepMemory
from aphro_core.worker.step_shapes import StepShapes

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    lengths: tuple[tuple[int, int], ...]  # of each sequence: tokens in the cache, tokens of this step
    num_kv_heads: int = 2
    group: int = 3
    head_dim: int = 8
    block_size: int = 4
    window: int | None = None
    has_norm: bool = False
    softcap: float | None = None
    seed: int = 0

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


class Step:
    """Sequences with random K and V behind them, and random QKV rows for one step."""

    def __init__(self, case: Case) -> None:
        self.case = case
        source, generator = random.Random(case.seed), torch.Generator().manual_seed(case.seed)
        size, width = case.block_size, case.head_dim
        needed = [-(-sum(lengths) // size) for lengths in case.lengths]
        ids = list(range(sum(needed) + 2))
        source.shuffle(ids)
        self.cache = torch.full((len(ids), 2, case.num_kv_heads, size, width), float("nan"))
        ordered = sorted(case.lengths, key=lambda lengths: (lengths[1] > 1, sum(lengths)))
        self.spans = [
            Span(c, c + new, array("q", [ids.pop() for _ in range(-(-(c + new) // size))])) for c, new in ordered
        ]
        self.past = [torch.randn(2, span.start, case.num_kv_heads, width, generator=generator) for span in self.spans]
        for span, past in zip(self.spans, self.past, strict=True):
            for at in range(span.start):
                self.cache[span.blocks[at // size], :, :, at % size] = past[:, at]
        num_tokens = sum(new for _, new in ordered)
        self.qkv = torch.randn(num_tokens, case.num_heads + 2 * case.num_kv_heads, width, generator=generator)
        self.gains = torch.rand(2, width, generator=generator) + 0.5
        self.positions = torch.tensor([at for span in self.spans for at in range(span.start, span.stop)])

    @property
    def norms(self) -> tuple[RMSNorm | None, RMSNorm | None]:
        return (RMSNorm(self.gains[0], 1e-6), RMSNorm(self.gains[1], 1e-6)) if self.case.has_norm else (None, None)

    def rotation(self, positions: Tensor | None = None, *, is_whole: bool) -> Rotation:
        rope = RopeSpec(theta=100.0, rotary_dim=self.case.head_dim)
        positions = self.positions if positions is None else positions
        return RotaryEmbedding(rope, torch.float32, CPU).at(
            self.positions if positions is None else positions, halves=not is_whole
        )

    def split(self) -> tuple[list[Span], list[Span]]:
        return [s for s in self.spans if s.stop == s.start + 1], [s for s in self.spans if s.stop > s.start + 1]

    def expected(self) -> Tensor:
        """One query after the other, float64."""
        case = self.case
        qkv, rotation = self.qkv.clone(), self.rotation(is_whole=True)
        q, k, v = qkv.split([case.num_heads, case.num_kv_heads, case.num_kv_heads], dim=1)
        if case.has_norm:
            q, k = (
                x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
                for x, gain in zip((q, k), self.gains, strict=True)
            )
        q, k = q.clone(), k.clone()
        rotation.apply_(q)
        rotation.apply_(k)
        out, row = [], 0
        for span, past in zip(self.spans, self.past, strict=True):
            new = span.stop - span.start
            keys, values = (torch.cat([old, x[row : row + new]]).double() for old, x in zip(past, (k, v), strict=True))
            for at in range(new):
                last = span.start + at
                first = 0 if case.window is None else max(0, last - case.window + 1)
                grouped = q[row + at].double().view(case.num_kv_heads, case.group, case.head_dim)
                scores = torch.einsum("hgd,khd->hgk", grouped, keys[first : last + 1]) * case.scale
                if case.softcap is not None:
                    scores = (scores / case.softcap).tanh() * case.softcap
                attended = torch.einsum("hgk,khd->hgd", scores.softmax(-1), values[first : last + 1])
                out.append(attended.flatten())
            row += new
        return torch.stack(out)


def multiplied(step: Step) -> Tensor:
    """As gathered, but also the shortest chunk by products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathered_rows, "_SHORT_KEYS", 0)
        return gathered(step)


def gathered(step: Step) -> Tensor:
    case = step.case
    builder = GatheredRowsBuilder(
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        block_size=case.block_size,
        windows={None, case.window},
        dtype=torch.float32,
    )
    sizes = (case.num_heads, case.num_kv_heads, case.head_dim)
    attention = GatheredAttention(*sizes, case.window, torch.float32, *step.norms, case.scale, case.softcap)
    rows = builder.build(*step.split())
    return attention(step.qkv.clone(), step.rotation(is_whole=True), rows, step.cache.clone())


def paged(step: Step) -> Tensor:
    """The kernels' references: what a GPU is given, computed here."""
    shapes = StepShapes(len(step.spans) + 3, 32, 192, lambda num_tokens: False)
    sizes = {"max_rows": len(step.spans) + 3, "max_model_len": 64, "block_size": step.case.block_size}
    memory = StepMemory(**sizes, shapes=shapes, device=CPU)
    scheduled, new = [], []
    for seq_id, span in enumerate(step.spans):
        num_tokens = span.stop - span.start
        scheduled.append(ScheduledSequence(seq_id, span.start, num_tokens, [], list(span.blocks), True))
        new.append(NewSequence(seq_id, [0] * span.stop, span.stop, SamplingParams(), 0))
    plan, sequences = StepPlan(1, scheduled, new), {}
    apply_plan(plan, sequences)
    staged = PagedInputs(memory, shapes).stage(plan, sequences)
    batch = memory.mixed_batch(staged) if staged.chunks else memory.padded_batch(staged.shape)
    padding = batch.num_tokens - len(step.qkv)
    assert batch.positions.tolist() == [*step.positions.tolist(), *[0] * padding]
    attention = PagedAttention(step.case.window, *step.norms, step.case.scale, step.case.softcap)
    assert isinstance(batch.cache_rows, PagedRows)
    qkv = torch.cat((step.qkv, torch.full((padding, *step.qkv.shape[1:]), torch.nan)))
    rotation = step.rotation(batch.positions, is_whole=False)
    return attention(qkv, rotation, batch.cache_rows, step.cache.clone())[: len(step.qkv)]


lengths = st.tuples(st.integers(0, 40), st.one_of(st.just(1), st.integers(1, 20)))
shapes = st.sampled_from([(1, 8), (3, 4), (7, 10)])  # few: each is compiled
cases = st.builds(
    lambda shape, **rest: Case(group=shape[0], head_dim=shape[1], **rest),
    shapes,
    lengths=st.lists(lengths, min_size=1, max_size=8).map(tuple),
    num_kv_heads=st.integers(1, 3),
    block_size=st.sampled_from([1, 4, 16]),
    window=st.one_of(st.none(), st.integers(1, 30)),
    has_norm=st.booleans(),
    seed=st.integers(0, 2**16),
)


@pytest.mark.parametrize("way", [gathered, multiplied, paged])
@settings(max_examples=60, deadline=None)
@given(case=cases)
def test_any_step_equals_dense_attention(way: object, case: Case) -> None:
    assert callable(way)
    step = Step(case)
    torch.testing.assert_close(way(step).double(), step.expected(), rtol=1e-4, atol=1e-5)


LONG = Case(
    lengths=((300, 1), (2, 1), (290, 1), (0, 280), (150, 150)), num_kv_heads=3, head_dim=8, group=1, block_size=16
)


@pytest.mark.parametrize("window", [None, 100, 5])
def test_long_rows_beside_short_ones(window: int | None) -> None:
    """Enough keys for more than one tile with the constants as they are."""
    step = Step(replace(LONG, window=window))
    torch.testing.assert_close(gathered(step).double(), step.expected(), rtol=1e-4, atol=1e-5)


def test_capped_scores() -> None:
    step = Step(Case(lengths=((40, 1), (3, 1), (0, 20)), softcap=0.7, head_dim=4, block_size=16))
    for way in (gathered, multiplied, paged):
        torch.testing.assert_close(way(step).double(), step.expected(), rtol=1e-4, atol=1e-5)


def builder(**overrides: int) -> GatheredRowsBuilder:
    sizes = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "block_size": 16} | overrides
    return GatheredRowsBuilder(**sizes, windows={None}, dtype=torch.bfloat16)


def test_a_tile_of_a_long_chunk_stays_small() -> None:
    chunk = builder().build([], [Span(4096, 8192, array("q", range(512)))]).chunks[None][0]
    assert sum(tile.stop - tile.start for tile in chunk.tiles) == 4096
    assert all(9 * (tile.stop - tile.start) * tile.values.shape[1] <= 2**21 for tile in chunk.tiles)
    assert chunk.tiles[0].values.shape[1] < 4200  # keys that no query of a tile sees are not multiplied
