"""One step of one rank on a GPU: send the plan's few numbers, launch, and hand out a promise of the tokens.

Whatever a step reads of the one before stays on the device, and the host never waits: it may be steps ahead. Only rows
that the device sampler does not draw (penalties, biases, log-probabilities ...) make it wait for their logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from aphro_kernels import hopper_attention
from aphro_kernels.decode_work import build_decode_work
from torch import Tensor
from torch.nn import functional

from aphro_core.distributed import Links
from aphro_core.layers.decoder import Decoder
from aphro_core.messages.steps import PromptLogprobs, ScheduledSequence, StepPlan
from aphro_core.models.spec import DecoderSpec
from aphro_core.parallel.shard import RankShard
from aphro_core.worker.cuda_graphs import CudaGraphs
from aphro_core.worker.device_sampler import DeviceSampler
from aphro_core.worker.dues import Dues, pay, prompt_gathers
from aphro_core.worker.paged_inputs import PagedInputs, PagedStep
from aphro_core.worker.prompt_logprobs import asking_entries, next_logprobs, prompt_logprobs
from aphro_core.worker.returning_tokens import ReturningTokens
from aphro_core.worker.sampler import Sampler, SamplingRow, sampled_result
from aphro_core.worker.sequences import SequenceState, apply_plan
from aphro_core.worker.step import FinishedStep, LaunchedStep, RunningStep, SamplingError, empty_result
from aphro_core.worker.step_failure import failed_step
from aphro_core.worker.step_shapes import StepShape, StepShapes


class DeviceRunner:
    def __init__(
        self,
        spec: DecoderSpec,
        shard: RankShard,
        decoder: Decoder,
        caches: Sequence[Tensor],
        links: Links,
        *,
        block_size: int,
        max_rows: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        graph_tokens: int = 0,
    ) -> None:
        """``graph_tokens``: up to so many tokens steps with chunks have shapes that a graph can be captured of."""
        self._shard, self._decoder, self._caches, self._links = shard, decoder, caches, links
        self._dtype, self._device = dtype, device
        self._sequences: dict[int, SequenceState] = {}
        self._applied: StepPlan | None = None  # the last one
        build_work = partial(
            build_decode_work,
            max_rows,
            num_heads=len(shard.heads),
            num_kv_heads=len(shard.kv_heads),
            head_dim=spec.head_dim,
            dtype=dtype,
            cache_dtype=caches[0].dtype if caches else dtype,
            device=device,
        )
        windows = {spec.window_of(layer) for layer in shard.layers} if device.type == "cuda" else set()
        # long chunks have a kernel of their own, if there are enough of them. Ranks with more heads than others have no
        # shapes of their own: each graph sums over all ranks
        has_long = partial(hopper_attention.has_rows, num_heads=-(-spec.num_heads // shard.tp_size))
        self._shapes = StepShapes(max_rows, graph_tokens, hopper_attention.FEWEST_QUERIES, has_long)
        self._inputs = PagedInputs(
            max_rows=max_rows,
            max_model_len=max_model_len,
            block_size=block_size,
            shapes=self._shapes,
            device=device,
            num_kv_heads=len(shard.kv_heads),
            keeps_tokens=shard.pp_size == 1,
            works={window: build_work(window=window) for window in windows},
        )
        # a padded step's way in and out of the layers, in fixed memory
        self._hidden = torch.zeros(self._shapes.max_tokens, spec.hidden_size, dtype=dtype, device=device)
        # the last layer goes on with the rows that are drawn from; not where other ranks' sums have as many rows
        self._keeps_draws = shard.has_head and links.tensor.size == 1
        self._samples = shard.has_head and shard.tp_rank == 0
        # whatever is done to logits is done in float32, else they stay as the product gives them
        is_plain = spec.logits_scale == 1.0 and spec.logits_softcap is None
        logits_dtype = dtype if is_plain else torch.float32
        self._logits = torch.zeros(max_rows * self._samples, spec.vocab_size, dtype=logits_dtype, device=device)
        self._sampler = Sampler(spec.vocab_size, device)
        self._device_sampler = DeviceSampler(spec.vocab_size, max_rows, device)
        self._draws: list[int] = []  # of the last step, and what follows from them:
        self._drawing: list[SamplingRow] = []
        self._needs_host = False
        self._run_padded: Callable[[StepShape], None] = self._run_layers
        self._returning: ReturningTokens | None = None
        if links.tokens is not None and shard.has_embedding:
            self._returning = ReturningTokens(links.tokens, self._inputs.last_token_ids)

    @torch.inference_mode()
    def run_every_kind(self) -> None:
        """Padded steps, enough of them to launch every kernel that others do."""
        self._inputs.clear()
        for shape in self._shapes.kinds:
            self._run_layers(shape)

    @torch.inference_mode()
    def capture_graphs(self, on_progress: Callable[[int, int], None]) -> None:
        """From here on padded steps are replayed graphs."""
        self._inputs.clear()
        self._run_padded = CudaGraphs(self._run_layers, self._shapes.padded, self._device, on_progress)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep | None:
        """A step only on tp rank 0 of the last stage."""
        self._apply(plan)
        step = self._inputs.stage(plan, self._sequences)
        if self._returning is not None:
            self._returning.take_for(plan, self._sequences)
        if not plan.num_rows:
            return empty_result(plan.step_id) if self._samples else None
        self._find_rows(step.draws, is_again=plan.again is not None)
        has_part = step.chunks or step.wanted is not None
        asking = asking_entries(plan, self._sequences) if has_part else []
        logits, found = self._run_mixed(step, asking) if step.chunks else self._run_rows(step, asking)
        if self._returning is not None:
            self._returning.expect(step)
        if not self._shard.has_head:
            return None
        return self._draw(plan, step, logits, found)

    def _find_rows(self, draws: list[int], *, is_again: bool) -> None:
        if draws is not self._draws:
            self._draws, self._drawing = draws, [self._sequences[seq_id].row for seq_id in draws]
            self._needs_host = any(row.needs_host for row in self._drawing)
        if is_again and self._needs_host:  # others do not ask where they are
            for row in self._drawing:
                row.position += 1

    def _apply(self, plan: StepPlan) -> None:
        self._applied = plan
        apply_plan(plan, self._sequences)
        if plan.forgets_all and self._returning is not None:
            self._returning.forget_all()

    def settle(self, plan: StepPlan) -> None:
        """``launch`` raised, or was not tried at all: let the peers end the step."""
        if self._applied is not plan:
            self._apply(plan)
        if not plan.num_rows:
            return
        num_chunks = sum(entry.num_tokens > 1 for entry in plan.scheduled)
        has_chunks = num_chunks > 0
        draws = sum(entry.samples for entry in plan.scheduled) if has_chunks else plan.num_rows
        shape = self._shapes.of_rows(draws)
        if has_chunks:
            shape = self._shapes.with_chunks(plan.num_tokens, plan.num_rows - num_chunks, num_chunks)
        gathers = prompt_gathers(plan, self._sequences) if has_chunks else []
        if draws:
            gathers.append(self._padded(draws, shape.num_tokens))
        dues = Dues(shape.num_tokens, gathers, num_handed_out=draws)
        pay(dues, self._links, self._shard, self._hidden.shape[1], self._dtype, self._device)
        if self._returning is not None:
            self._returning.expect_void(draws)

    def _run_rows(self, step: PagedStep, asking: list[ScheduledSequence]) -> tuple[Tensor, list[PromptLogprobs]]:
        size = step.shape.num_tokens
        if not self._shard.has_embedding:
            self._hidden[:size] = self._receive(size)
        self._run_padded(step.shape)
        self._links.tensor.num_sums = self._links.tensor.num_gathers = 2**31  # in a graph: all of the step's
        if not self._shard.has_head:
            self._links.stage.send(self._hidden[:size].clone())
        logits = self._logits[: step.num_rows]
        return logits, self._found_of_rows(step, logits, asking) if self._samples and asking else []

    def _found_of_rows(self, step: PagedStep, logits: Tensor, asking: list[ScheduledSequence]) -> list[PromptLogprobs]:
        """A prompt may have been cut so that one of its tokens stands alone: the step has its row's logits already."""
        rows = {seq_id: row for row, seq_id in enumerate(step.draws)}
        found = []
        for entry in asking:
            at = rows[entry.seq_id]
            of_row = next_logprobs(logits[at : at + 1].float(), entry.start, self._sequences[entry.seq_id].row)
            found.append(PromptLogprobs(entry.seq_id, of_row))
        return found

    def _run_layers(self, shape: StepShape) -> None:
        """From what was sent of the rows to ``_logits``, or ``_hidden`` where not all have any: fit for a graph."""
        hidden = self._hidden[: shape.num_tokens]
        batch = self._inputs.padded_batch(shape)
        kept = batch.sampled_rows if shape.num_seqs and self._keeps_draws else None
        x = self._decoder(batch, None if self._shard.has_embedding else hidden, self._caches, kept)
        if self._shard.has_head and not shape.num_seqs:
            self._decoder.logits(x, out=self._logits[: shape.num_tokens])
        else:
            hidden[: len(x)].copy_(x)

    def _run_mixed(self, step: PagedStep, asking: list[ScheduledSequence]) -> tuple[Tensor, list[PromptLogprobs]]:
        keeps_draws = self._keeps_draws and not asking
        hidden = self._mixed_states(step, keeps_draws=keeps_draws)
        logits = self._logits[: len(step.draws)]
        if not self._shard.has_head:
            self._links.stage.send(hidden.clone())
            return logits, []
        found = self._prompt_logprobs(step, hidden, asking)
        if step.draws and keeps_draws:
            drawn = hidden[: self._shapes.of_rows(len(step.draws)).num_rows]
            self._decoder.logits(drawn, out=self._logits[: len(drawn)])
        elif step.draws:
            assert step.draw_rows is not None
            rows = self._pad(step.draw_rows, len(hidden))
            self._decoder.logits(hidden.index_select(0, rows), out=self._logits[: len(rows)])
        return logits, found

    def _mixed_states(self, step: PagedStep, *, keeps_draws: bool) -> Tensor:
        """Behind the layers, until the next step: of all rows, or of those that are drawn from."""
        received = None if self._shard.has_embedding else self._receive(step.shape.num_tokens)
        if not self._shapes.has(step.shape) or keeps_draws != self._keeps_draws:
            batch = self._inputs.mixed_batch(step)
            kept = self._pad(batch.sampled_rows, batch.num_tokens) if keeps_draws else None
            return self._decoder(batch, received, self._caches, kept)
        hidden = self._hidden[: step.shape.num_tokens]
        if received is not None:
            hidden.copy_(received)
        self._run_padded(step.shape)
        self._links.tensor.num_sums = 2**31  # in a graph: all of the step's
        return hidden

    def _pad(self, rows: Tensor, most: int) -> Tensor:
        """By row 0, to :meth:`_padded` of them."""
        return functional.pad(rows, (0, self._padded(len(rows), most) - len(rows)))

    def _padded(self, num_draws: int, most: int) -> int:
        """As many rows as a decode step has, ``most`` at most: of a size that is new to it a library may choose a
        kernel that is not loaded yet, and loading waits for the steps in flight."""
        return min(self._shapes.of_rows(num_draws).num_rows, most)

    def _receive(self, num_tokens: int) -> Tensor:
        return self._links.stage.receive((num_tokens, self._hidden.shape[1]), self._dtype, self._device)

    def _prompt_logprobs(
        self, step: PagedStep, hidden: Tensor, asking: list[ScheduledSequence]
    ) -> list[PromptLogprobs]:
        found = [
            prompt_logprobs(self._decoder, hidden[step.first_rows[e.seq_id] :], e, self._sequences[e.seq_id].row)
            for e in asking
        ]
        return [one for one in found if one is not None]

    def _draw(
        self, plan: StepPlan, step: PagedStep, logits: Tensor, found: list[PromptLogprobs]
    ) -> LaunchedStep | None:
        rows = self._drawing
        result: LaunchedStep | None = None
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        if self._samples and not self._needs_host:
            if rows:
                tokens = self._device_sampler.draw(logits, step.draw_positions, rows)
            result = RunningStep(plan.step_id, step.draws, tokens, found, step.wanted)
        elif self._samples:
            result = self._draw_with_host(plan, step, logits, tokens, found)
        if rows:
            tokens = self._links.tensor.broadcast_(tokens)
            self._inputs.last_token_ids.index_copy_(0, step.draw_slots, tokens)
            if self._links.tokens is not None:
                self._links.tokens.send(tokens)
        return result

    def _draw_with_host(
        self, plan: StepPlan, step: PagedStep, logits: Tensor, tokens: Tensor, found: list[PromptLogprobs]
    ) -> FinishedStep:
        """Rows of every kind, into ``tokens`` too; it waits. The other ranks wait for tokens even if there are none."""
        tokens.zero_()
        kept = list(range(len(step.draws))) if step.wanted is None else step.wanted
        rows = [self._drawing[i] for i in kept]
        wanted = logits if len(kept) == len(step.draws) else logits[kept]
        try:
            sampled = self._sampler.sample(wanted.float(), rows)
        except SamplingError as error:
            return FinishedStep(failed_step(plan.step_id, error, error.seq_ids))
        tokens[kept] = torch.tensor([one.token_id for one in sampled], dtype=torch.int64, device=self._device)
        return FinishedStep(sampled_result(plan.step_id, sampled, found))
