"""Layers as chains: the same as the blocks, and only where nothing stands between a layer's parts."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from aphro_kernels import chain_layer, packed_chain_layer
from aphro_kernels.chain_layer import ChainLayer, build_chain_workspace
from aphro_kernels.packed_chain_layer import PackedChainLayer
from aphro_kernels.packed_linear import PackedWeight
from torch import Tensor

from aphro_core import host
from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.layers import chained
from aphro_core.layers.attention import Attention
from aphro_core.layers.batch import PagedPart, PagedRows
from aphro_core.layers.block import Block
from aphro_core.layers.chained import ChainedLayers, LayerParts, chain_layers
from aphro_core.layers.linear import Linear
from aphro_core.layers.mlp import GatedMLP, PlainMLP
from aphro_core.layers.norm import LayerNorm, RMSNorm
from aphro_core.layers.rotary import Rotation
from aphro_core.quantization.linear import DequantisedProduct, QuantizedLinear
from aphro_core.quantization.online import quantise

HIDDEN, HEADS, KV_HEADS, DIM, INNER = 64, 4, 2, 16, 128
META = torch.device("meta")  # neither a CPU's order of weights nor its kernels


def weight(*size: int) -> Tensor:
    return torch.randn(*size) / size[-1] ** 0.5


def build_parts(*, out_bias: Tensor | None = None) -> LayerParts:
    width = (HEADS + 2 * KV_HEADS) * DIM
    heads = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "window": None, "dtype": torch.float32}
    attention = Attention(
        Linear(weight(width, HIDDEN), torch.randn(width)),
        Linear(weight(HIDDEN, HEADS * DIM), out_bias),
        **heads,
        device=META,
    )
    mlp = GatedMLP(Linear(weight(2 * INNER, HIDDEN)), Linear(weight(HIDDEN, INNER)))
    return LayerParts(RMSNorm(torch.rand(HIDDEN) + 0.5, 1e-5), attention, RMSNorm(torch.rand(HIDDEN) + 0.5, 1e-5), mlp)


def test_a_gpu_that_is_shared_by_mps_has_no_chain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layers = [build_parts(), build_parts()]
    monkeypatch.setattr(host, "sign_of_mps", lambda: None)
    assert build(layers) is not None
    monkeypatch.setattr(host, "sign_of_mps", lambda: "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=50")
    assert build(layers) is None
    (record,) = caplog.records
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=50" in record.getMessage()


def build(layers: list[LayerParts | None], rows: range = range(1, 65)) -> ChainedLayers | None:
    """As on a card that has the kernel."""
    plain = property(lambda self: (self._weight, self._bias))
    with (
        mock.patch("aphro_core.layers.linear._can_pack", return_value=False),
        mock.patch.object(Linear, "plain", plain),
        mock.patch.object(chained, "chain_rows", return_value=rows),
        mock.patch.object(chain_layer, "num_multiprocessors", return_value=132),
        mock.patch.object(chained, "build_chain_workspace", build_chain_workspace),
    ):
        return chain_layers(layers)


def decode_rows(num_rows: int) -> PagedRows:
    tables = torch.arange(num_rows, dtype=torch.int32)[:, None]
    lens = torch.full((num_rows,), 5, dtype=torch.int32)
    part = PagedPart(0, num_rows, tables, lens, torch.arange(num_rows + 1, dtype=torch.int32), 1, 5)
    return PagedRows(torch.arange(num_rows) * 16 + 4, [part])


def test_chains_are_the_blocks() -> None:
    torch.manual_seed(0)
    with mock.patch("aphro_core.layers.linear._can_pack", return_value=False):
        layers = [build_parts() for _ in range(3)]
    group = TensorParallelGroup(0, 1)
    blocks = [Block(one.input_norm, one.attention, one.post_norm, one.mlp, group) for one in layers]
    assert [block.parts for block in blocks] == layers
    num_rows = 5
    x, rows = torch.randn(num_rows, HIDDEN), decode_rows(num_rows)
    angles = torch.randn(num_rows, DIM // 2)
    rotation = Rotation(angles.cos(), angles.sin())
    caches = [torch.randn(num_rows, 2, KV_HEADS, 16, DIM) for _ in layers]
    copies = [cache.clone() for cache in caches]

    expected, delta = x.clone(), None
    for block, cache in zip(blocks, caches, strict=True):
        delta = block(expected, delta, rotation, rows, cache)
    assert delta is not None
    expected += delta.whole()

    chains = build([*layers])
    assert chains is not None
    assert chains.takes(x, rows)
    assert chains.workspace_bytes > 0
    with mock.patch.object(ChainLayer, "__call__", ChainLayer.reference_):
        found = chains(x, [rotation] * 3, rows, copies, range(3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(copies, caches, rtol=1e-4, atol=1e-4)


def test_which_steps_are_taken() -> None:
    chains = build([build_parts()], range(2, 5))
    assert chains is not None
    assert [n for n in range(1, 9) if chains.takes(torch.zeros(n, HIDDEN), decode_rows(n))] == [2, 3, 4]
    rows = decode_rows(3)
    rows.parts[0].max_query_len = 2
    assert not chains.takes(torch.zeros(3, HIDDEN), rows)
    assert not chains.takes(torch.zeros(HIDDEN, 3).t(), decode_rows(3))


def pack(linear: Linear) -> QuantizedLinear:
    """The same layer with codes of 4 bits, in groups of 32."""
    matrix = quantise(linear._weight, "int4", 32, torch.float32)
    return QuantizedLinear([matrix], linear._bias, torch.float32)


def packed(linear: QuantizedLinear) -> tuple[PackedWeight, Tensor | None]:
    """As on a GPU."""
    product = linear._products[0]
    assert isinstance(product, DequantisedProduct)
    return product._matrix.for_kernels(), linear._bias


def test_chains_of_quantised_layers_are_the_blocks() -> None:
    torch.manual_seed(0)
    layers = []
    with mock.patch("aphro_core.layers.linear._can_pack", return_value=False):
        for one in (build_parts(), build_parts()):
            gate_up, down, _ = one.mlp.parts  # type: ignore[attr-defined]
            one.attention._qkv, one.attention._out = map(pack, one.attention.projections)  # type: ignore[arg-type]
            layers.append(replace(one, mlp=GatedMLP(pack(gate_up), pack(down))))
    group, x, rows = TensorParallelGroup(0, 1), torch.randn(1, HIDDEN), decode_rows(1)
    rotation = Rotation(torch.ones(1, DIM // 2), torch.zeros(1, DIM // 2))
    caches = [torch.randn(1, 2, KV_HEADS, 16, DIM) for _ in layers]
    expected, delta = x.clone(), None
    for one, cache in zip(layers, caches, strict=True):
        block = Block(one.input_norm, one.attention, one.post_norm, one.mlp, group)
        delta = block(expected, delta, rotation, rows, cache)
    assert delta is not None
    expected += delta.whole()
    with (
        mock.patch.object(QuantizedLinear, "packed", property(packed)),
        mock.patch.object(chained, "packed_chain_rows", return_value=range(1, 2)),
        mock.patch.object(packed_chain_layer, "num_multiprocessors", return_value=132),
        mock.patch.object(Linear, "plain", property(lambda self: (self._weight, self._bias))),
    ):
        chains = chain_layers(layers)
        assert chain_layers([layers[0], build_parts()]) is None, "one of codes, one of plain weights"
    assert chains is not None
    assert chains.takes(x, rows)
    with mock.patch.object(PackedChainLayer, "__call__", PackedChainLayer.reference_):
        found = chains(x, [rotation] * 2, rows, caches, range(2))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("other", ["none", "bias", "layer norm", "plain mlp", "gelu", "nowhere faster"])
def test_layers_that_are_no_chain(other: str) -> None:
    layer: LayerParts | None = build_parts(out_bias=torch.zeros(HIDDEN) if other == "bias" else None)
    assert layer is not None
    if other == "none":
        layer = None
    elif other == "layer norm":
        layer = replace(layer, post_norm=LayerNorm(torch.ones(HIDDEN), None, 1e-5))
    elif other == "plain mlp":
        layer = replace(layer, mlp=PlainMLP(Linear(weight(INNER, HIDDEN)), Linear(weight(HIDDEN, INNER)), "gelu"))
    elif other == "gelu":
        mlp = GatedMLP(Linear(weight(2 * INNER, HIDDEN)), Linear(weight(HIDDEN, INNER)), "gelu_tanh")
        layer = replace(layer, mlp=mlp)
    rows = range(0) if other == "nowhere faster" else range(1, 65)
    assert build([build_parts(), layer], rows) is None
    assert build([], rows) is None


def test_a_block_with_something_between_its_parts() -> None:
    one = build_parts()
    parts = (one.input_norm, one.attention, one.post_norm, one.mlp)
    assert Block(*parts, TensorParallelGroup(0, 1), lambda x: x).parts is None
    assert Block(*parts, TensorParallelGroup(0, 2)).parts is None
