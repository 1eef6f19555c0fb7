"""How large a step is unless somebody says: sequences, and tokens with and without rows that decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from aphro_core.models.spec import DecoderSpec
from aphro_core.parallel.memory import kv_block_bytes, weights_bytes
from aphro_core.parallel.shard import ShardingPlan

MAX_NUM_SEQS: Final = {"cpu": 256, "cuda": 512}
CPU_TOKENS: Final = 2048
BLOCK_SIZES: Final = (8, 16, 32)  # tokens of a block of the cache
# At least and at most. Beyond 8,192 linears gain nothing, but a host takes 14 ms and more to launch a step of any size.
GPU_TOKENS: Final = (1024, 16384)
GPU_PREFILL_TOKENS: Final = 8192  # where nothing decodes and there are no stages, at least
# Tokens times parameters that a Hopper GPU computes in 45 to 50 ms. The 8B shape's products fill the multiprocessors
# best in steps of 1,024 and 2,048 tokens: 1,792 take as long as 1,850 would.
_GPU_PARAMETER_TOKENS: Final = 2048 * 8.2e9
_GPU_FLOPS_PER_BYTE: Final = 200  # that a Hopper GPU computes while it reads: 165 (H200) to 235 (H100), as measured
_GPU_FREE_KV_BYTES: Final = 34e9  # of K and V that it reads in the time that is left beside these tokens, 8 to 11 ms
GPU_TOKENS_UNIT: Final = 256  # the largest tile of a product


@dataclass(frozen=True)
class StepSizes:
    max_num_seqs: int
    decode_tokens: int  # of a step in which anything decodes
    prefill_tokens: int  # of any other

    @property
    def most_tokens(self) -> int:
        return max(self.decode_tokens, self.prefill_tokens)


def parameters_on_the_way(spec: DecoderSpec, plan: ShardingPlan) -> int:
    """Parameters that a token meets one after the other: those of a rank of each stage of a pipeline."""
    return sum(weights_bytes(spec, shard, 1) for shard in plan.ranks if not shard.tp_rank)


def default_step_sizes(
    device: str, parameters: int, num_stages: int = 1, decode_tokens: int | None = None
) -> StepSizes:
    """For ``parameters`` that a token meets one after the other, in ``num_stages``, on ``cpu`` or ``cuda``.
    ``decode_tokens``: of a step in which anything decodes, where somebody has asked for so many.

    While anything decodes its streams wait for the whole of a step, its own attention included, and no more than 60 ms:
    so as many tokens as a GPU computes in 50, in inverse proportion to the parameters. Where nothing decodes, nobody
    waits for more than his own prompt. But the last stage of a pipeline waits for the whole of the first step, and the
    first one for the last: with stages no step is larger.
    """
    if device == "cpu":
        return StepSizes(MAX_NUM_SEQS["cpu"], decode_tokens or CPU_TOKENS, decode_tokens or CPU_TOKENS)
    fitting = int(_GPU_PARAMETER_TOKENS / max(parameters, 1)) // GPU_TOKENS_UNIT * GPU_TOKENS_UNIT
    fitting = min(max(fitting, GPU_TOKENS[0]), GPU_TOKENS[1])
    decode_tokens = decode_tokens or fitting
    prefill_tokens = decode_tokens if num_stages > 1 else max(decode_tokens, fitting, GPU_PREFILL_TOKENS)
    return StepSizes(MAX_NUM_SEQS["cuda"], decode_tokens, prefill_tokens)


@dataclass(frozen=True)
class ContextRoom:
    """What rows that decode behind long contexts take from the prompts beside them, in tokens."""

    free_context: int  # that all rows together may read beside a full step
    context_per_token: int  # beyond these, that GPUs read while they compute one token of a prompt


def context_room(spec: DecoderSpec, plan: ShardingPlan, kv_dtype_bytes: int) -> ContextRoom:
    """On GPUs."""
    kv_bytes = sum(kv_block_bytes(spec, shard, 1, kv_dtype_bytes) for shard in plan.ranks if not shard.tp_rank)
    per_token = 2 * parameters_on_the_way(spec, plan) // (max(kv_bytes, 1) * _GPU_FLOPS_PER_BYTE)
    return ContextRoom(int(_GPU_FREE_KV_BYTES) // max(kv_bytes, 1), max(per_token, 1))
