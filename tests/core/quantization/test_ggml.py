"""GGUF blocks kept packed stand for the numbers that the gguf package reads, for any rows and columns of a rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aphro_core.checkpoint.open import open_checkpoint
from aphro_core.models.quantization import GGUF_KINDS
from aphro_core.models.registry import load_spec
from aphro_core.parallel.memory import weights_bytes
from aphro_core.parallel.shard import build_plan
from aphro_core.worker.loader import load_weights
from tests import tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("quant", GGUF_KINDS)
@pytest.mark.parametrize("tp", [1, 3, 8])
def test_ranks_hold_their_part_of_the_blocks(quant: str, tp: int, tmp_path: Path) -> None:
    tiny.write_tiny_gguf(tmp_path / "x.gguf", quant=quant)
    for rank in range(tp):
        with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
            packed_spec, plain_spec = load_spec(checkpoint.hf_config), load_spec(checkpoint.hf_config, "none")
            shard = build_plan(packed_spec, tp, 1).ranks[rank]
            assert shard == build_plan(plain_spec, tp, 1).ranks[rank]
            packed = load_weights(checkpoint, packed_spec, shard, torch.float32, CPU)
            plain = load_weights(checkpoint, plain_spec, shard, torch.float32, CPU)
        assert set(packed) == set(plain)
        total = 0
        for name, expected in plain.items():
            found = packed[name]
            if isinstance(found, list):
                total += sum(matrix.nbytes for matrix in found)
                found = torch.cat([matrix.dequantise(torch.float32) for matrix in found])
            else:
                total += found.nbytes if name != "lm_head.weight" or not plain_spec.tie_word_embeddings else 0
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert weights_bytes(packed_spec, shard, 4) == total
        assert weights_bytes(packed_spec, shard, 2) < 0.75 * weights_bytes(plain_spec, shard, 2)
