"""GGUF blocks kept packed stand for the numbers that the gguf package reads, for any rows and columns of a rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aphro_core.checkpoint.open import open_checkpoint
from aphro_core.models.quantization import GGUF_KINDS, GGUF_REQUANTISED
from aphro_core.models.registry import load_spec
from aphro_core.parallel.memory import weights_bytes
from aphro_core.parallel.shard import build_plan
from aphro_core.worker.loader import load_weights
from tests import tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("quant", "tp"), [(quant, 3) for quant in GGUF_KINDS] + [(quant, tp) for quant in ("Q4_K", "Q8_0") for tp in (1, 8)]
)
def test_ranks_hold_their_part_of_the_blocks(quant: str, tp: int, tmp_path: Path) -> None:
    tiny.write_tiny_gguf(tmp_path / "x.gguf", quant=quant)
    check_ranks(tmp_path / "x.gguf", tp, GGUF_REQUANTISED if quant in GGUF_REQUANTISED else ())


MIXED = {
    "v_proj": "Q6_K",
    "layers.0.mlp.down": "Q6_K",
    "up_proj": "Q5_0",
    "layers.1.mlp.gate": "Q8_0",
    "o_proj": "Q5_K",
}


@pytest.mark.parametrize("tp", [1, 3, 5])
def test_matrices_that_are_computed_as_one_may_be_of_several_formats(tp: int, tmp_path: Path) -> None:
    """As the usual mixtures are (Q4_K_M: attention's v and every other down in Q6_K); only what is stored in floating
    point beside blocks makes them all be expanded."""
    tiny.write_tiny_gguf(tmp_path / "x.gguf", quant="Q4_K", others=MIXED)
    check_ranks(tmp_path / "x.gguf", tp, ("Q5_K",))
    tiny.write_tiny_gguf(tmp_path / "y.gguf", quant="Q4_K", others={"k_proj": "F16"})
    check_ranks(tmp_path / "y.gguf", tp, ())


def check_ranks(path: Path, tp: int, requantised: tuple[str, ...]) -> None:
    for rank in range(tp):
        with open_checkpoint(path) as checkpoint:
            packed_spec, plain_spec = load_spec(checkpoint.hf_config), load_spec(checkpoint.hf_config, "none")
            shard = build_plan(packed_spec, tp, 1).ranks[rank]
            assert shard == build_plan(plain_spec, tp, 1).ranks[rank]
            packed = load_weights(checkpoint, packed_spec, shard, torch.float32, CPU)
            plain = load_weights(checkpoint, plain_spec, shard, torch.float32, CPU)
        assert set(packed) == set(plain)
        total = 0
        for name, expected in plain.items():
            found = packed[name]
            is_counted = name != "lm_head.weight" or not plain_spec.tie_word_embeddings
            if isinstance(found, list):
                total += sum(matrix.nbytes for matrix in found) * is_counted
                found = torch.cat([matrix.dequantise(torch.float32) for matrix in found])
            else:
                total += found.nbytes * is_counted
            half_a_step = float(expected.abs().max()) / 127 / 2 if requantised else 0.0
            torch.testing.assert_close(found, expected, atol=half_a_step + 1e-6, rtol=1e-5)
        assert weights_bytes(packed_spec, shard, 4) == total
        assert weights_bytes(packed_spec, shard, 2) < 0.75 * weights_bytes(plain_spec, shard, 2)
