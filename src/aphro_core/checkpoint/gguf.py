"""Checkpoints in one GGUF file: tensors under Hugging Face names, dequantised slice by slice."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from aphro_core.checkpoint.checkpoint import FETCH_AGAIN, Checkpoint
from aphro_core.checkpoint.file import ModelFile
from aphro_core.checkpoint.gguf_config import hf_config, llama3_rope
from aphro_core.checkpoint.gguf_families import GGUFFamily, family_of
from aphro_core.checkpoint.gguf_header import FORMATS, GGUFHeader, TensorInfo
from aphro_core.errors import ModelError

if TYPE_CHECKING:
    import torch

_PLAIN: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # formats that torch reads as they are
_ROPE_FREQS: Final = "rope_freqs.weight"
_ROPE_FACTORS: Final = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}


class GGUFCheckpoint(Checkpoint):
    chunk_elements: ClassVar[int] = 2**18  # what a dequantisation works on stays in the cache

    hf_config: Mapping[str, Any]

    def __init__(self, path: Path, open_file: Callable[[Path], ModelFile] = ModelFile) -> None:
        """Raises ModelError when the file is damaged, or of an architecture that is not supported."""
        self.path = path
        self._file = open_file(path)
        try:
            self._header = GGUFHeader(self._file)
        except BaseException:
            self._file.close()
            raise
        try:
            self.hf_config = config = hf_config(self._header, path)
            family = family_of(self._header)
            assert family is not None, "hf_config refuses others"
            self._family = family
            infos = [each for info in self._header.tensors.values() for each in _matrices(info, family)]
            self._tensors: dict[str, TensorInfo] = dict(infos)
            config["quantization_config"] = self._block_formats()
            if _ROPE_FREQS in self._tensors:
                config["rope_parameters"] = self._llama3_rope(self._tensors.pop(_ROPE_FREQS))
            if all(name in self._tensors for name in _ROPE_FACTORS.values()):
                config["rope_parameters"] = self._longrope(config["rope_parameters"])
        except BaseException:
            self.close()
            raise
        self._heads = self._interleaved_heads()
        self._file.bytes_read = 0

    @property
    def tensor_names(self) -> list[str]:
        return list(self._tensors)

    @property
    def bytes_read(self) -> int:
        return self._file.bytes_read

    @property
    def metadata_keys(self) -> list[str]:
        return self._header.keys

    def metadata(self, key: str, default: Any = None) -> Any:
        """A metadata value under its GGUF key, decoded at each call; arrays as lists (``tokenizer.ggml.tokens``)."""
        return self._header.value(key, default)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._info(name).shape

    def check_readable(self, name: str, *, is_packed: bool = False) -> None:
        info = self._info(name)
        if info.format is None:
            raise ModelError(
                f"{name} ({info.name}) in {self.path} is of type {_type_name(info.type_id)}, "
                f"allowed: {', '.join(each.name for each in FORMATS.values())}",
                hint="use another quantisation of the model, such as Q4_K_M or Q8_0",
            )
        if len(info.shape) > 2 or (len(info.shape) == 1 and info.format.elements > 1):
            raise ModelError(
                f"{name} ({info.name}) in {self.path} has shape {list(info.shape)} as {info.format.name}, allowed: "
                f"matrices, and vectors as {', '.join(_PLAIN)}",
                hint=FETCH_AGAIN,
            )

    def stored_dtype(self, name: str) -> torch.dtype:
        import torch

        self.check_readable(name)
        found = self._info(name).format
        dtype: torch.dtype = getattr(torch, _PLAIN.get(found.name if found else "", "float32"))
        return dtype

    def row_unit(self, name: str) -> int:
        heads = self._heads.get(name)
        return 1 if heads is None else self.shape(name)[0] // heads

    def read_chunk(self, out: torch.Tensor, name: str, rows: range, columns: range | None) -> None:
        """Whole heads where rows are interleaved, whole blocks where columns are cut; what is over is dropped."""
        info, unit = self._info(name), self.row_unit(name)
        wide = range(rows.start // unit * unit, -(-rows.stop // unit) * unit)
        values = self._read_values(info, wide, columns)
        if unit > 1:  # pairs (x0 y0 x1 y1 ...) back to halves (x0 x1 ... y0 y1 ...)
            values = values.view(-1, unit // 2, 2, values.shape[-1]).transpose(1, 2).reshape(values.shape)
        out.copy_(values[rows.start - wide.start : rows.stop - wide.start].view(out.shape))
        if self._family.has_gains_plus_one and name.endswith("norm.weight"):
            out.sub_(1.0)

    def read_blocks(self, name: str, rows: range, columns: range) -> tuple[torch.Tensor, int]:
        """Whole blocks as they are stored: ([rows, blocks, bytes] uint8, the first one's column)."""
        import numpy as np
        import torch

        info, unit = self._info(name), self.row_unit(name)
        assert info.format is not None, "check_readable comes first"
        block, size = info.format.elements, info.format.num_bytes
        first, last = columns.start // block, -(-columns.stop // block)
        wide = range(rows.start // unit * unit, -(-rows.stop // unit) * unit)
        raw = np.empty((len(wide), (last - first) * size), dtype=np.uint8)
        self._file.read_rows(raw, info.offset + wide.start * info.row_bytes + first * size, info.row_bytes)
        blocks = torch.from_numpy(raw).view(len(wide), last - first, size)
        if unit > 1:  # as in read_chunk
            blocks = blocks.view(-1, unit // 2, 2, *blocks.shape[1:]).transpose(1, 2).reshape(blocks.shape)
        return blocks[rows.start - wide.start : rows.stop - wide.start], first * block

    def close(self) -> None:
        self._header.close()
        self._file.close()

    def _read_values(self, info: TensorInfo, rows: range, columns: range | None) -> torch.Tensor:
        """[rows, columns] of a matrix; a vector counts as one column."""
        import numpy as np
        import torch

        assert info.format is not None, "check_readable comes first"
        row_elements, row_bytes = (
            (info.shape[1], info.row_bytes) if len(info.shape) == 2 else (1, info.format.num_bytes)
        )
        columns = range(row_elements) if columns is None else columns
        block, size = info.format.elements, info.format.num_bytes
        first, last = columns.start // block, -(-columns.stop // block)
        raw = np.empty((len(rows), (last - first) * size), dtype=np.uint8)
        self._file.read_rows(raw, info.offset + rows.start * row_bytes + first * size, row_bytes)
        if info.format.name in _PLAIN:
            return torch.from_numpy(raw).view(getattr(torch, _PLAIN[info.format.name]))
        from gguf import GGMLQuantizationType, quants

        # One long row: the package works in groups of 16 rows, which for a small model are too short to be quick.
        values = quants.dequantize(raw.reshape(1, -1), GGMLQuantizationType(info.type_id)).reshape(len(rows), -1)
        return torch.from_numpy(values)[:, columns.start - first * block : columns.stop - first * block]

    def _block_formats(self) -> dict[str, Any] | None:
        """Of matrices in block formats, in the shape of a ``quantization_config``; None when there are none."""
        formats = {
            name: info.format.name for name, info in self._tensors.items() if info.format and len(info.shape) == 2
        }
        packed = {name: kind for name, kind in formats.items() if kind not in _PLAIN}
        return {"quant_method": "gguf", "block_formats": packed} if packed else None

    def _interleaved_heads(self) -> dict[str, int]:
        """Tensors whose rows llama.cpp's converter interleaves within each head -> number of heads: q and k."""
        if not self._family.is_interleaved:
            return {}
        arch = self._header.value("general.architecture")
        num_heads = self._header.value(f"{arch}.attention.head_count")
        num_kv_heads = self._header.value(f"{arch}.attention.head_count_kv", num_heads)
        counts = {"q_proj": num_heads, "k_proj": num_kv_heads}
        found = {name: counts.get(name.split(".")[-2]) for name in self._tensors if name.count(".") > 1}
        return {
            name: count
            for name, count in found.items()
            if isinstance(count, int) and count > 0 and self._tensors[name].shape[0] % (2 * count) == 0
        }

    def _llama3_rope(self, info: TensorInfo) -> dict[str, Any]:
        theta = self._header.value("llama.rope.freq_base", 10_000.0)
        return llama3_rope(self._vector(info), theta, self.path)

    def _longrope(self, rope: Mapping[str, Any]) -> dict[str, Any]:
        """Of Phi-3: the factors of either length stand in tensors."""
        arch = self._header.value("general.architecture")
        factors = {key: self._vector(self._tensors.pop(name)) for key, name in _ROPE_FACTORS.items()}
        found = {
            "original_max_position_embeddings": f"{arch}.rope.scaling.original_context_length",
            "attention_factor": f"{arch}.rope.scaling.attn_factor",
        }
        values = {key: self._header.value(name) for key, name in found.items()}
        present = {key: value for key, value in values.items() if value is not None}
        return {"rope_type": "longrope", "rope_theta": rope["rope_theta"]} | factors | present

    def _vector(self, info: TensorInfo) -> list[float]:
        if info.format is None or info.format.name != "F32" or len(info.shape) != 1 or not info.shape[0]:
            raise self._header.damaged(f"{info.name} is no vector of F32")
        return list(struct.unpack(f"<{info.shape[0]}f", self._file.read(info.offset, info.shape[0] * 4)))

    def _info(self, name: str) -> TensorInfo:
        info = self._tensors.get(name)
        if info is None:
            raise ModelError(f"{self.path} has no tensor {name}", hint=FETCH_AGAIN)
        return info


def hf_name(name: str, family: GGUFFamily) -> str:
    """blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight; an unknown part stays as it is."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+)\.(\w+)", name)
    if found is None:
        return name
    layer, stem, kind = str(found[1] or ""), str(found[2]), str(found[3])
    expert = re.fullmatch(r"(ffn_\w+)\.(\d+)", stem)  # of older files, which have a tensor an expert
    renamed = family.stem(f"{expert[1]}_exps").replace("{e}", expert[2]) if expert else family.stem(stem)
    return f"{renamed}.{kind}" if not layer else f"{family.layer}.{layer}.{renamed}.{kind}"


def _matrices(info: TensorInfo, family: GGUFFamily) -> Iterator[tuple[str, TensorInfo]]:
    """A tensor under its Hugging Face name; one of experts [experts, out, in] as a matrix each."""
    name = hf_name(info.name, family)
    if "{e}" in name and len(info.shape) == 3 and info.format is not None:
        experts, *shape = info.shape
        each = shape[0] * info.row_bytes
        for expert in range(experts):
            yield name.format(e=expert), replace(info, shape=tuple(shape), offset=info.offset + expert * each)
    elif name.endswith("shared_expert_gate.weight") and len(info.shape) == 1:
        yield name, replace(info, shape=(1, *info.shape))
    else:
        yield name, info


def _type_name(type_id: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return str(GGMLQuantizationType(type_id).name)
    except ValueError:
        return f"number {type_id}"
