"""Quantised checkpoints whose config.json does not say so: where older writers put it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

# file beside config.json -> the method that it is of unless it names one: AutoGPTQ's, AutoAWQ's
QUANT_FILES: Final = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def with_quantization(config: dict[str, Any], folder: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """``config`` with a ``quantization_config``: if it has none, ``compression_config`` or one of ``QUANT_FILES``."""
    if config.get("quantization_config") is not None:
        return config
    found = config.get("compression_config")
    if isinstance(found, dict):
        return config | {"quantization_config": {"quant_method": "compressed-tensors"} | found}
    for name, method in QUANT_FILES.items():
        if (folder / name).is_file():
            return config | {"quantization_config": {"quant_method": method} | read(folder / name)}
    return config
