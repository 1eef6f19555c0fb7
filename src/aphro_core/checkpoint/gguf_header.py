"""The header of a GGUF file: metadata decoded on demand, tensor infos checked against the size of the file.

The gguf package's reader builds one array object a token (seconds for a vocabulary) and trusts the file; every rank
opens the file, and it is untrusted.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from aphro_core.checkpoint.checkpoint import FETCH_AGAIN
from aphro_core.checkpoint.file import ModelFile
from aphro_core.errors import ModelError

_UINT32, _STRING, _ARRAY, _UINT64 = 4, 8, 9, 10
_SCALARS: Final[dict[int, struct.Struct]] = {
    number: struct.Struct(f"<{code}") for number, code in enumerate("BbHhIif?") if number < _STRING
} | {_UINT64: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d")}
_U32, _U64 = _SCALARS[_UINT32], _SCALARS[_UINT64]
_MAX_DEPTH: Final = 4  # of arrays in arrays
# far more than any model needs, and read within two seconds: a file with holes can claim any number of nothing
_MAX_VALUES: Final = 2**16
_MAX_TENSORS: Final = 2**18
_MAX_NAME_BYTES: Final = 2**16
_MAX_ITEMS: Final = 2**22  # of all arrays together whose items have a length each
_MAX_VALUE_BYTES: Final = 2**28
_DEFAULT_ALIGNMENT: Final = 32


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A tensor type of the file: ``elements`` of a row share a block of ``num_bytes``."""

    name: str
    elements: int
    num_bytes: int


FORMATS: Final[dict[int, BlockFormat]] = {
    0: BlockFormat("F32", 1, 4),
    1: BlockFormat("F16", 1, 2),
    2: BlockFormat("Q4_0", 32, 18),
    3: BlockFormat("Q4_1", 32, 20),
    6: BlockFormat("Q5_0", 32, 22),
    7: BlockFormat("Q5_1", 32, 24),
    8: BlockFormat("Q8_0", 32, 34),
    10: BlockFormat("Q2_K", 256, 84),
    11: BlockFormat("Q3_K", 256, 110),
    12: BlockFormat("Q4_K", 256, 144),
    13: BlockFormat("Q5_K", 256, 176),
    14: BlockFormat("Q6_K", 256, 210),
    20: BlockFormat("IQ4_NL", 32, 18),
    23: BlockFormat("IQ4_XS", 256, 136),
    30: BlockFormat("BF16", 1, 2),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """``shape`` in torch's order; ``offset`` counts from the start of the file. ``format`` None: not supported."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    format: BlockFormat | None
    offset: int

    @property
    def row_bytes(self) -> int:
        assert self.format is not None, "checked before a tensor is read"
        return self.shape[-1] // self.format.elements * self.format.num_bytes


class GGUFHeader:
    """Metadata keys and tensor infos of an open file. ``close`` releases the mapping that values are decoded from."""

    def __init__(self, file: ModelFile) -> None:
        """Raises ModelError when the file is no GGUF, of an unknown version, or not as long as its header says."""
        self._file = file
        if file.size < 24 or file.read(0, 4) != b"GGUF":
            raise ModelError(f"{file.path} is not a GGUF file (its first bytes are not GGUF)", hint=FETCH_AGAIN)
        version = int.from_bytes(file.read(4, 4), "little")
        if version not in (2, 3):
            order = ", in big-endian order" if version & 0xFFFF == 0 else ""
            raise ModelError(f"{file.path} is GGUF version {version}{order}, allowed: 2 and 3", hint=FETCH_AGAIN)
        self._num_items = 0
        try:
            with open(file.path, "rb") as opened:
                self._data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelError(
                f"{file.path} cannot be mapped into memory: {error.strerror}", hint="raise `ulimit -v`"
            ) from error
        try:
            self._values, at = self._index_values()
            self.tensors = self._read_tensors(at)
        except (struct.error, IndexError, OverflowError) as error:
            self.close()
            raise self.damaged(f"its header does not end within its {file.size} bytes") from error
        except BaseException:
            self.close()
            raise

    @property
    def keys(self) -> list[str]:
        return list(self._values)

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value: number, bool, str, or a list of them (decoded now: a vocabulary takes some 20 ms)."""
        if key not in self._values:
            return default
        kind, at = self._values[key]
        try:
            return self._decode(kind, at)[0]
        except UnicodeDecodeError as error:
            raise self.damaged(f"{key} is not UTF-8") from error

    def damaged(self, problem: str) -> ModelError:
        return ModelError(f"{self._file.path} is damaged or truncated: {problem}", hint=FETCH_AGAIN)

    def close(self) -> None:
        self._data.close()

    def _index_values(self) -> tuple[dict[str, tuple[int, int]], int]:
        """(key -> (type, where its value starts), where the tensor infos start)."""
        (num_values,), at = _U64.unpack_from(self._data, 16), 24
        self._check_number(num_values, _MAX_VALUES, "metadata values")
        values: dict[str, tuple[int, int]] = {}
        for _ in range(num_values):
            key, at = self._string(at)
            (kind,), at = _U32.unpack_from(self._data, at), at + 4
            values[key] = (kind, at)
            start, at = at, self._skip(kind, at)
            if at > len(self._data):
                raise IndexError(at)
            self._check_number(at - start, _MAX_VALUE_BYTES, f"bytes of {key[:80]}")
        return values, at

    def _read_tensors(self, at: int) -> dict[str, TensorInfo]:
        (num_tensors,) = _U64.unpack_from(self._data, 8)
        self._check_number(num_tensors, _MAX_TENSORS, "tensors")
        raw = []
        for _ in range(num_tensors):
            name, at = self._string(at)
            (num_dims,), at = _U32.unpack_from(self._data, at), at + 4
            if not 1 <= num_dims <= 4:
                raise self.damaged(f"{name[:80]} has {num_dims} dimensions, allowed: 1 to 4")
            *dims, type_id, offset = struct.unpack_from(f"<{num_dims}QIQ", self._data, at)
            at += 8 * num_dims + 12
            raw.append((name, tuple(reversed(dims)), type_id, offset))
        alignment = self.value("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment is {alignment}, allowed: a power of two")
        start = -(-at // alignment) * alignment
        tensors = {name: self._checked(name, shape, type_id, start + offset) for name, shape, type_id, offset in raw}
        if len(tensors) != len(raw):
            raise self.damaged("two tensors have the same name")
        return tensors

    def _checked(self, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> TensorInfo:
        info = TensorInfo(name, shape, type_id, FORMATS.get(type_id), offset)
        if info.format is None:
            return info
        if shape[-1] % info.format.elements:
            raise self.damaged(f"{name} has rows of {shape[-1]}, expected whole blocks of {info.format.elements}")
        end = offset + prod(shape[:-1]) * info.row_bytes
        if end > self._file.size:
            raise self.damaged(f"{name} ends at byte {end}, the file has {self._file.size}")
        return info

    def _check_number(self, number: int, most: int, what: str) -> None:
        if number > most:
            raise self.damaged(f"it claims {number} {what}, allowed: {most}")

    def _string(self, at: int) -> tuple[str, int]:
        """A name and where it ends."""
        (length,) = _U64.unpack_from(self._data, at)
        stop = at + 8 + length
        if stop > len(self._data):
            raise IndexError(stop)
        self._check_number(length, _MAX_NAME_BYTES, f"bytes of a name at byte {at}")
        try:
            return self._data[at + 8 : stop].decode(), stop
        except UnicodeDecodeError as error:
            raise self.damaged(f"a name at byte {at} is not UTF-8") from error

    def _skip(self, kind: int, at: int, depth: int = 0) -> int:
        """Where the value at ``at`` ends."""
        data = self._data
        if kind in _SCALARS:
            return at + _SCALARS[kind].size
        if kind == _STRING:
            return at + 8 + int(_U64.unpack_from(data, at)[0])
        if kind != _ARRAY or depth >= _MAX_DEPTH:
            raise self.damaged(
                f"byte {at} has a value of type {kind}, allowed: 0 to 12, arrays up to {_MAX_DEPTH} deep"
            )
        (of_kind,), (count,), at = _U32.unpack_from(data, at), _U64.unpack_from(data, at + 4), at + 12
        if of_kind in _SCALARS:
            return at + int(count) * _SCALARS[of_kind].size
        self._num_items = min(self._num_items + int(count), 2**62)
        if self._num_items > _MAX_ITEMS:
            if at + 8 * int(count) > len(data):  # the simpler explanation
                raise IndexError(at)
            self._check_number(self._num_items, _MAX_ITEMS, "items of its arrays")
        if of_kind == _STRING:
            unpack = _U64.unpack_from
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
            return at
        for _ in range(count):
            at = self._skip(of_kind, at, depth + 1)
        return at

    def _decode(self, kind: int, at: int) -> tuple[Any, int]:
        """(value, where it ends). ``_skip`` went over it before, so that it lies within the file."""
        if kind in _SCALARS:
            return _SCALARS[kind].unpack_from(self._data, at)[0], at + _SCALARS[kind].size
        if kind == _STRING:
            (length,) = _U64.unpack_from(self._data, at)
            return self._data[at + 8 : at + 8 + length].decode(), at + 8 + length
        (of_kind,), (count,), at = _U32.unpack_from(self._data, at), _U64.unpack_from(self._data, at + 4), at + 12
        if of_kind in _SCALARS:
            scalar = _SCALARS[of_kind]
            return list(struct.unpack_from(f"<{count}{scalar.format[1:]}", self._data, at)), at + count * scalar.size
        items = []
        for _ in range(count):
            item, at = self._decode(of_kind, at)
            items.append(item)
        return items, at
