"""Which decoders let one launch make what their layers begin with, and what it makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from aphro_kernels.begin_step import begin_rows_reference, new_rows
from aphro_kernels.step_rows import build_step_rows

from aphro_core.checkpoint.open import open_checkpoint
from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.layers.batch import Batch, PagedRows
from aphro_core.layers.decoder import Decoder
from aphro_core.models.registry import load_spec
from aphro_core.parallel.shard import build_plan
from aphro_core.worker.loader import load_weights
from tests.tiny import write_tiny_checkpoint

CPU = torch.device("cpu")


def build(folder: Path, family: str, tp: int = 1, pp: int = 1, rank: int = 0) -> Decoder:
    write_tiny_checkpoint(folder, family)
    with open_checkpoint(folder) as checkpoint:
        spec = load_spec(checkpoint.hf_config)
        shard = build_plan(spec, tp, pp).ranks[rank]
        weights = load_weights(checkpoint, spec, shard, torch.float32, CPU)
    return Decoder(spec, shard, weights, TensorParallelGroup(shard.tp_rank, tp))


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_it_makes_what_the_layers_would(tmp_path: Path, family: str) -> None:
    decoder = build(tmp_path, family)
    start = decoder.row_start
    assert start is not None
    rows = build_step_rows(5, 16, CPU)
    rows.token_ids.copy_(torch.tensor([3, 0, 88, 3, 41]))
    rows.positions.copy_(torch.tensor([0, 0, 7, 8191, 500]))
    begun = new_rows(5, start)
    begin_rows_reference(rows, start, begun)
    batch = Batch(rows.token_ids, rows.positions, PagedRows(rows.slot_mapping, []), {}, rows.token_ids)
    (rotation,) = decoder.rotations(batch, torch.float32)
    assert torch.equal(begun.x, decoder.begin(batch, None))
    assert torch.equal(begun.cos, rotation.cos)
    assert torch.equal(begun.sin, rotation.sin)
    batch.begun = begun
    assert decoder.begin(batch, None) is begun.x
    assert decoder.rotations(batch, torch.float32)[0].cos is begun.cos


@pytest.mark.parametrize(
    ("family", "place"),
    [
        ("gemma2", {}),  # embeddings are scaled
        ("gemma3", {}),  # two kinds of angles
        ("opt", {}),  # learned positions
        ("llama", {"tp": 2}),  # a part of the vocabulary
        ("llama", {"pp": 2, "rank": 1}),  # no embedding at all
    ],
)
def test_where_there_is_more_to_it_the_layers_do_it(tmp_path: Path, family: str, place: dict[str, int]) -> None:
    assert build(tmp_path, family, **place).row_start is None
