"""Whose messages the live check measures: the sizes of a model that lies here, or those of a usual one."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from aphro_core.checkpoint.open import open_checkpoint, read_hf_config
from aphro_core.doctor.live.plan import ASSUMED_MODEL, ModelSizes
from aphro_core.errors import ModelError
from aphro_core.models.registry import load_spec

_DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


def load_sizes(model: str | None) -> ModelSizes:
    """``model`` is a folder or a GGUF file; None stands for a usual model. Raises ModelError; nothing is downloaded."""
    if model is None:
        return ASSUMED_MODEL
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        with open_checkpoint(path) as checkpoint:
            spec = load_spec(checkpoint.hf_config)
    elif (path / "config.json").is_file():
        spec = load_spec(read_hf_config(path))
    else:
        raise ModelError(
            f"{model} is neither a folder with config.json nor a GGUF file",
            hint="the doctor reads a model's sizes only from this host: name a local path",
        )
    return ModelSizes(path.stem if path.suffix == ".gguf" else path.name, spec.hidden_size, spec.num_layers,
                      _DTYPE_BYTES[spec.dtype])  # fmt: skip
