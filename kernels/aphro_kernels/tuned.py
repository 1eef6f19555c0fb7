"""Which kernel and configuration a shape takes on a device: the tables in ``tuned/``, one file a kind of device.

``python bench/tune.py --output kernels/aphro_kernels/tuned/NAME.json`` measures one. A device without a file, and a
shape that its file does not hold, take the library's kernel: slower at worst, never wrong.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aphro_kernels.skinny_linear import MAX_ROWS, SkinnyConfig, rows_bucket

_FOLDER = Path(__file__).parent / "tuned"
_Key = tuple[int, int, bool, int, str]  # n, k, is_gated, rows, dtype


def skinny_config(weight: Tensor, num_rows: int, *, is_gated: bool = False) -> SkinnyConfig | None:
    """For ``num_rows`` rows times ``weight``; None: ``torch.nn.functional.linear`` is faster, or nothing is known."""
    if not weight.is_cuda or not 0 < num_rows <= MAX_ROWS:
        return None
    n, k = weight.shape
    key = (n // 2 if is_gated else n, k, is_gated, rows_bucket(num_rows), str(weight.dtype).removeprefix("torch."))
    return _table(torch.cuda.get_device_name(weight.device)).get(key)


@cache
def _table(device_name: str) -> dict[_Key, SkinnyConfig | None]:
    for path in sorted(_FOLDER.glob("*.json")):
        content = json.loads(path.read_text())
        if content["device"] == device_name:
            return {_key_of(entry): _config_of(entry) for entry in content["entries"]}
    return {}


def _key_of(entry: dict[str, Any]) -> _Key:
    return entry["n"], entry["k"], entry["is_gated"], entry["rows"], entry["dtype"]


def _config_of(entry: dict[str, Any]) -> SkinnyConfig | None:
    return None if entry["config"] is None else SkinnyConfig(**entry["config"])
