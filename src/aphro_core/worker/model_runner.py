"""One step of one rank: plan to batch, batch through the decoder, hand on or draw tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aphro_core.distributed import Links
from aphro_core.layers.batch import Batch
from aphro_core.layers.decoder import Decoder
from aphro_core.messages.steps import PromptLogprobs, ScheduledSequence, StepPlan, StepResult
from aphro_core.models.spec import DecoderSpec
from aphro_core.parallel.shard import RankShard
from aphro_core.worker.batch import BatchBuilder, SequenceState
from aphro_core.worker.logprobs import token_logprobs
from aphro_core.worker.sampler import Sampler, SamplingRow

PROMPT_ROWS = 256  # whose logits live at once while prompt log-probabilities are taken


class ModelRunner:
    def __init__(
        self,
        spec: DecoderSpec,
        shard: RankShard,
        decoder: Decoder,
        caches: Sequence[Tensor],
        links: Links,
        *,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._hidden_size = spec.hidden_size
        self._shard = shard
        self._decoder = decoder
        self._caches = caches
        self._links = links
        self._dtype = dtype
        self._device = device
        self._sequences: dict[int, SequenceState] = {}
        self._batches = BatchBuilder(spec, shard, block_size, dtype, device)
        self._sampler = Sampler(spec.vocab_size, device) if shard.has_head and shard.tp_rank == 0 else None

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult | None:
        """A result only from tp rank 0 of the last stage."""
        self._apply(plan)
        if not plan.scheduled:
            return StepResult(step_id=plan.step_id, sampled=[]) if self._sampler is not None else None
        batch = self._batches.build(plan, self._sequences)
        hidden_states = None
        if not self._shard.has_embedding:
            shape = (batch.num_tokens, self._hidden_size)
            hidden_states = self._links.stage.receive(shape, self._dtype, self._device)
        hidden_states = self._decoder(batch, hidden_states, self._caches)
        if not self._shard.has_head:
            self._links.stage.send(hidden_states)
            return None
        return self._draw(plan, batch, hidden_states)

    def _apply(self, plan: StepPlan) -> None:
        for seq_id in plan.released:
            self._sequences.pop(seq_id, None)
        for new in plan.new:
            row = SamplingRow(
                seq_id=new.seq_id,
                sampling=new.sampling,
                seed=new.seed,
                position=len(new.token_ids),
                token_ids=list(new.token_ids),
                num_prompt_tokens=new.num_prompt_tokens,
                stop_token_ids=new.stop_token_ids,
            )
            self._sequences[new.seq_id] = SequenceState(row)
        for entry in plan.scheduled:
            state = self._sequences[entry.seq_id]
            state.row.token_ids += entry.token_ids
            state.row.position = len(state.row.token_ids)
            state.block_table.extend(entry.new_block_ids)

    def _draw(self, plan: StepPlan, batch: Batch, hidden_states: Tensor) -> StepResult | None:
        prompt_logprobs = [
            self._prompt_logprobs(entry, batch, hidden_states)
            for entry in plan.scheduled
            if self._sequences[entry.seq_id].row.sampling.prompt_logprobs is not None
        ]
        sampling = [entry for entry in plan.scheduled if entry.samples]
        sampled = []
        if sampling:
            logits = self._decoder.logits(hidden_states.index_select(0, batch.sampled_rows))
            if self._sampler is not None:
                assert logits is not None
                sampled = self._sampler.sample(logits, [self._sequences[entry.seq_id].row for entry in sampling])
        if self._sampler is None:
            return None
        entries = [found for found in prompt_logprobs if found is not None and found.entries]
        return StepResult(step_id=plan.step_id, sampled=sampled, prompt_logprobs=entries)

    def _prompt_logprobs(self, entry: ScheduledSequence, batch: Batch, hidden_states: Tensor) -> PromptLogprobs | None:
        """Of the prompt tokens that this chunk's rows predict, in slices; every tp rank takes part."""
        row = self._sequences[entry.seq_id].row
        count = row.sampling.prompt_logprobs
        assert count is not None
        first = batch.first_rows[entry.seq_id]
        stop = min(entry.start + entry.num_tokens, row.num_prompt_tokens - 1)
        entries = []
        for start in range(entry.start, stop, PROMPT_ROWS):
            end = min(start + PROMPT_ROWS, stop)
            logits = self._decoder.logits(hidden_states[first + start - entry.start : first + end - entry.start])
            if logits is not None:
                targets = row.token_ids[start + 1 : end + 1]
                entries += token_logprobs(logits, targets, [count] * len(targets))
        return PromptLogprobs(entry.seq_id, entries)
