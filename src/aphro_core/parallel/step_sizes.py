"""How large a step is unless somebody says: sequences, and tokens with and without rows that decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_NUM_SEQS: Final = {"cpu": 256, "cuda": 512}
CPU_TOKENS: Final = 2048
# At least and at most. Beyond 8,192 linears gain nothing, but a host takes 14 ms and more to launch a step of any size.
GPU_TOKENS: Final = (1024, 16384)
GPU_PREFILL_TOKENS: Final = 8192  # where nothing decodes, at least
_GPU_PARAMETER_TOKENS: Final = 1792 * 8.2e9  # tokens times parameters that a Hopper GPU computes in 40 to 45 ms
_GPU_FLOPS_PER_BYTE: Final = 200  # that a Hopper GPU computes while it reads: 165 (H200) to 235 (H100), as measured
_GPU_TOKENS_UNIT: Final = 256  # the largest tile of a product


@dataclass(frozen=True)
class StepSizes:
    max_num_seqs: int
    decode_tokens: int  # of a step in which anything decodes
    prefill_tokens: int  # of any other

    @property
    def most_tokens(self) -> int:
        return max(self.decode_tokens, self.prefill_tokens)


def default_step_sizes(device: str, rank_parameters: int) -> StepSizes:
    """For ``rank_parameters`` parameters on the rank that has most, on ``cpu`` or ``cuda``.

    While anything decodes its streams wait for the whole of a step, its own attention included: about 50 ms, so as
    many tokens as a GPU reads in 45, in inverse proportion to the parameters. Where nothing decodes, large steps are
    multiplied faster.
    """
    if device == "cpu":
        return StepSizes(MAX_NUM_SEQS["cpu"], CPU_TOKENS, CPU_TOKENS)
    fitting = int(_GPU_PARAMETER_TOKENS / max(rank_parameters, 1)) // _GPU_TOKENS_UNIT * _GPU_TOKENS_UNIT
    decode_tokens = min(max(fitting, GPU_TOKENS[0]), GPU_TOKENS[1])
    return StepSizes(MAX_NUM_SEQS["cuda"], decode_tokens, max(decode_tokens, GPU_PREFILL_TOKENS))


def context_per_token(rank_parameters: int, kv_bytes_per_token: int) -> int:
    """Tokens of context that a GPU reads while it computes one of a prompt; ``kv_bytes_per_token`` on the same rank."""
    return max(2 * rank_parameters // (max(kv_bytes_per_token, 1) * _GPU_FLOPS_PER_BYTE), 1)
