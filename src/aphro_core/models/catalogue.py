"""What can be served, as rows: families and weight formats, supported ones and those known only by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from aphro_core.models.quant_config import METHODS, ONLINE, RECOGNISED
from aphro_core.models.quantization import GGUF_KINDS, GGUF_REQUANTISED
from aphro_core.models.registry import FAMILIES, RECOGNISED_ARCHITECTURES


@dataclass(frozen=True)
class ModelRow:
    architecture: str
    family: str  # "" for those known only by name
    is_supported: bool
    devices: tuple[str, ...]


@dataclass(frozen=True)
class FormatRow:
    name: str  # as -q takes it
    status: str  # "supported" or "recognised"
    what: str
    devices: tuple[str, ...]


_WHAT: Final = {
    "fp8": "FP8 checkpoints (tensor or 128 x 128 block scales), or FP8 weights made while loading",
    "int8": "8-bit integers made while loading",
    "int4": "4-bit integers in groups, made while loading",
    "gptq": "GPTQ, 4 and 8 bits, act-order included",
    "awq": "AWQ, 4 bits (gemm)",
    "compressed-tensors": "FP8 static and dynamic, INT8 W8A8, W4A16 and W8A16",
    "gguf": f"GGUF: {', '.join(name for name in GGUF_KINDS if name not in GGUF_REQUANTISED)} packed as they are; "
    f"{', '.join(GGUF_REQUANTISED)} in 8 bits",
}


def model_rows() -> list[ModelRow]:
    supported = [
        ModelRow(
            architecture,
            str(family.__doc__).split(":", maxsplit=1)[0],
            True,
            ("cuda", "cpu"),
        )
        for architecture, family in FAMILIES.items()
    ]
    return supported + [ModelRow(name, "", False, ()) for name in RECOGNISED_ARCHITECTURES]


def format_rows() -> list[FormatRow]:
    names = dict.fromkeys((*ONLINE, *METHODS))
    supported = [FormatRow(name, "supported", _WHAT[name], ("cuda", "cpu")) for name in names]
    return supported + [FormatRow(name, "recognised", "known by name, not supported", ()) for name in RECOGNISED]
