"""Every layout's reader: what each rank holds is its part of the dequantised weights, and the bytes are as planned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from aphro_core.checkpoint.open import open_checkpoint
from aphro_core.models.registry import load_spec
from aphro_core.parallel.memory import weights_bytes
from aphro_core.parallel.shard import RankShard, build_plan, legal_tensor_parallel_sizes
from aphro_core.worker.loader import load_weights
from tests.formats import TINY_FORMATS, write_tiny_format

CPU = torch.device("cpu")


def expected(state: dict[str, Tensor], shard: RankShard, width: int, layer: int) -> dict[str, Tensor]:
    at, mlp = f"model.layers.{layer}", slice(shard.mlp.start, shard.mlp.stop)
    q = slice(shard.heads.start * width, shard.heads.stop * width)
    kv = slice(shard.kv_heads.start * width, shard.kv_heads.stop * width)
    qkv = [state[f"{at}.self_attn.{name}_proj.weight"] for name in "qkv"]
    return {
        "attention.qkv_proj": torch.cat([qkv[0][q], qkv[1][kv], qkv[2][kv]]),
        "attention.o_proj": state[f"{at}.self_attn.o_proj.weight"][:, q],
        "mlp.gate_up_proj": torch.cat([state[f"{at}.mlp.{name}_proj.weight"][mlp] for name in ("gate", "up")]),
        "mlp.down_proj": state[f"{at}.mlp.down_proj.weight"][:, mlp],
    }


@pytest.mark.parametrize("name", TINY_FORMATS)
def test_ranks_hold_their_part_of_the_dequantised_weights(name: str, tmp_path: Path) -> None:
    state = write_tiny_format(tmp_path, name).state_dict()
    for tp in (1, 2, 3, 5):
        for rank in range(tp):
            with open_checkpoint(tmp_path) as checkpoint:
                spec = load_spec(checkpoint.hf_config)
                assert 5 in legal_tensor_parallel_sizes(spec)
                shard = build_plan(spec, tp, 1).ranks[rank]
                weights = load_weights(checkpoint, spec, shard, torch.float32, CPU)
            total = 0
            for layer in shard.layers:
                for part, matrix in expected(state, shard, spec.head_dim, layer).items():
                    packed = weights[f"layers.{layer}.{part}.weight"]
                    assert isinstance(packed, list)
                    found = torch.cat([each.dequantise(torch.float32) for each in packed])
                    torch.testing.assert_close(found, matrix, atol=1e-5, rtol=1e-5)
                    total += sum(each.nbytes for each in packed)
            total += sum(weight.nbytes for weight in weights.values() if isinstance(weight, Tensor))
            if "act-order" not in name:
                assert weights_bytes(spec, shard, 4) == total
