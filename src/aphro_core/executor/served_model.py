"""The engine's side of ``--model-from head``: ranges of this host's model files, for ranks that lack them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import anyio.to_thread

from aphro_core.checkpoint.file import ModelFile
from aphro_core.checkpoint.model_files import facts_of, model_files
from aphro_core.errors import ModelError
from aphro_core.messages.model_source import FetchModel, ModelBytes, ModelSource, SourceFile

_LOG: Final = logging.getLogger(__name__)
MAX_REPLY_BYTES: Final = 4 << 20


class ServedModel:
    """Names are looked up in a table of the model's own files: no other can be asked for."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError for a file that cannot be opened."""
        self._files = {file.name: ModelFile(file) for file in model_files(path)}
        self.source = describe(path)

    async def answer(self, call: FetchModel) -> ModelBytes:
        return await anyio.to_thread.run_sync(self._read, call)

    def _read(self, call: FetchModel) -> ModelBytes:
        file = self._files.get(call.file)
        starts, lengths = call.ranges[::2], call.ranges[1::2]
        if file is None or len(starts) != len(lengths) or min(call.ranges, default=0) < 0:
            return ModelBytes(call.number, problem=f"{call.file[:80]!r} with these ranges is not part of the model")
        if sum(lengths) > MAX_REPLY_BYTES:
            return ModelBytes(call.number, problem=f"{sum(lengths)} bytes at once, allowed: {MAX_REPLY_BYTES}")
        data, at = bytearray(sum(lengths)), 0
        try:
            for start, length in zip(starts, lengths, strict=True):
                file.read_into(memoryview(data)[at : at + length], start)
                at += length
        except ModelError as error:
            return ModelBytes(call.number, problem=error.message)
        return ModelBytes(call.number, bytes(data))

    def close(self) -> None:
        for file in self._files.values():
            file.close()


@contextmanager
def open_served(path: str, names: Sequence[str]) -> Iterator[ServedModel | None]:
    """For the hosts of these names; None if there are none."""
    if not names:
        yield None
        return
    _LOG.warning("%s: without this model; ranks there fetch what they need of it from here", ", ".join(names))
    model = ServedModel(Path(path))
    try:
        yield model
    finally:
        model.close()


def describe(path: Path) -> ModelSource:
    """``key`` follows the files' names, sizes, times of change and heads: what rsync would take for the same."""
    facts = facts_of(path)
    digest = hashlib.sha256()
    for file in model_files(path):
        digest.update(f"{file.name}\0{facts[file.name]}\0{file.stat().st_mtime_ns}\0".encode())
    files = [SourceFile(name, each.num_bytes, each.head_bytes) for name, each in facts.items()]
    return ModelSource(path.name, digest.hexdigest()[:16], path.is_dir(), files)
