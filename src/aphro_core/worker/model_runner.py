"""One step of one rank on a CPU: plan to batch, batch through the decoder, hand on or draw tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aphro_core.distributed.links import Links
from aphro_core.layers.batch import Batch
from aphro_core.layers.decoder import Decoder
from aphro_core.messages.steps import ScheduledSequence, StepPlan, StepResult
from aphro_core.models.spec import DecoderSpec
from aphro_core.parallel.shard import RankShard
from aphro_core.worker.batch import BatchBuilder
from aphro_core.worker.dues import Dues, pay, prompt_gathers
from aphro_core.worker.prompt_logprobs import asking_entries, prompt_logprobs
from aphro_core.worker.replayed_steps import ReplayedSteps
from aphro_core.worker.sampler import SampledToken, Sampler, sampled_result
from aphro_core.worker.sequences import SequenceState, apply_plan
from aphro_core.worker.step import FinishedStep


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
        is_deterministic: bool = False,
    ) -> None:
        self._hidden_size = spec.hidden_size
        self._shard = shard
        self._decoder = decoder
        self._caches = caches
        self.steps = ReplayedSteps(decoder, caches, can_replay=links.tensor.size == 1)
        self._links = links
        self._dtype = dtype
        self._device = device
        self._sequences: dict[int, SequenceState] = {}
        self._applied: StepPlan | None = None  # the last one
        self._batches = BatchBuilder(spec, shard, block_size, dtype, is_deterministic=is_deterministic)
        self._sampler = Sampler(spec.vocab_size, device) if shard.has_head and shard.tp_rank == 0 else None

    def launch(self, plan: StepPlan) -> FinishedStep | None:
        """The whole step: a CPU computes while it is asked."""
        result = self.execute(plan)
        return None if result is None else FinishedStep(result)

    def settle(self, plan: StepPlan) -> None:
        """``launch`` raised, or was not tried at all: let the peers end the step."""
        if self._applied is not plan:
            self._apply(plan)
        sampled = sum(entry.samples for entry in plan.scheduled)
        gathers = [*prompt_gathers(plan, self._sequences), *([sampled] if sampled else [])]
        if plan.scheduled:
            dues = Dues(plan.num_tokens, gathers)
            pay(dues, self._links, self._shard, self._hidden_size, self._dtype, self._device)

    def _apply(self, plan: StepPlan) -> None:
        self._applied = plan
        apply_plan(plan, self._sequences)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult | None:
        """A result only from tp rank 0 of the last stage."""
        assert plan.again is None, "tokens that are drawn here are told, not kept"
        self._apply(plan)
        if not plan.scheduled:
            return StepResult(plan.step_id, []) if self._sampler is not None else None
        batch = self._batches.build(plan, self._sequences)
        hidden_states = None
        if not self._shard.has_embedding:
            shape = (batch.num_tokens, self._hidden_size)
            hidden_states = self._links.stage.receive(shape, self._dtype, self._device)
        asking = asking_entries(plan, self._sequences)
        kept = None if asking else self._kept_rows(batch)
        hidden_states = self.steps(batch, hidden_states, kept)
        if not self._shard.has_head:
            self._links.stage.send(hidden_states)
            return None
        drawn = batch.sampled_rows if kept is None else None
        return self._draw(plan, batch, hidden_states, asking, drawn)

    def _kept_rows(self, batch: Batch) -> Tensor | None:
        """What the last layer goes on with: the rows that are drawn from, or one if none is; None: all of them, in a
        step that has no others, and where other ranks' sums have as many rows."""
        if not self._shard.has_head or self._links.tensor.size > 1 or len(batch.sampled_rows) == batch.num_tokens:
            return None
        return batch.sampled_rows if len(batch.sampled_rows) else batch.sampled_rows.new_zeros(1)

    def _draw(
        self,
        plan: StepPlan,
        batch: Batch,
        hidden_states: Tensor,
        asking: list[ScheduledSequence],
        drawn: Tensor | None,
    ) -> StepResult | None:
        """``drawn``: rows of ``hidden_states`` that are drawn from, None: all, if any is."""
        found = []
        for entry in asking:
            hidden = hidden_states[batch.first_rows[entry.seq_id] :]
            found.append(prompt_logprobs(self._decoder, hidden, entry, self._sequences[entry.seq_id].row))
        sampling = [entry for entry in plan.scheduled if entry.samples]
        sampled: list[SampledToken] = []
        if sampling:
            logits = self._decoder.logits(hidden_states if drawn is None else hidden_states.index_select(0, drawn))
            if self._sampler is not None:
                assert logits is not None
                sampled = self._sampler.sample(logits, [self._sequences[entry.seq_id].row for entry in sampling])
        if self._sampler is None:
            return None
        entries = [entry for entry in found if entry is not None]
        return sampled_result(plan.step_id, sampled, entries)
