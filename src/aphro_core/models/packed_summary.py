"""What is said of quantised weights at a start: how they are kept, and how many bytes one of them takes."""

from __future__ import annotations

from collections import Counter
from typing import Final

from aphro_core.models.packed import is_packed, matrix_bytes, module_of
from aphro_core.models.quantization import GGUF_KINDS, GGUF_REQUANTISED, QuantSpec
from aphro_core.models.registry import family_of
from aphro_core.models.spec import DecoderSpec
from aphro_core.models.tensors import axis_sizes, rules_of_rank

_MATRICES: Final = ("_proj.weight", "embed_tokens.weight", "lm_head.weight")
_DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


def describe_weights(spec: DecoderSpec, dtype: str) -> str:
    """One sentence about a spec with a quantisation, in a run of ``dtype``: "gguf, kept packed (Q4_K as int4, Q6_K as
    int8): 0.71 bytes a weight." Counts linear layers, embedding and head."""
    quantization = spec.quantization
    assert quantization is not None
    sizes, num_bytes, num_plain, packed = axis_sizes(spec), 0, 0, Counter[str]()
    for rule in rules_of_rank(family_of(spec).tensors, spec, None):
        is_tied = spec.tie_word_embeddings and rule.tied_to is not None
        if not rule.parameter.endswith(_MATRICES) or rule.columns is None or is_tied:
            continue
        for source in rule.sources:
            module, shape = module_of(source.name), (sizes[source.rows], sizes[rule.columns])
            if is_packed(rule, spec):
                packed[quantization.block_formats.get(source.name, quantization.kind)] += shape[0] * shape[1]
                num_bytes += matrix_bytes(spec, rule.columns, module, *shape, _DTYPE_BYTES[dtype])
            else:
                num_plain += shape[0] * shape[1]
    num_packed = packed.total()
    if not num_packed:
        return f"{quantization.layout} names no matrix that is quantised; all are kept in {dtype}."
    rest = f"; {num_plain / (num_plain + num_packed):.0%} of the weights stay in {dtype}" if num_plain else ""
    return f"{_how(quantization, packed)}: {num_bytes / num_packed:.2f} bytes a weight{rest}."


def _how(quantization: QuantSpec, packed: Counter[str]) -> str:
    """``packed``: weights of each block format, or kind."""
    if quantization.layout == "online":
        return f"quantised to {quantization.kind} while loading"
    if quantization.layout != "gguf":
        return f"{quantization.layout}, kept packed ({quantization.kind})"
    kinds = [
        f"{name} {'requantised to' if name in GGUF_REQUANTISED else 'as'} {GGUF_KINDS[name][0]}"
        for name, _ in packed.most_common()
    ]
    return f"gguf, kept packed ({', '.join(kinds)})"
