"""Layers made alike: one of each kind stands for all, and whatever a kernel hangs on makes another kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor

from aphro_core.layers.alike import one_of_each


@dataclass(slots=True)
class Part:
    weight: Tensor
    bias: Tensor | None = None


@dataclass
class Layer:
    part: Part
    window: int | None = None
    scale: float = 0.5
    calls: list[object] = field(default_factory=list)
    of: object = None  # what leads back

    def __post_init__(self) -> None:
        self.of = self


def layer(*, dtype: torch.dtype = torch.float32, columns: int = 8, offset: int = 0, **options: object) -> Layer:
    memory = torch.zeros(4 * columns + offset, dtype=dtype)
    return Layer(Part(memory[offset:].view(4, columns)), **options)


def test_first_last_and_one_of_each_kind() -> None:
    layers = [layer(window=window) for window in (None, None, 5, None, 5, None, None)]
    assert one_of_each(layers) == [0, 1, 2, 6]
    assert one_of_each([layer() for _ in range(32)]) == [0, 1, 31]
    assert one_of_each([layer(), layer()]) == [0, 1]
    assert one_of_each([layer()]) == [0]
    assert one_of_each([]) == []


def odd_strides() -> Layer:
    return Layer(Part(torch.zeros(8, 4).t()))


@pytest.mark.parametrize(
    "other",
    [
        layer(dtype=torch.float16),
        layer(columns=16),
        layer(offset=1),  # begins 4 bytes behind 16: a kernel may not load it by sixteens
        layer(scale=0.25),
        layer(calls=[print]),
        layer(calls=[partial(layer, window=3)]),
        Layer(Part(torch.zeros(4, 8), torch.zeros(4))),
        odd_strides(),
    ],
)
def test_what_makes_another_kind(other: Layer) -> None:
    assert one_of_each([layer(), layer(), layer(), other, layer(), layer()]) == [0, 1, 3, 5]


def test_what_cannot_be_looked_into_is_alike_if_it_is_the_same() -> None:
    same = iter(())
    assert one_of_each([layer(calls=[same]) for _ in range(5)]) == [0, 1, 4]
    assert one_of_each([layer(calls=[iter(())]) for _ in range(5)]) == [0, 1, 2, 3, 4]


def test_bound_methods_are_of_their_objects() -> None:
    layers = [layer(calls=[Layer(Part(torch.zeros(size))).__post_init__]) for size in (4, 4, 4, 8, 4)]
    assert one_of_each(layers) == [0, 1, 3, 4]
