"""Log-probabilities of the prompt tokens that a chunk's rows predict, a slice of rows at a time."""

from __future__ import annotations

from torch import Tensor

from aphro_core.layers.decoder import Decoder
from aphro_core.messages.steps import PromptLogprobs, ScheduledSequence
from aphro_core.worker.logprobs import token_logprobs
from aphro_core.worker.sampler import SamplingRow

PROMPT_ROWS = 256  # whose logits live at once


def prompt_logprobs(
    decoder: Decoder, hidden_states: Tensor, entry: ScheduledSequence, row: SamplingRow
) -> PromptLogprobs | None:
    """Of ``hidden_states``, the rows of ``entry``; None without any, and off tp rank 0. Every tp rank takes part."""
    count = row.sampling.prompt_logprobs
    assert count is not None
    stop = min(entry.start + entry.num_tokens, row.num_prompt_tokens - 1)
    entries = []
    for start in range(entry.start, stop, PROMPT_ROWS):
        end = min(start + PROMPT_ROWS, stop)
        logits = decoder.logits(hidden_states[start - entry.start : end - entry.start])
        if logits is not None:
            targets = row.token_ids[start + 1 : end + 1]
            entries += token_logprobs(logits, targets, [count] * len(targets))
    return PromptLogprobs(entry.seq_id, entries) if entries else None
