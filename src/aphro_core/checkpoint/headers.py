"""A model's config and tensor headers without its weights: of a folder, a config.json, a GGUF file or a Hub id."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from aphro_core.checkpoint.older_configs import with_quantization
from aphro_core.errors import ModelError
from aphro_core.estimate.weights import StoredTensor

_FLOATS: Final = ("F32", "F16", "BF16")
_MAX_JSON_BYTES: Final = 64 * 2**20

# Metadata key behind "<architecture>." -> Hugging Face key, for architectures that only an estimate reads.
_GGUF_KEYS: Final[dict[str, str]] = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "leading_dense_block_count": "first_k_dense_replace",
    "attention.sliding_window": "sliding_window",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.q_lora_rank": "q_lora_rank",
    "rope.dimension_count": "qk_rope_head_dim",
}


@dataclass(frozen=True)
class ModelHeaders:
    """``tensors`` and ``file_bytes`` are None where only a config was there."""

    hf_config: Mapping[str, Any]
    tensors: tuple[StoredTensor, ...] | None = None
    file_bytes: int | None = None


def read_headers(
    model: str, *, revision: str | None = None, on_progress: Callable[[str], None] | None = None
) -> ModelHeaders:
    """Config and headers of ``model``: a folder (with or without weights), a ``.json`` or ``.gguf`` file, or a Hub id,
    of which only config.json and the files' headers are fetched. Raises ModelError with the next step."""
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".json":
        return ModelHeaders(with_quantization(_read_json(path), path.parent, _read_json))
    if path.is_file() and path.suffix == ".gguf":
        return _of_gguf(path)
    if path.is_dir():
        return _of_folder(path)
    from aphro_core.checkpoint.open import local_path  # only now: a bare config needs none of it

    if local_path(model) is not None:
        raise ModelError(
            f"{path} is no model, allowed: a folder, a config.json, a .gguf file or a Hugging Face id",
            hint=f"give its folder: {path.parent}",
        )
    from aphro_core.checkpoint.hub import fetch_headers

    folder, found = fetch_headers(model, revision=revision, on_progress=on_progress)
    config = _read_json(folder / "config.json")
    if found is None:
        return _of_folder(folder)
    tensors = tuple(_stored(name, dtype, shape, size) for name, dtype, shape, size in found)
    return ModelHeaders(config, tensors, sum(tensor.num_bytes for tensor in tensors))


def _of_folder(folder: Path) -> ModelHeaders:
    """The headers of its safetensors files, or the size that the index states, or the config alone."""
    if not (folder / "config.json").is_file():
        from aphro_core.checkpoint.open import read_hf_config

        return ModelHeaders(read_hf_config(folder))  # which says what is missing
    config = with_quantization(_read_json(folder / "config.json"), folder, _read_json)
    files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    index = folder / "model.safetensors.index.json"
    named = set(_read_json(index).get("weight_map", {}).values()) if index.is_file() else set()
    if not files or not named <= {path.name for path in files}:
        total = _read_json(index).get("metadata", {}).get("total_size") if index.is_file() else None
        return ModelHeaders(config, None, total if isinstance(total, int) else None)
    from aphro_core.checkpoint.file import ModelFile
    from aphro_core.checkpoint.safetensors import read_header

    tensors: list[StoredTensor] = []
    for path in [path for path in files if not named or path.name in named]:
        with ModelFile(path) as file:
            entries = read_header(file)
            tensors += [_stored(name, entry.dtype, entry.shape, entry.num_bytes) for name, entry in entries.items()]
    return ModelHeaders(config, tuple(tensors), sum(tensor.num_bytes for tensor in tensors))


def _of_gguf(path: Path) -> ModelHeaders:
    from aphro_core.checkpoint.file import ModelFile
    from aphro_core.checkpoint.gguf_families import FAMILIES
    from aphro_core.checkpoint.gguf_header import GGUFHeader
    from aphro_core.checkpoint.open import open_checkpoint

    with ModelFile(path) as file:
        header = GGUFHeader(file)
        try:
            arch = str(header.value("general.architecture"))
            tensors = tuple(
                StoredTensor(
                    info.name,
                    prod(info.shape),
                    prod(info.shape[:-1]) * info.row_bytes if info.format is not None else prod(info.shape) // 2,
                    is_float=False,
                )
                for info in header.tensors.values()
            )
            config: Mapping[str, Any] = _general_config(header, arch)
        finally:
            header.close()
    if arch in FAMILIES:
        with open_checkpoint(path) as checkpoint:
            config = checkpoint.hf_config
    return ModelHeaders(config, tensors, path.stat().st_size)


def _general_config(header: Any, arch: str) -> dict[str, Any]:
    """Sizes under Hugging Face's keys; lists (a value a layer) count with their largest."""
    config: dict[str, Any] = {"model_type": arch, "architectures": [arch], "dtype": "bfloat16"}
    for key, name in _GGUF_KEYS.items():
        value = header.value(f"{arch}.{key}")
        if isinstance(value, list):
            value = max(value, default=None)
        if value is not None and (name != "qk_rope_head_dim" or "kv_lora_rank" in config):
            config[name] = value
    embedding = header.tensors.get("token_embd.weight")
    config["vocab_size"] = embedding.shape[0] if embedding is not None else None
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    return config


def _stored(name: str, dtype: str, shape: tuple[int, ...] | list[int], num_bytes: int) -> StoredTensor:
    return StoredTensor(name, prod(shape), num_bytes, is_float=dtype in _FLOATS)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError(f"{path} has {path.stat().st_size} bytes, allowed: {_MAX_JSON_BYTES}")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}", hint="give a model's config.json") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} has a {type(found).__name__}, expected an object", hint="give a model's config.json")
    return found
