"""Which kernel and configuration a shape takes on a device: the tables in ``tuned/``, one file a kind of device.

``python bench/tune.py --output kernels/aphro_kernels/tuned/NAME.json`` measures one. A device without a file takes the
library's kernel: slower at worst, never wrong. So does a shape that its file does not hold, but for one row, where the
table leaves no doubt and a rule serves all shapes.

``tuned/cublas`` has files of the same kind (``bench/tune_cublas.py``): which of cuBLAS's own algorithms a product takes
where the library would choose a slower one.
"""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from aphro_kernels.cublas_lt import LtAlgorithm, LtProduct, library_version, lt_product
from aphro_kernels.skinny_linear import MAX_ROWS, SkinnyConfig, rows_bucket

_LOG: Final = logging.getLogger(__name__)
_FOLDER: Final = Path(__file__).parent / "tuned"
_PROGRAMS: Final = 512  # of the rule: about four a multiprocessor
_Key = tuple[int, int, bool, int]  # n, k, is_gated, rows


def skinny_config(weight: Tensor, num_rows: int, *, is_gated: bool = False) -> SkinnyConfig | None:
    """For ``num_rows`` rows times ``weight``; None: ``torch.nn.functional.linear`` is faster, or nothing is known."""
    if not weight.is_cuda or weight.dtype.itemsize != 2 or not 0 < num_rows <= MAX_ROWS:
        return None
    table = _table(_device_name(weight.device.index))
    n, k = weight.shape
    n = n // 2 if is_gated else n
    key = (n, k, is_gated, rows_bucket(num_rows))
    if table and key not in table and num_rows == 1:
        return _for_one_row(n, k, is_gated)
    return table.get(key)


def library_product(weight: Tensor, num_rows: int, *, has_bias: bool = False) -> LtProduct | None:
    """For ``num_rows`` rows times ``weight`` [N, K]; None: what the library chooses is as good, or nothing is known."""
    if not weight.is_cuda or weight.dtype != torch.bfloat16:
        return None
    index = weight.device.index
    algorithm = _algorithms(_device_name(index)).get((*weight.shape, num_rows))
    if algorithm is None:
        return None
    return lt_product(num_rows, *weight.shape, weight.dtype, has_bias, index, algorithm)


def _for_one_row(n: int, k: int, is_gated: bool) -> SkinnyConfig:
    """As many programs as stripes, or a whole fraction of them: then no stripe is cut."""
    inputs = 1024 if k >= 2048 else 512
    columns = 4 if is_gated and inputs == 1024 else 8
    stripes = -(-n // columns)
    programs = -(-stripes // -(-stripes // _PROGRAMS))
    return SkinnyConfig(1, columns, inputs, programs, num_warps=4, num_stages=3, ahead=1, is_early=True)


@cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@cache
def _table(device_name: str) -> dict[_Key, SkinnyConfig | None]:
    for path in sorted(_FOLDER.glob("*.json")):
        content = json.loads(path.read_text())
        if device_name in content["devices"]:
            return {_key_of(entry): _config_of(entry) for entry in content["entries"]}
    return {}


@cache
def _algorithms(device_name: str) -> dict[tuple[int, ...], LtAlgorithm]:
    """By n, k and rows."""
    for path in sorted((_FOLDER / "cublas").glob("*.json")):
        content = json.loads(path.read_text())
        if device_name not in content["devices"]:
            continue
        if library_version() != content["library_version"]:
            said = "cuBLAS %d chooses the algorithms of its products itself: %s is of version %d"
            _LOG.info(said, library_version(), path.name, content["library_version"])
            return {}
        return {(e["n"], e["k"], e["rows"]): LtAlgorithm(**e["algorithm"]) for e in content["entries"]}
    return {}


def _key_of(entry: dict[str, Any]) -> _Key:
    return entry["n"], entry["k"], entry["is_gated"], entry["rows"]


def _config_of(entry: dict[str, Any]) -> SkinnyConfig | None:
    return None if entry["config"] is None else SkinnyConfig(**entry["config"])
