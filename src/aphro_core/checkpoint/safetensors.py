"""Checkpoints of one or several safetensors files: headers checked against the files, tensors read in slices."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from aphro_core.checkpoint.checkpoint import FETCH_AGAIN, Checkpoint
from aphro_core.checkpoint.file import ModelFile
from aphro_core.errors import ModelError

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES: Final = 100 * 10**6  # the format's own limit
_MAX_TENSORS: Final = 2**17  # of one file; read within two seconds
_MAX_DIMS: Final = 16

# format's name -> (torch's name, bytes); None where this version does not read it
_DTYPES: Final[dict[str, tuple[str | None, int]]] = {
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F64": (None, 8),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": (None, 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": (None, 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": (None, 1),
}
_PLAIN: Final = ("F32", "F16", "BF16")  # what weights that are not quantised may be


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file; ``offset`` counts from the start of the file."""

    file: ModelFile
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class SafetensorsCheckpoint(Checkpoint):
    chunk_elements: ClassVar[int] = 2**22

    def __init__(
        self,
        path: Path,
        hf_config: Mapping[str, Any],
        file_names: Sequence[str],
        open_file: Callable[[Path], ModelFile] = ModelFile,
    ) -> None:
        """``file_names`` are files of the folder ``path``. Raises ModelError for a damaged header or file."""
        self.path = path
        self.hf_config = hf_config
        self._files: list[ModelFile] = []
        self._entries: dict[str, Entry] = {}
        try:
            for name in file_names:
                self._add(open_file(path / name))
        except BaseException:
            self.close()
            raise

    @property
    def tensor_names(self) -> list[str]:
        return list(self._entries)

    @property
    def bytes_read(self) -> int:
        return sum(file.bytes_read for file in self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def file_of(self, name: str) -> str:
        """The name of the file that has the tensor."""
        return self._entry(name).file.path.name

    def check_readable(self, name: str, *, is_packed: bool = False) -> None:
        entry = self._entry(name)
        readable = [name for name, (dtype, _) in _DTYPES.items() if dtype and (is_packed or name in _PLAIN)]
        if entry.dtype not in readable:
            raise ModelError(
                f"{name} in {entry.file.path} is of type {entry.dtype}, allowed: {', '.join(readable)}",
                hint="use an unquantised checkpoint, or a GGUF file",
            )

    def stored_dtype(self, name: str) -> torch.dtype:
        import torch

        self.check_readable(name, is_packed=True)
        dtype: torch.dtype = getattr(torch, str(_DTYPES[self._entry(name).dtype][0]))
        return dtype

    def read_chunk(self, out: torch.Tensor, name: str, rows: range, columns: range | None) -> None:
        import torch

        entry, dtype = self._entry(name), self.stored_dtype(name)
        item = dtype.itemsize
        stride = prod(entry.shape[1:]) * item
        first, width = (columns.start * item, len(columns) * item) if columns is not None else (0, stride)
        in_place = out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous()
        target = out if in_place else torch.empty(out.shape, dtype=dtype)
        as_bytes = target.view(len(rows), -1).view(torch.uint8).numpy()
        entry.file.read_rows(as_bytes.reshape(len(rows), width), entry.offset + rows.start * stride + first, stride)
        if not in_place:
            out.copy_(target)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _entry(self, name: str) -> Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise ModelError(f"{self.path} has no tensor {name}", hint=FETCH_AGAIN)
        return entry

    def _add(self, file: ModelFile) -> None:
        self._files.append(file)
        for name, entry in read_header(file).items():
            if name in self._entries:
                raise ModelError(f"{name} is in both {file.path} and {self._entries[name].file.path}", hint=FETCH_AGAIN)
            self._entries[name] = entry
        file.bytes_read = 0


def read_header(file: ModelFile) -> dict[str, Entry]:
    """The tensors of a safetensors file, checked: types, shapes and offsets agree with each other and the file size.

    Layout: 8 bytes little endian N, N bytes of JSON, then the data without gaps or overlaps (huggingface.co/docs/
    safetensors). Raises ModelError with the expected and the found size.
    """
    length = int.from_bytes(file.read(0, min(8, file.size)), "little")
    if file.size < 8 or not 2 <= length <= min(file.size - 8, MAX_HEADER_BYTES):
        raise _damaged(file, _header_problem(file, length))
    try:
        text = file.read(8, length)
        if (num_tensors := text.count(b"data_offsets")) > _MAX_TENSORS:
            raise _damaged(file, f"its header has {num_tensors} tensors, allowed: {_MAX_TENSORS}")
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError(f"a {type(header).__name__}")
        header.pop("__metadata__", None)
        entries = {name: _parse_entry(file, name, found, 8 + length) for name, found in header.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise _damaged(file, f"its header is not the expected JSON ({error})") from error
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.offset != end:
            raise _damaged(file, f"{name} starts at byte {entry.offset}, expected {end}")
        end += entry.num_bytes
    if end != file.size:
        raise _damaged(file, f"its header describes {end} bytes, the file has {file.size}")
    return entries


def _parse_entry(file: ModelFile, name: str, found: Any, data_start: int) -> Entry:
    dtype, shape, offsets = (found.get(key) for key in ("dtype", "shape", "data_offsets"))
    sizes_are_sane = (
        isinstance(shape, list)
        and len(shape) <= _MAX_DIMS
        and isinstance(offsets, list)
        and len(offsets) == 2
        and all(type(number) is int and 0 <= number < 2**48 for number in [*shape, *offsets])
    )
    if not isinstance(dtype, str) or not sizes_are_sane or offsets[0] > offsets[1]:
        raise ValueError(f"{name[:80]} has {str(found)[:120]}")
    num_bytes = offsets[1] - offsets[0]
    if dtype in _DTYPES and prod(shape) * _DTYPES[dtype][1] != num_bytes:
        raise _damaged(
            file, f"{name} {dtype} {shape} has {num_bytes} bytes, expected {prod(shape) * _DTYPES[dtype][1]}"
        )
    return Entry(file, dtype, tuple(shape), data_start + offsets[0], num_bytes)


def _header_problem(file: ModelFile, length: int) -> str:
    if file.read(0, min(file.size, 11)) == b"version htt":
        return "it is a Git LFS pointer, not the weights (git lfs pull)"
    return f"its header claims {length} bytes, allowed: 2 to {max(min(file.size - 8, MAX_HEADER_BYTES), 0)}"


def _damaged(file: ModelFile, problem: str) -> ModelError:
    return ModelError(f"{file.path} is damaged or truncated: {problem}", hint=FETCH_AGAIN)
