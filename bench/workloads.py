"""What the speed of a GPU is judged by: model shapes, requests S1 to S5 (X of experts), their physical limits, the
figures to beat.

The requests are those of the recorded runs: seeded ids and lengths, greedy, end-of-sequence ignored, no shared prefix.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
}
_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


def _sizes(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
    }


_LLAMA3 = {
    **_LLAMA,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
}
_MIXTRAL = {
    **{key: value for key, value in _LLAMA3.items() if key not in ("attention_bias", "mlp_bias")},
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_QWEN2_MOE = {
    **_QWEN2,
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama3-8b": {**_LLAMA3, **_sizes(4096, 32, 32, 8, 14336, 128256)},
    "qwen2.5-7b": {**_QWEN2, "tie_word_embeddings": False, **_sizes(3584, 28, 28, 4, 18944, 152064)},
    "qwen2.5-0.5b": {**_QWEN2, "tie_word_embeddings": True, **_sizes(896, 24, 14, 2, 4864, 151936)},
    "mixtral-8x7b": {**_MIXTRAL, **_sizes(4096, 32, 32, 8, 14336, 32000)},
    "qwen1.5-moe-a2.7b": {**_QWEN2_MOE, **_sizes(2048, 24, 16, 16, 5632, 151936)},
    # to try the programs out on a CPU
    "tiny": {**_LLAMA3, **_sizes(256, 2, 4, 2, 512, 4096), "rope_theta": 10000.0, "eos_token_id": 2, "bos_token_id": 1},
    "tiny-moe": {**_MIXTRAL, **_sizes(256, 2, 4, 2, 512, 4096)},
}


@dataclass(frozen=True)
class Scenario:
    """``count`` requests at once; lengths in tokens, (least, most) where they are drawn."""

    title: str
    count: int
    prompt: int | tuple[int, int]
    output: int | tuple[int, int]

    @property
    def is_prefill(self) -> bool:
        return self.output == 1


SCENARIOS = {
    "S1": Scenario("1 x 128 -> 256", 1, 128, 256),
    "S2": Scenario("32 x 512 -> 256", 32, 512, 256),
    "S3": Scenario("256 x 512 -> 256", 256, 512, 256),
    "S4": Scenario("16 x 4,096 -> 1", 16, 4096, 1),
    "S5": Scenario("512 x (32-1,024) -> (32-512)", 512, (32, 1024), (32, 512)),
    "X1": Scenario("1 x 128 -> 128", 1, 128, 128),
    "X8": Scenario("8 x 128 -> 128", 8, 128, 128),
    "X32": Scenario("32 x 128 -> 128", 32, 128, 128),
    "X256": Scenario("256 x 128 -> 128", 256, 128, 128),
    "T5": Scenario("12 x (4-40) -> (2-12)", 12, (4, 40), (2, 12)),
}

# vLLM 0.26.0, torch 2.11+cu130, bf16, H200: output tokens/s, prompt tokens/s in S4; (model, number of GPUs by tp)
VLLM: dict[tuple[str, int], dict[str, float]] = {
    ("llama3-8b", 1): {"S1": 203.6, "S2": 4445, "S3": 10097, "S4": 41554, "S5": 10022},
    ("qwen2.5-7b", 1): {"S1": 215.1, "S2": 5023, "S3": 12290, "S4": 45106, "S5": 12265},
    ("qwen2.5-0.5b", 1): {"S1": 720, "S2": 17680, "S3": 44081, "S4": 509676, "S5": 50707},
    ("llama3-8b", 2): {"S1": 285, "S2": 6454, "S3": 16286, "S4": 69351, "S5": 16289},
}
# bytes/s that a copy moves, and bf16 FLOP/s, by a part of the card's name
CEILINGS = {"H200": (4.3e12, 790e12), "H100": (3.0e12, 790e12)}


def lengths(scenario: str, seed: int = 0) -> list[tuple[int, int]]:
    """(prompt tokens, output tokens) of each request; the same for every repeat."""
    shape = SCENARIOS[scenario]
    source = random.Random(f"lengths/{scenario}/{seed}")

    def draw(length: int | tuple[int, int]) -> int:
        return length if isinstance(length, int) else source.randint(*length)

    return [(draw(shape.prompt), draw(shape.output)) for _ in range(shape.count)]


def requests(scenario: str, vocab_size: int, repeat: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """(prompt ids, tokens to generate) of each request; every repeat has fresh ids."""
    source = random.Random(f"ids/{scenario}/{vocab_size}/{seed}/{repeat}")
    margin = min(1000, vocab_size // 4)  # stay clear of special ids
    return [
        ([source.randrange(margin, vocab_size - margin) for _ in range(prompt)], output)
        for prompt, output in lengths(scenario, seed)
    ]


# bytes of a linear weight inside the blocks by -q; int4: with a scale and an offset of 16 bits for 128
WEIGHT_BYTES = {None: 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5 + 4 / 128}


@dataclass(frozen=True)
class Parameters:
    """Of a shape, by how often a step needs them. A model without experts has one, which every token chooses."""

    shared: int  # of the layers, for every token
    expert: int  # one expert in all layers
    num_experts: int
    chosen: int  # experts of a token
    head: int
    kv_heads: int  # in all layers, as the next
    attention: int  # heads * head_dim
    head_dim: int

    @property
    def body(self) -> int:
        """What a token is multiplied with before the head."""
        return self.shared + self.chosen * self.expert

    def read(self, num_tokens: int) -> float:
        """Of the body, by a step of so many tokens whose choices of experts are even and independent."""
        return self.shared + self.expert * self.num_experts * (1 - (1 - self.chosen / self.num_experts) ** num_tokens)


def parameters(model: str) -> Parameters:
    config = MODELS[model]
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    kv_heads, head_dim = config["num_key_value_heads"], hidden // heads
    experts = config.get("num_local_experts", config.get("num_experts", 1))
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    bias = (heads + 2 * kv_heads) * head_dim if config["model_type"].startswith("qwen2") else 0
    layer = hidden * (heads + 2 * kv_heads) * head_dim + bias + heads * head_dim * hidden + 2 * hidden
    layer += hidden * experts if experts > 1 else 0  # the router
    layer += 3 * hidden * config.get("shared_expert_intermediate_size", 0)
    return Parameters(
        shared=layers * layer + hidden,
        expert=layers * 3 * hidden * width,
        num_experts=experts,
        chosen=config.get("num_experts_per_tok", 1),
        head=config["vocab_size"] * hidden,
        kv_heads=layers * kv_heads,
        attention=layers * heads * head_dim,
        head_dim=head_dim,
    )


def limit(
    model: str,
    scenario: str,
    bandwidth: float,
    flops: float,
    num_gpus: int = 1,
    *,
    quantization: str | None = None,
    kv_dtype_bytes: int = 2,
) -> float:
    """Tokens/s (prompt tokens/s of a prefill scenario) that no schedule on ``num_gpus`` such cards can beat.

    All prefilled first, all decoded together, each step the larger of its bytes / bandwidth and its FLOPs / rate; the
    better of that and of the sum of all bytes or all FLOPs, whichever is larger, since the two kinds may share a step.
    FLOPs are those of 16 bits, also of quantised weights.
    """
    shape = parameters(model)
    body, head, attention = shape.body, shape.head, shape.attention
    kv_bytes = 2 * shape.kv_heads * shape.head_dim * kv_dtype_bytes
    bandwidth, flops = bandwidth * num_gpus, flops * num_gpus
    sizes = lengths(scenario)

    def weights(num_tokens: int) -> float:
        return WEIGHT_BYTES[quantization] * shape.read(num_tokens) + 2 * head  # the head stays in 16 bits

    prompt_bytes = weights(sum(prompt for prompt, _ in sizes))
    prefill_flops = sum(2 * body * i + 2 * i * i * attention for i, _ in sizes) + 2 * head * len(sizes)
    prefill = max(prefill_flops / flops, prompt_bytes / bandwidth)
    decode, all_bytes, all_flops = 0.0, prompt_bytes, float(prefill_flops)
    for step in range(1, max(output for _, output in sizes)):
        running = [prompt for prompt, output in sizes if output > step]
        context = sum(running) + step * len(running)
        step_bytes = weights(len(running)) + context * kv_bytes
        step_flops = 2 * (body + head) * len(running) + 4 * context * attention
        decode += max(step_bytes / bandwidth, step_flops / flops)
        all_bytes, all_flops = all_bytes + step_bytes, all_flops + step_flops
    if SCENARIOS[scenario].is_prefill:
        return sum(prompt for prompt, _ in sizes) / prefill
    seconds = min(prefill + decode, max(all_flops / flops, all_bytes / bandwidth))
    return sum(output for _, output in sizes) / max(seconds, 1e-9)
