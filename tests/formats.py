"""Tiny checkpoints of each quantised layout, written bit by bit from its published description, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import torch
from aphro_kernels.quantise_rows import RowKind, quantise_rows_reference
from safetensors.torch import load_file, save_file
from torch import Tensor

from aphro_core.parallel.shard import ShardingPlan
from tests.tiny import tiny_model

GROUP: Final = 32
INPUT_SCALE: Final = 0.05
SIZES: Final[dict[str, Any]] = {
    "hidden_size": 96,
    "intermediate_size": 160,  # five groups
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "vocab_size": 131,
    "tie_word_embeddings": False,
}
LINEAR: Final = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight", ".fc1.weight", ".fc2.weight")
# (module's tensors, the weight that they stand for)
Written = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class TinyFormat:
    config: dict[str, Any]
    write: Callable[[Tensor, torch.Generator], Written]
    inputs: float | Literal["dynamic"] | None = None  # how activations are rounded: by this scale, or each row's own


def write_tiny_format(
    folder: Path, name: str, family: str = "llama", *, has_head: bool = False, **overrides: Any
) -> Any:
    """Write the checkpoint; returns the transformers model with the dequantised weights in float32. ``has_head``: its
    head is quantised too."""
    row, model = TINY_FORMATS[name], tiny_model(family, **(SIZES | overrides))
    generator = torch.Generator().manual_seed(1)
    meaning = folder / "meaning"
    model.save_pretrained(meaning)  # under the names of published checkpoints
    state, meant = {}, load_file(meaning / "model.safetensors")
    for key, weight in list(meant.items()):
        if not key.endswith(LINEAR) and not (has_head and key == "lm_head.weight"):
            state[key] = weight
            continue
        tensors, meant[key] = row.write(weight, generator)
        for part, tensor in tensors.items():
            state.setdefault(f"{key.removesuffix('weight')}{part}", tensor.contiguous())  # a bias may be there
    save_file(meant, meaning / "model.safetensors", metadata={"format": "pt"})
    section = row.config | ({"lm_head": True, "ignore": []} if has_head else {})
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "quantization_config": section}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    return type(model).from_pretrained(meaning, dtype=torch.float32, attn_implementation="eager").eval()


def round_inputs(model: Any, name: str, plan: ShardingPlan) -> None:
    """Make the model round what its quantised linear layers read, as the format does: of the columns that tensor
    parallel ranks share out, each rank its own."""
    row = TINY_FORMATS[name]
    if row.inputs is None:
        return
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    first_stage = plan.ranks[: plan.ranks[0].tp_size]
    cuts = {
        "o_proj": [len(shard.heads) * head_dim for shard in first_stage],
        "down_proj": [len(shard.mlp) for shard in first_stage],
    }
    kind: RowKind = "int8" if row.config.get("format") == "int-quantized" else "fp8"
    scale = None if row.inputs == "dynamic" else row.inputs

    def hook(module: Any, inputs: tuple[Tensor, ...], sizes: list[int] | None) -> tuple[Tensor]:
        (x,) = inputs
        parts = x.split(sizes, dim=-1) if sizes is not None else (x,)
        rounded = []
        for part in parts:
            codes, scales = quantise_rows_reference(part.flatten(0, -2), kind, scale)
            rounded.append((codes.float() * scales[:, None]).view(part.shape))
        return (torch.cat(rounded, dim=-1),)

    for module_name, module in model.named_modules():
        if f"{module_name}.weight".endswith(LINEAR):
            sizes = cuts.get(module_name.rsplit(".", 1)[-1])
            module.register_forward_pre_hook(partial(hook, sizes=sizes))


def pack(codes: Tensor, bits: int, dim: int) -> Tensor:
    """int32 words along ``dim``, the first code in the lowest bits."""
    codes = codes.to(torch.int64).movedim(dim, -1).unflatten(-1, (-1, 32 // bits))
    words = (codes << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).movedim(-1, dim)


def _codes(weight: Tensor, bits: int, index: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [out, in], scales [out, groups] float16, zeros [out, groups]) for groups given by ``index`` [in]."""
    top, groups = 2**bits - 1, int(index.max()) + 1
    scales, zeros = torch.empty(len(weight), groups), torch.empty(len(weight), groups, dtype=torch.int32)
    for group in range(groups):
        low, high = weight[:, index == group].aminmax(dim=1)
        if symmetric:
            scale = torch.maximum(-low, high) / (top // 2)
            zeros[:, group] = (top + 1) // 2
        else:
            scale = (high.clamp(min=0) - low.clamp(max=0)) / top
            zeros[:, group] = (-low.clamp(max=0) / scale).round().clamp(0, top).to(torch.int32)
        scales[:, group] = scale
    scales = scales.half()
    codes = (weight / scales.float()[:, index]).round() + zeros[:, index]
    return codes.clamp(0, top).to(torch.int32), scales, zeros


def _meaning(codes: Tensor, scales: Tensor, zeros: Tensor, index: Tensor) -> Tensor:
    return (codes - zeros[:, index]).float() * scales.float()[:, index]


def _gptq(bits: int, *, symmetric: bool, act_order: bool, version: int = 1) -> TinyFormat:
    def write(weight: Tensor, generator: torch.Generator) -> Written:
        index = torch.arange(weight.shape[1]) // GROUP
        if act_order:
            index = index[torch.randperm(len(index), generator=generator)]
        codes, scales, zeros = _codes(weight, bits, index, symmetric=symmetric)
        if not symmetric:
            zeros[1, 0] = 0  # less 1 it borrows from the zero point above it in its word
        ones = sum(1 << bits * code for code in range(32 // bits)) if version == 1 else 0
        tensors = {
            "qweight": pack(codes.T, bits, 0),
            "qzeros": pack(zeros.T, bits, 1) - ones,
            "scales": scales.T,
            "g_idx": index.to(torch.int32),
            "bias": torch.zeros(len(weight)),
        }
        return tensors, _meaning(codes, scales, zeros, index)

    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": symmetric, "desc_act": act_order}
    return TinyFormat(config | {"checkpoint_format": "gptq" if version == 1 else "gptq_v2"}, write)


def _awq_write(weight: Tensor, generator: torch.Generator) -> Written:
    index = torch.arange(weight.shape[1]) // GROUP
    codes, scales, zeros = _codes(weight, 4, index, symmetric=False)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # which output each nibble of a word holds, the lowest first

    def shuffled(x: Tensor) -> Tensor:
        return pack(x.unflatten(1, (-1, 8))[..., order].flatten(1), 4, 1)

    tensors = {"qweight": shuffled(codes.T), "qzeros": shuffled(zeros.T), "scales": scales.T}
    return tensors, _meaning(codes, scales, zeros, index)


def _to_fp8(weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    codes = (weight / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, codes.float() * scales


def _fp8_tensor(weight: Tensor, generator: torch.Generator) -> Written:
    scale = weight.abs().max() / 448
    codes, meaning = _to_fp8(weight, scale)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(INPUT_SCALE)}, meaning


def _fp8_block(weight: Tensor, generator: torch.Generator) -> Written:
    rows, columns = 40, GROUP  # blocks that heads do not end with
    num_rows, num_columns = weight.shape
    scales = torch.empty(-(-num_rows // rows), num_columns // columns)
    for i in range(len(scales)):
        block = weight[i * rows : (i + 1) * rows].view(-1, scales.shape[1], columns)
        scales[i] = block.abs().amax(dim=(0, 2)) / 448
    whole = scales.repeat_interleave(rows, 0)[:num_rows].repeat_interleave(columns, 1)
    codes, meaning = _to_fp8(weight, whole)
    return {"weight": codes, "weight_scale_inv": scales}, meaning


def _fp8_channel(weight: Tensor, generator: torch.Generator) -> Written:
    scales = (weight.abs().amax(dim=1, keepdim=True) / 448).bfloat16()
    codes, meaning = _to_fp8(weight, scales.float())
    return {"weight": codes, "weight_scale": scales}, meaning


def _int8_channel(weight: Tensor, generator: torch.Generator) -> Written:
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    codes = (weight / scales).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales


def _packed(bits: int, *, symmetric: bool, act_order: bool = False) -> TinyFormat:
    def write(weight: Tensor, generator: torch.Generator) -> Written:
        index = torch.arange(weight.shape[1]) // GROUP
        if act_order:
            index = index[torch.randperm(len(index), generator=generator)]
        codes, scales, zeros = _codes(weight, bits, index, symmetric=symmetric)
        tensors = {
            "weight_packed": pack(codes, bits, 1),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = pack(zeros, bits, 0)
        if act_order:
            tensors["weight_g_idx"] = index.to(torch.int32)
        return tensors, _meaning(codes, scales, zeros, index)

    order: dict[str, Any] = {"actorder": "group"} if act_order else {}
    return TinyFormat(_compressed("pack-quantized", "int", bits, "group", symmetric=symmetric, **order), write)


def _compressed(
    name: str, kind: str, bits: int, strategy: str, *, symmetric: bool = True, dynamic: bool | None = None, **more: Any
) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric, "dynamic": False}
    if strategy == "group":
        weights["group_size"] = GROUP
    activations = None if dynamic is None else {"num_bits": 8, "type": kind, "dynamic": dynamic, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": weights | more, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


TINY_FORMATS: Final[dict[str, TinyFormat]] = {
    "gptq": _gptq(4, symmetric=True, act_order=False),
    "gptq-asymmetric-v2": _gptq(4, symmetric=False, act_order=False, version=2),
    "gptq-act-order": _gptq(4, symmetric=False, act_order=True),
    "gptq-8bit": _gptq(8, symmetric=True, act_order=False),
    "gptq-8bit-asymmetric": _gptq(8, symmetric=False, act_order=False),
    "awq": TinyFormat(
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, _awq_write
    ),
    "fp8-static": TinyFormat({"quant_method": "fp8", "activation_scheme": "static"}, _fp8_tensor, INPUT_SCALE),
    "fp8-block": TinyFormat(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [40, GROUP]}, _fp8_block
    ),
    "compressed-fp8-static": TinyFormat(
        _compressed("float-quantized", "float", 8, "tensor", dynamic=False), _fp8_tensor, INPUT_SCALE
    ),
    "compressed-fp8-dynamic": TinyFormat(
        _compressed("float-quantized", "float", 8, "channel", dynamic=True), _fp8_channel, "dynamic"
    ),
    "compressed-int8-w8a8": TinyFormat(
        _compressed("int-quantized", "int", 8, "channel", dynamic=True), _int8_channel, "dynamic"
    ),
    "compressed-w4a16": _packed(4, symmetric=True),
    "compressed-w4a16-asymmetric": _packed(4, symmetric=False),
    "compressed-w4a16-act-order": _packed(4, symmetric=True, act_order=True),
}
