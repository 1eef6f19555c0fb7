"""Which files of a folder are a model's, and what tells two of one name apart: size, and digest of the head."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

import msgspec

from aphro_core.checkpoint.file import ModelFile
from aphro_core.checkpoint.gguf_header import GGUFHeader
from aphro_core.checkpoint.older_configs import QUANT_FILES
from aphro_core.config import FileStamp
from aphro_core.errors import ModelError

_CONFIGS: Final = ("config.json", "generation_config.json", *QUANT_FILES)
_WHOLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_LEAST_HEAD_BYTES: Final = 1 << 20  # of a file whose header cannot be read: enough to see that it is another one
_MAX_HEAD_BYTES: Final = 100 * 10**6
_SMALL_BYTES: Final = 1 << 20  # of a file that is read to see whether it changed


class FileFacts(msgspec.Struct, frozen=True):
    num_bytes: int
    head_bytes: int  # all of a small file, the header of one with tensors
    digest: str  # SHA-256 of these first bytes


def model_files(path: Path) -> list[Path]:
    """The files that are read to load ``path``: itself, or of a folder its configs, index and safetensors.

    What is missing is left out: the caller compares with what another host has.
    """
    if path.is_file():
        return [path]
    configs = [path / name for name in _CONFIGS if (path / name).is_file()]
    if (path / _WHOLE).is_file():
        return [*configs, path / _WHOLE]
    found = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("consolidated"))
    index = path / _INDEX
    if not index.is_file():
        return [*configs, *found]
    named = _names_of(index)
    return [*configs, index, *(file for file in found if not named or file.name in named)]


def facts_of(path: Path) -> dict[str, FileFacts]:
    """Of each file of a model, by name; empty if there is none."""
    return {file.name: _facts(file) for file in model_files(path)}


def stamps_of(path: Path) -> tuple[FileStamp, ...]:
    """Of each file of a model: what tells whether it was changed or replaced since."""
    return tuple(_stamp(file) for file in model_files(path))


def check_unchanged(path: Path, stamps: tuple[FileStamp, ...]) -> None:
    """Raises ModelError that names a file which is not what it was: streams would go on with another model."""
    if not stamps:
        return
    found = {stamp.name: stamp for stamp in stamps_of(path)}
    for stamp in stamps:
        now = found.get(stamp.name)
        if now != stamp:
            what = "is gone" if now is None else f"has changed (it had {stamp.num_bytes} bytes, it has {now.num_bytes})"
            where = path if path.name == stamp.name else path / stamp.name
            raise ModelError(
                f"{where} {what} since the server started, and what it answers cannot go on with other weights",
                hint="start the server again: it then serves what is there now",
            )


def _stamp(path: Path) -> FileStamp:
    with ModelFile(path) as file:
        if file.size <= _SMALL_BYTES:
            return FileStamp(path.name, file.size, hashlib.sha256(file.read(0, file.size)).hexdigest())
    status = path.stat()
    return FileStamp(path.name, status.st_size, "", status.st_mtime_ns, status.st_ino)


def _names_of(index: Path) -> set[str]:
    try:
        return set(map(str, json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()  # damaged: whoever opens the checkpoint says so


def _facts(path: Path) -> FileFacts:
    with ModelFile(path) as file:
        head_bytes = min(_head_bytes(file), file.size)
        return FileFacts(file.size, head_bytes, hashlib.sha256(file.read(0, head_bytes)).hexdigest())


def _head_bytes(file: ModelFile) -> int:
    if file.path.suffix == ".safetensors":
        length = int.from_bytes(file.read(0, min(8, file.size)), "little")
        return 8 + length if length <= _MAX_HEAD_BYTES else _LEAST_HEAD_BYTES
    if file.path.suffix != ".gguf":
        return file.size
    try:
        header = GGUFHeader(file)
    except ModelError:
        return _LEAST_HEAD_BYTES
    try:
        return min((info.offset for info in header.tensors.values()), default=file.size)
    finally:
        header.close()
