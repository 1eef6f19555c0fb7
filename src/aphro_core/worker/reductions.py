"""Arg-max and sum along long rows: quick on a CPU, and the same for a row whatever rows stand beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

_BLOCK: Final = 128


def argmax(x: Tensor) -> Tensor:
    """``[rows, width]`` -> ``[rows]`` int64, the first largest of each row. NaN is not expected."""
    if x.is_cuda:
        return x.argmax(dim=-1)
    # torch has no vector code for argmax on a CPU, but for amax: find the block first (5 times as fast)
    width = x.shape[1]
    start = _by_block(x, torch.amax).argmax(dim=-1, keepdim=True) * _BLOCK
    ids = (start + torch.arange(_BLOCK)).clamp_(max=width - 1)
    return ids.gather(1, x.gather(1, ids).argmax(dim=-1, keepdim=True)).squeeze(1)


def row_sum(x: Tensor) -> Tensor:
    """``[rows, width]`` -> ``[rows, 1]``. A plain sum of one long row is split over threads, that of many is not."""
    return _by_block(x, torch.sum).sum(dim=-1, keepdim=True)


def _by_block(x: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """``[rows, ceil(width / block)]``: each block reduced."""
    num_whole, rest = divmod(x.shape[1], _BLOCK)
    whole: Tensor = reduce(x[:, : num_whole * _BLOCK].view(x.shape[0], num_whole, _BLOCK), dim=-1)
    if not rest:
        return whole
    return torch.cat([whole, reduce(x[:, num_whole * _BLOCK :], dim=-1).unsqueeze(1)], dim=1)
