"""Log-probabilities of the prompt tokens that a step's rows predict, a slice of rows at a time."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from aphro_core.layers.decoder import Decoder
from aphro_core.messages.steps import PromptLogprobs, ScheduledSequence, StepPlan, TokenLogprobs
from aphro_core.worker.logprobs import token_logprobs
from aphro_core.worker.sampler import SamplingRow
from aphro_core.worker.sequences import SequenceState

PROMPT_ROWS = 256  # whose logits live at once


def asking_entries(plan: StepPlan, sequences: Mapping[int, SequenceState]) -> list[ScheduledSequence]:
    """Those with a row that predicts a prompt token whose log-probability is wanted."""
    entries = (entry for entry in plan.scheduled if entry.num_tokens > 1 or not entry.samples)  # others see the end
    return [entry for entry in entries if _asks(entry, sequences[entry.seq_id].row)]


def _asks(entry: ScheduledSequence, row: SamplingRow) -> bool:
    return row.sampling.prompt_logprobs is not None and entry.start + 1 < row.num_prompt_tokens


def prompt_logprobs(
    decoder: Decoder, hidden_states: Tensor, entry: ScheduledSequence, row: SamplingRow
) -> PromptLogprobs | None:
    """Of ``hidden_states``, the rows of ``entry``; None off tp rank 0. Every tp rank takes part."""
    stop = min(entry.start + entry.num_tokens, row.num_prompt_tokens - 1)
    entries = []
    for start in range(entry.start, stop, PROMPT_ROWS):
        end = min(start + PROMPT_ROWS, stop)
        logits = decoder.logits(hidden_states[start - entry.start : end - entry.start])
        if logits is not None:
            entries += next_logprobs(logits, start, row)
    return PromptLogprobs(entry.seq_id, entries) if entries else None


def next_logprobs(logits: Tensor, start: int, row: SamplingRow) -> list[TokenLogprobs]:
    """Of the prompt tokens behind positions ``start ...``, whose ``logits`` are [positions, vocab] float32."""
    count = row.sampling.prompt_logprobs
    assert count is not None
    targets = row.token_ids[start + 1 : start + 1 + len(logits)]
    return token_logprobs(logits, targets, [count] * len(targets))
