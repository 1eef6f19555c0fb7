"""How large a step is unless somebody says: sequences, and tokens with and without rows that decode."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

MAX_NUM_SEQS: Final = {"cpu": 256, "cuda": 512}
CPU_TOKENS: Final = 2048
GPU_TOKENS: Final = (1024, 8192)  # with decoding rows at least and at most; beyond, the linears of an H200 gain nothing
_GPU_PARAMETER_TOKENS: Final = 2048 * 8.5e9  # tokens times parameters that an H200 computes in about 50 ms


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

    While anything decodes its streams wait for the whole of a step, about 50 ms: as many tokens as a GPU reads in that
    time, in inverse proportion to the parameters. Where nothing decodes, large steps are multiplied faster.
    """
    if device == "cpu":
        return StepSizes(MAX_NUM_SEQS["cpu"], CPU_TOKENS, CPU_TOKENS)
    fitting = 2 ** int(math.log2(max(_GPU_PARAMETER_TOKENS / max(rank_parameters, 1), 1.0)))
    return StepSizes(MAX_NUM_SEQS["cuda"], min(max(fitting, GPU_TOKENS[0]), GPU_TOKENS[1]), GPU_TOKENS[1])
