"""The scales of a float8 KV cache, where a checkpoint has them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from aphro_core.checkpoint.checkpoint import Checkpoint
from aphro_core.errors import ModelError

# behind "model.layers.N.self_attn.", by who writes them: compressed-tensors, ModelOpt, compressed-tensors before 0.7;
# "kv_scale" is one for both
_NAMES: Final = (
    ("k_scale", "v_scale"),
    ("k_proj.k_scale", "v_proj.v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),
    ("kv_scale", "kv_scale"),
)


def cache_scale_names(names: Collection[str], layer: int) -> tuple[str, str] | None:
    """The tensors with the scales of a layer's K and V."""
    prefix = f"model.layers.{layer}.self_attn."
    pairs = ((prefix + key, prefix + value) for key, value in _NAMES)
    return next((pair for pair in pairs if pair[0] in names and pair[1] in names), None)


def read_cache_scales(checkpoint: Checkpoint, layers: Iterable[int]) -> dict[int, tuple[float, float]]:
    """(K's, V's) of the layers that have them: what the stored codes are multiplied with.

    Raises ModelError for a scale that is no positive number.
    """
    names = set(checkpoint.tensor_names)
    pairs = {layer: cache_scale_names(names, layer) for layer in layers}
    return {
        layer: (_read(checkpoint, pair[0]), _read(checkpoint, pair[1]))
        for layer, pair in pairs.items()
        if pair is not None
    }


def _read(checkpoint: Checkpoint, name: str) -> float:
    scale = checkpoint.read(name).float().flatten()
    if scale.numel() != 1 or not 0.0 < float(scale) < float("inf"):
        raise ModelError(
            f"{name} in {checkpoint.path} is {scale.tolist()[:4]}, expected one positive number",
            hint="--kv-cache-dtype auto, which needs no scales",
        )
    return float(scale)
