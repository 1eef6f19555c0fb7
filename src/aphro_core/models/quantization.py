"""QuantSpec: how a model's linear weights are stored and kept; the checkpoint tensors of each layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

Kind = Literal["fp8", "int8", "int4"]
Layout = Literal["online", "fp8", "gptq", "awq", "compressed-tensors", "gguf"]

Activations = Literal["static", "dynamic"] | None

# GGUF block formats -> (kind that they are kept in, elements that share a scale)
GGUF_KINDS: Final[dict[str, tuple[Kind, int]]] = {
    "Q4_0": ("int4", 32),
    "Q4_1": ("int4", 32),
    "Q4_K": ("int4", 32),
    "Q8_0": ("int8", 32),
    "Q6_K": ("int8", 16),
    "Q5_0": ("int8", 32),
    "Q3_K": ("int8", 16),
    "IQ4_NL": ("int8", 32),
    "IQ4_XS": ("int8", 32),
    "Q5_1": ("int8", 32),
    "Q5_K": ("int8", 32),
    "Q2_K": ("int8", 16),
}
# Of these the codes that are not kept as they are: with an offset a group, which int8 has not, they are rounded anew.
GGUF_REQUANTISED: Final = ("Q5_1", "Q5_K", "Q2_K")
GGUF_GROUP: Final = 32  # between whose multiples every GGUF matrix may be cut
ONLINE_GROUP: Final = 128  # the widest group of weights that are quantised while they are loaded
_FEWEST_GROUPS: Final = 16  # of the columns that tensor-parallel ranks share out, so that many ranks find one


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """One scheme for all linear layers inside the blocks, perhaps the head, of GGUF files the embedding.

    In memory a matrix [out, in] is codes and a scale for each ``group_size`` inputs of a row (None: the whole row),
    for ``int4`` an offset besides: weight = code * scale + offset.
    """

    layout: Layout  # of the checkpoint; "online": quantised while it is loaded
    kind: Kind
    bits: int = 8  # of a stored code
    group_size: int | None = None  # online it is chosen for each matrix, models/packed.py
    block_rows: int = 1  # output rows that share a scale (fp8 blocks)
    is_per_tensor: bool = False  # one scale for all
    is_symmetric: bool = True
    has_act_order: bool = False  # the group of an input is looked up (g_idx)
    has_words: bool = False  # compressed-tensors: codes side by side in words of 32 bits
    zeros_less_one: bool = False  # GPTQ's first checkpoint format stores zero points less 1
    activations: Activations = None  # rounded to 8 bits as well, by a stored scale a layer or one found a token
    has_head: bool = False  # an output head that is covered is stored quantised as well
    targets: tuple[str, ...] = ()  # modules that are quantised, as in ``ignored``; none: all
    ignored: tuple[str, ...] = ()  # modules that are left as they are: names or parts of them, or "re:" and a pattern
    block_formats: Mapping[str, str] = field(default_factory=dict)  # gguf: tensor name -> block format

    def covers(self, module: str) -> bool:
        """Whether this linear layer is quantised: ``model.layers.0.self_attn.q_proj``."""
        if self.layout == "gguf":
            return self.block_formats.get(f"{module}.weight") in GGUF_KINDS
        is_target = not self.targets or any(_names(pattern, module) for pattern in self.targets)
        return is_target and not any(_names(pattern, module) for pattern in self.ignored)

    def kind_of(self, module: str) -> Kind:
        return GGUF_KINDS[self.block_formats[f"{module}.weight"]][0] if self.layout == "gguf" else self.kind

    @property
    def per_word(self) -> int:
        """Codes in a word of 32 bits."""
        return 32 // self.bits

    @property
    def scale_name(self) -> str:
        return "weight_scale_inv" if self.layout == "fp8" and self.group_size is not None else "weight_scale"

    def tensors_of(self, module: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """The checkpoint tensors of one linear layer [rows, columns], each with its shape."""
        groups = 1 if self.group_size is None else -(-columns // self.group_size)
        words = (rows // self.per_word, columns // self.per_word)
        tensors: dict[str, tuple[int, ...]]
        if self.layout == "gptq":
            tensors = {"qweight": (words[1], rows), "qzeros": (groups, words[0]), "scales": (groups, rows)}
            tensors |= {"g_idx": (columns,)} if self.has_act_order else {}
        elif self.layout == "awq":
            tensors = {"qweight": (columns, words[0]), "qzeros": (groups, words[0]), "scales": (groups, rows)}
        elif self.layout == "compressed-tensors" and self.has_words:
            tensors = {"weight_packed": (rows, words[1]), "weight_scale": (rows, groups)}
            tensors |= {} if self.is_symmetric else {"weight_zero_point": (words[0], groups)}
            tensors |= {"weight_g_idx": (columns,)} if self.has_act_order else {}
        else:
            tensors = {"weight": (rows, columns)}
            if self.layout in ("fp8", "compressed-tensors"):
                scale_rows = 1 if self.is_per_tensor else -(-rows // self.block_rows)
                tensors[self.scale_name] = (scale_rows, groups)
                tensors |= {"input_scale": (1,)} if self.activations == "static" else {}
        return {f"{module}.{name}": shape for name, shape in tensors.items()}


def is_int4(spec: QuantSpec) -> bool:
    """Whether all its matrices are of 4 bits."""
    kinds = {GGUF_KINDS[name][0] for name in spec.block_formats.values() if name in GGUF_KINDS} or {spec.kind}
    return kinds == {"int4"}


def expands_gguf(found: QuantSpec | None, asked: str | None, dtype: str) -> bool:
    """Whether GGUF blocks are expanded though nobody asked: for float32, which is there to be exact."""
    return asked is None and found is not None and found.layout == "gguf" and dtype == "float32"


def online_group(width: int) -> int:
    """Inputs that share a scale in weights quantised while they are loaded, of a dimension cut between ranks.

    The widest power of two up to ONLINE_GROUP that leaves at least _FEWEST_GROUPS groups: a function of the model
    alone, so that every tensor-parallel size computes the same.
    """
    group = ONLINE_GROUP
    while group > 2 and (width % group or width // group < _FEWEST_GROUPS):
        group //= 2
    return group


def whole_group(width: int) -> int:
    """The same of a dimension that every rank has whole, or of one head: the widest power of two that divides it, at
    least 32, as kernels take them; else the widest divisor."""
    fitting = [group for group in (128, 64, 32) if width % group == 0]
    return (
        fitting[0] if fitting else max(group for group in range(1, min(width, ONLINE_GROUP) + 1) if width % group == 0)
    )


def _names(pattern: str, module: str) -> bool:
    """Whether an entry of an ignore list means this module: its name, a part between dots, or a regular expression."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return f".{pattern}." in f".{module}."
