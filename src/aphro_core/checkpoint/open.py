"""The door to checkpoints: find the model that was asked for, and open its folder or GGUF file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from aphro_core.checkpoint.checkpoint import FETCH_AGAIN, Checkpoint
from aphro_core.checkpoint.file import ModelFile
from aphro_core.checkpoint.gguf import GGUFCheckpoint
from aphro_core.checkpoint.hub import download
from aphro_core.checkpoint.older_configs import with_quantization
from aphro_core.checkpoint.safetensors import SafetensorsCheckpoint
from aphro_core.errors import ModelError

MAX_JSON_BYTES: Final = 64 * 2**20
_WHOLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_PICKLED: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve_model(model: str, *, revision: str | None = None, on_progress: Callable[[str], None] | None = None) -> Path:
    """The local folder or file of ``model``: a path, or a Hugging Face id, which is fetched unless it is cached.

    ``on_progress`` is told, in a line, before anything is fetched. Raises ModelError with the next step.
    """
    return local_path(model) or download(model, revision=revision, on_progress=on_progress)


def local_path(model: str) -> Path | None:
    """The path that ``model`` is, None where only a Hugging Face id can be meant. Raises ModelError for a path that
    does not exist."""
    if not model.strip():
        raise ModelError("the model's name is empty", hint="give a folder, a .gguf file or a Hugging Face id")
    path = Path(model).expanduser()
    if path.exists():
        return path
    if _looks_local(model):
        raise _no_such_path(path)
    return None


def open_checkpoint(path: Path, open_file: Callable[[Path], ModelFile] = ModelFile) -> Checkpoint:
    """A folder with config.json and safetensors, or a ``.gguf`` file; headers are read and checked, no tensor is.

    ``open_file`` opens the files that have tensors. Raises ModelError that names the file and what is wrong with it.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix == ".gguf":
            return GGUFCheckpoint(path, open_file)
        raise ModelError(
            f"{path} is no model, allowed: a folder with config.json and *.safetensors, or a .gguf file",
            hint=f"give its folder: {path.parent}"
            if path.suffix == ".safetensors"
            else "give a folder or a .gguf file",
        )
    return SafetensorsCheckpoint(path, _read_config(_checked_folder(path)), _safetensors_of(path), open_file)


def read_hf_config(path: str | Path) -> Mapping[str, Any]:
    """The config alone, of a folder that may lack weights or of a ``.gguf`` file: what dummy weights are made from."""
    path = Path(path)
    if path.is_file():
        with open_checkpoint(path) as checkpoint:
            return checkpoint.hf_config
    return _read_config(_checked_folder(path))


def _checked_folder(path: Path) -> Path:
    if not path.is_dir():
        raise _no_such_path(path)
    config_path = path / "config.json"
    if not config_path.is_file():
        inside = sorted(file.name for file in path.glob("*.gguf"))
        hint = (
            f"give the file: {path / inside[0]}" if inside else "give the folder that has config.json and the weights"
        )
        raise ModelError(f"{path} has no config.json", hint=hint)
    return path


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json; the end-of-sequence ids of generation_config.json join its own, as transformers stops at them."""
    config = with_quantization(_read_json(folder / "config.json"), folder, _read_json)
    generation_path = folder / "generation_config.json"
    if generation_path.is_file():
        found = [config.get("eos_token_id"), _read_json(generation_path).get("eos_token_id")]
        ids = [token_id for each in found for token_id in (each if isinstance(each, list) else [each])]
        known = [token_id for token_id in ids if token_id is not None]
        is_sane = all(isinstance(token_id, int) for token_id in known)  # else whoever needs them says so
        config["eos_token_id"] = list(dict.fromkeys(known)) if is_sane else known
    return config


def _safetensors_of(folder: Path) -> list[str]:
    """File names of the weights: one whole file, else those that the index names, else all that are there."""
    if (folder / _WHOLE).is_file():
        return [_WHOLE]
    if (folder / _INDEX).is_file():
        return _shards_of_index(folder)
    found = sorted(file.name for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated"))
    if found:
        return found
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{folder} has its weights in {pickled[0]}, a pickle, which could run code and is never read",
            hint="convert it where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) "
            "writes safetensors",
        )
    raise ModelError(f"{folder} has no *.safetensors", hint=FETCH_AGAIN)


def _shards_of_index(folder: Path) -> list[str]:
    index = folder / _INDEX
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map", hint=FETCH_AGAIN)
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{index} names the file {name[:80]!r}, allowed: names of .safetensors files beside it",
                hint="do not use this checkpoint: its index points outside its folder",
            )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{folder} lacks {missing[0]}{others} of the {len(names)} files that {_INDEX} names", hint=FETCH_AGAIN
        )
    return names


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path} has {path.stat().st_size} bytes, allowed: {MAX_JSON_BYTES}", hint=FETCH_AGAIN)
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}", hint=FETCH_AGAIN) from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} has a {type(found).__name__}, expected an object", hint=FETCH_AGAIN)
    return found


def _looks_local(model: str) -> bool:
    """Whether it can only be meant as a path: a Hugging Face id is ``name`` or ``owner/name``."""
    is_rooted = model.startswith(("/", ".", "~")) or model.endswith("/")
    return is_rooted or model.count("/") > 1 or Path(model).suffix in (".gguf", ".safetensors", ".json")


def _no_such_path(path: Path) -> ModelError:
    missing, parent = path, path.parent
    while not parent.is_dir() and parent != parent.parent:
        missing, parent = parent, parent.parent
    try:
        names = [entry.name for entry in parent.iterdir()]
    except OSError:
        names = []
    near = difflib.get_close_matches(missing.name, names, n=3, cutoff=0.5)
    there = f"; near it in {parent}: {', '.join(sorted(near))}" if near else ""
    return ModelError(
        f"no model at {path}{there}",
        hint=f"{parent / near[0]}" if near else "check the path, or give a Hugging Face id",
    )
