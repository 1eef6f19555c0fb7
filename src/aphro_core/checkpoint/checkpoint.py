"""The contract of an open checkpoint: its config, names and shapes without torch; slices of its tensors with it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from aphro_core.errors import ModelError
from aphro_core.models.packed import checkpoint_shapes
from aphro_core.models.registry import family_of
from aphro_core.models.spec import DecoderSpec
from aphro_core.models.tensors import source_shapes

if TYPE_CHECKING:
    import torch

FETCH_AGAIN: Final = "fetch the model again, or compare the file with the publisher's"

# A parameter inside a layer; what else files contain (rotary tables, tokenizer data) does not change what is computed.
_LAYER_PARAMETER: Final = re.compile(r"[\w.]+\.(?:layers|h)\.(\d+)\..*\.(weight|bias)")


class Checkpoint(ABC):
    """Tensors under their Hugging Face names, one- and two-dimensional. A context manager; ``close`` ends it.

    ``hf_config`` is the config in Hugging Face's keys, untrusted: give it to ``load_spec``.
    """

    path: Path
    hf_config: Mapping[str, Any]
    chunk_elements: ClassVar[int]  # of one read: what bounds the memory besides the destination

    @property
    @abstractmethod
    def tensor_names(self) -> Collection[str]: ...

    @property
    @abstractmethod
    def bytes_read(self) -> int:
        """Tensor bytes read from the file so far, headers not counted."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ModelError when there is no such tensor."""

    @abstractmethod
    def check_readable(self, name: str, *, is_packed: bool = False) -> None:
        """Raises ModelError when the tensor's data type or block format is not supported, of plain weights or of what
        quantised ones consist of."""

    @abstractmethod
    def stored_dtype(self, name: str) -> torch.dtype:
        """The data type that ``read`` returns unless told otherwise: as stored, float32 for block formats."""

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def read_chunk(self, out: torch.Tensor, name: str, rows: range, columns: range | None) -> None:
        """Fill ``out`` with these rows and columns (None: all, and for vectors). Ranges lie within the shape."""

    def row_unit(self, name: str) -> int:
        """Rows that must be read together, so that chunks are cut between them."""
        return 1

    def read(
        self,
        name: str,
        dim: int | None = None,
        start: int = 0,
        stop: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Elements ``start`` to ``stop`` along ``dim`` (None: the whole tensor), as a new tensor on the CPU."""
        import torch

        shape = list(self.shape(name))
        if dim is not None:
            shape[dim] = len(range(shape[dim])[start:stop])
        out = torch.empty(shape, dtype=dtype or self.stored_dtype(name))
        self.read_into(out, name, dim, start, stop)
        return out

    def read_into(
        self, out: torch.Tensor, name: str, dim: int | None = None, start: int = 0, stop: int | None = None
    ) -> None:
        """As ``read``, into a tensor of that shape of any data type and device; only the needed bytes are read."""
        self.check_readable(name, is_packed=True)
        shape = self.shape(name)
        cut = [range(size)[start:stop] if at == dim else range(size) for at, size in enumerate(shape)]
        if tuple(map(len, cut)) != tuple(out.shape):
            raise ValueError(f"{name} [{', '.join(map(str, cut))}] does not fit a tensor of {tuple(out.shape)}")
        if not cut:  # one number
            self.read_chunk(out.view(1), name, range(1), None)
            return
        rows, columns = cut[0], cut[1] if dim == 1 else None
        unit = self.row_unit(name)
        width = len(cut[1]) if len(cut) == 2 else 1
        step = max(self.chunk_elements // max(width, 1) // unit, 1) * unit
        for at in range(rows.start, rows.stop, step):
            part = range(at, min(at + step, rows.stop))
            self.read_chunk(out[part.start - rows.start : part.stop - rows.start], name, part, columns)

    def verify(self, spec: DecoderSpec) -> None:
        """Compare names, shapes and data types with what ``spec`` needs; headers only, no tensor is read.

        Raises ModelError for the first tensor that is missing, of another shape, of an unsupported type, or that the
        files have in a layer but this architecture with this config would ignore.
        """
        rules = family_of(spec).tensors
        needed, plain = checkpoint_shapes(rules, spec), source_shapes(rules, spec)
        names = set(self.tensor_names)
        for name, shape in needed.items():
            if name not in names:
                raise self._missing(name, spec, len(needed.keys() - names))
            if not _is_of_shape(self.shape(name), shape, is_scale=name not in plain):
                raise ModelError(
                    f"{name} in {self.path} has shape {list(self.shape(name))}, expected {list(shape)} by the config",
                    hint="config and weights are not of the same model: " + FETCH_AGAIN,
                )
            self.check_readable(
                name, is_packed=name not in plain or f"{name}_scale" in needed or f"{name}_scale_inv" in needed
            )
        for name in sorted(names - needed.keys()):
            found = _LAYER_PARAMETER.fullmatch(name)
            if found and int(found[1]) < spec.num_layers and not self._is_empty_bias(name, spec):
                raise ModelError(
                    f"{name} is in {self.path}, but {spec.architecture} with this config has no such tensor",
                    hint="config and weights are not of the same model: " + FETCH_AGAIN,
                )

    def _is_empty_bias(self, name: str, spec: DecoderSpec) -> bool:
        """GPTQ's writers give every layer a bias, of zeros where the model has none."""
        is_gptq = spec.quantization is not None and spec.quantization.layout == "gptq"
        return is_gptq and name.endswith(".bias") and not bool(self.read(name).any())

    def _missing(self, name: str, spec: DecoderSpec, count: int) -> ModelError:
        others = f" (and {count - 1} more)" if count > 1 else ""
        if name == "lm_head.weight":
            others = ", and the config says tie_word_embeddings false"
        return ModelError(f"{self.path} lacks {name}{others}, which {spec.architecture} needs", hint=FETCH_AGAIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _is_of_shape(found: tuple[int, ...], expected: tuple[int, ...], *, is_scale: bool) -> bool:
    """Scales are written with and without dims of size 1."""
    if found == expected or not is_scale:
        return found == expected
    return [size for size in found if size != 1] == [size for size in expected if size != 1]
