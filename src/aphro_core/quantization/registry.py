"""The table layout -> reader, and the way from one linear layer of a checkpoint to a matrix in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from aphro_core.models.quantization import Layout
from aphro_core.quantization.awq import read_awq
from aphro_core.quantization.ggml import read_ggml
from aphro_core.quantization.gptq import read_gptq
from aphro_core.quantization.matrix import PackedMatrix
from aphro_core.quantization.online import quantise
from aphro_core.quantization.scaled import read_packed_words, read_part, read_scaled
from aphro_core.quantization.source import QuantSource


def _read_plain(source: QuantSource) -> PackedMatrix:
    """Unquantised, to be quantised."""
    weight = read_part(source, "weight").to(source.device)
    return quantise(weight, source.spec.kind, source.group, source.scale_dtype)


def _read_compressed(source: QuantSource) -> PackedMatrix:
    return read_packed_words(source) if source.spec.has_words else read_scaled(source)


READERS: Final[dict[Layout, Callable[[QuantSource], PackedMatrix]]] = {
    "online": _read_plain,
    "fp8": read_scaled,
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": _read_compressed,
    "gguf": read_ggml,
}
