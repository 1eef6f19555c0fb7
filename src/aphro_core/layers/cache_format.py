"""How K and V are kept in the cache: in the run's dtype, or in float8 with a scale for each of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import torch

PLAIN_SCALES: Final = (1.0, 1.0)


@dataclass(frozen=True, slots=True)
class CacheFormat:
    """``scales``: layer -> what its K and V in the cache are multiplied with; 1 for layers that are not there."""

    dtype: torch.dtype
    scales: Mapping[int, tuple[float, float]] = field(default_factory=lambda: MappingProxyType({}))

    def scales_of(self, layer: int) -> tuple[float, float]:
        return self.scales.get(layer, PLAIN_SCALES)
