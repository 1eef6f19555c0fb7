"""What crosses when a host reads a model from the engine's: which files there are, ranges asked for, their bytes."""

from __future__ import annotations

import msgspec


class SourceFile(msgspec.Struct, frozen=True, array_like=True):
    name: str
    num_bytes: int
    head_bytes: int  # its first bytes, that every rank needs: a config whole, the header of tensors


class ModelSource(msgspec.Struct, frozen=True):
    """A model that the engine's host hands out. ``key`` is another one when any of its files is."""

    name: str
    key: str
    is_folder: bool
    files: list[SourceFile]


class FetchModel(msgspec.Struct, frozen=True, tag="fetch_model"):
    """Worker to engine: these ranges [start, length, start, length, ...] of ``file``. ``number`` comes back."""

    number: int
    file: str
    ranges: list[int]


class ModelBytes(msgspec.Struct, frozen=True, tag="model_bytes"):
    """Engine to worker: the bytes of all ranges, one after the other; or why there are none."""

    number: int
    data: bytes = b""
    problem: str = ""
