"""The sentence about quantised weights says their formats and what the memory model counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from aphro_core.checkpoint.open import open_checkpoint
from aphro_core.models.packed_summary import describe_weights
from aphro_core.models.registry import load_spec
from aphro_core.parallel.memory import weights_bytes
from aphro_core.parallel.shard import build_plan
from tests.tiny import write_tiny_gguf


@pytest.mark.parametrize(
    ("quant", "others", "asked", "expected"),
    [
        ("Q4_0", {}, None, "gguf, kept packed (Q4_0 as int4): 0.62 bytes a weight."),
        ("Q4_K", {"mlp": "Q6_K"}, None, "gguf, kept packed (Q6_K as int8, Q4_K as int4): 0.97 bytes a weight."),
        ("Q5_K", {}, None, "gguf, kept packed (Q5_K requantised to int8): 1.06 bytes a weight."),
        ("Q8_0", {"o_proj": "F16"}, None, "1.06 bytes a weight; 11% of the weights stay in bfloat16."),
        (
            "F16",
            {},
            "int8",
            "quantised to int8 while loading: 1.03 bytes a weight; 3% of the weights stay in bfloat16.",
        ),
    ],
)
def test_what_a_weight_takes(
    quant: str, others: dict[str, str], asked: str | None, expected: str, tmp_path: Path
) -> None:
    write_tiny_gguf(tmp_path / "x.gguf", quant=quant, others=others)
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        spec = load_spec(checkpoint.hf_config, asked)
    said = describe_weights(spec, "bfloat16")
    assert expected in said


def test_the_bytes_are_those_of_the_memory_model(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "x.gguf", quant="Q4_K", others={"v_proj": "Q6_K"}, vocab_size=64)
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        spec, plain = load_spec(checkpoint.hf_config), load_spec(checkpoint.hf_config, "none")
    (shard,) = build_plan(spec, 1, 1).ranks
    said = float(describe_weights(spec, "float16").split(": ")[1].split()[0])
    matrices = 2 * (256 * 256 * 2 + 256 * 64 * 2 + 256 * 512 * 3) + 64 * 256  # the head is the embedding
    rest = weights_bytes(plain, shard, 2) - 2 * matrices
    assert (weights_bytes(spec, shard, 2) - rest) / matrices == pytest.approx(said, abs=0.005)
