"""One step of one rank on a GPU: send what is new of it, launch, and hand out a promise of the tokens.

Whatever a step reads of the one before stays on the device, and the host never waits: it may be steps ahead. Only rows
that the device sampler does not draw (penalties, biases, log-probabilities ...) make it wait for their logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from aphro_kernels import hopper_attention
from aphro_kernels.decode_work import DecodeWork, build_decode_work
from aphro_kernels.step_rows import end_rows_
from torch import Tensor

from aphro_core.distributed.links import Links
from aphro_core.layers.decoder import Decoder
from aphro_core.messages.steps import PromptLogprobs, ScheduledSequence, StepPlan
from aphro_core.models.spec import DecoderSpec
from aphro_core.parallel.shard import RankShard
from aphro_core.worker.answers import Answer, Answers
from aphro_core.worker.dues import Dues, pay, prompt_gathers
from aphro_core.worker.mixed_steps import MixedSteps
from aphro_core.worker.padded_steps import PaddedSteps
from aphro_core.worker.paged_inputs import PagedInputs
from aphro_core.worker.prompt_logprobs import asking_entries, next_logprobs
from aphro_core.worker.returning_tokens import ReturningTokens
from aphro_core.worker.sampler import Sampler, SamplingRow, sampled_result
from aphro_core.worker.sequences import SequenceState, apply_plan
from aphro_core.worker.shared_head import HeadHelper, HeadOwner, SharedHead
from aphro_core.worker.step import FinishedStep, LaunchedStep, RunningStep, SamplingError, empty_result
from aphro_core.worker.step_failure import failed_step
from aphro_core.worker.step_memory import PagedStep, StepMemory
from aphro_core.worker.step_shapes import StepShapes


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
        head: SharedHead | None = None,
    ) -> None:
        """``graph_tokens``: up to so many tokens steps with chunks have shapes that a graph can be captured of.
        ``head``: of a first or last stage that makes decode steps' product with the head with the other."""
        self._shard, self._links = shard, links
        self._dtype, self._device = dtype, device
        self._sequences: dict[int, SequenceState] = {}
        self._applied: StepPlan | None = None  # the last one
        self._answers = Answers(max_rows, device)
        self._shapes = build_shapes(spec, shard, max_rows, graph_tokens)
        self._memory = StepMemory(
            max_rows=max_rows,
            max_model_len=max_model_len,
            block_size=block_size,
            shapes=self._shapes,
            device=device,
            num_kv_heads=len(shard.kv_heads),
            works=build_works(spec, shard, caches, max_rows, dtype, device) if device.type == "cuda" else {},
            row_start=decoder.row_start,
            answers=self._answers.memory,
        )
        self._inputs = PagedInputs(self._memory, self._shapes, keeps_tokens=shard.pp_size == 1)
        parts = (spec, shard, decoder, caches, self._memory, self._shapes)
        place = links.tensor.logits if shard.has_head else None
        self._head = head
        self._padded = PaddedSteps(*parts, dtype=dtype, device=device, place=place, head=head)
        self._mixed = MixedSteps(self._padded, decoder, caches, links)
        self._hidden, self._logits = self._padded.hidden, self._padded.logits
        self._samples = self._padded.samples
        # draws, or writes logits to where another draws
        self._is_told_rows = self._samples or place is not None or head is not None
        self._sampler = Sampler(spec.vocab_size, device)
        self._draws: list[int] = []  # of the last step, and what follows from them:
        self._drawing: list[SamplingRow] = []
        self._needs_host = False
        self._returning: ReturningTokens | None = None
        if links.tokens is not None and shard.has_embedding:
            self._returning = ReturningTokens(links.tokens, self._memory.last_token_ids, shard.pp_size)

    @property
    def graph_tokens(self) -> int:
        """Steps with chunks have shapes of their own up to so many tokens."""
        return self._shapes.graph_tokens

    def meet(self) -> None:
        """Wait for the other ranks, who may compile for minutes longer."""
        self._links.meet(self._device)

    def rehearsing(self) -> AbstractContextManager[None]:
        """Inside the block steps launch every kernel that they would, over few of the layers, and give no answers."""
        return self._padded.rehearsing()

    @torch.inference_mode()
    def run_every_kind(self) -> None:
        """Padded steps, enough of them to launch every kernel that others do."""
        self._padded.launch_every_kind()

    @torch.inference_mode()
    def compile_head(self) -> None:
        """Launch what a shared head does not launch in any other step, where nothing is launched."""
        if self._head is not None:
            self._head.compile()

    @torch.inference_mode()
    def open_head(self) -> None:
        """From here on the first and the last stage share the head. All ranks call it together."""
        if self._head is not None:
            self._head.open()
            torch.cuda.synchronize(self._device)

    @torch.inference_mode()
    def capture_graphs(self, on_progress: Callable[[int, int], None]) -> None:
        """From here on padded steps are replayed graphs."""
        self._padded.capture(on_progress)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep | None:
        """A step only on tp rank 0 of the last stage."""
        self._apply(plan)
        answer = self._answers.take() if plan.num_rows else None
        step = self._inputs.stage(plan, self._sequences, 0 if answer is None else answer.place)
        if self._returning is not None:
            self._returning.take_for(plan, self._sequences)
        if answer is None:
            return empty_result(plan.step_id) if self._samples else None
        has_part = step.chunks or step.wanted is not None
        asking = asking_entries(plan, self._sequences) if has_part else []
        self._find_rows(step.draws, is_again=plan.again is not None, is_asked=bool(asking))
        found = self._run_chunks(step, asking) if step.chunks else self._run_rows(step, asking)
        if self._returning is not None:
            self._returning.expect(step.draws, self._memory.draw_slots(step))
        if not self._shard.has_head:
            return None
        return self._end(plan, step, answer, found)

    def _find_rows(self, draws: list[int], *, is_again: bool, is_asked: bool) -> None:
        if draws is not self._draws:
            self._draws, self._drawing = draws, [self._sequences[seq_id].row for seq_id in draws]
            self._needs_host = any(row.needs_host for row in self._drawing)
        if self._is_told_rows:
            rows = [] if self._needs_host else self._drawing
            # a helper's in the order of the steps that it helps in
            stream = torch.cuda.stream(self._head.stream) if isinstance(self._head, HeadHelper) else nullcontext()
            with stream:
                self._padded.sampler.prepare(rows, needs_logits=self._needs_host or is_asked)
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
            gathers.append(self._mixed.padded(draws, shape.num_tokens))
        keeps_all = not has_chunks or bool(asking_entries(plan, self._sequences))
        num_kept = None if keeps_all else self._mixed.num_kept(shape, draws)
        dues = Dues(shape.num_tokens, gathers, num_handed_out=draws, num_kept=num_kept)
        pay(dues, self._links, self._shard, self._hidden.shape[1], self._dtype, self._device)
        if self._head is not None and not has_chunks:
            self._head.settle(shape.num_tokens)
        if self._returning is not None:
            self._returning.expect_void(draws)

    def _run_chunks(self, step: PagedStep, asking: list[ScheduledSequence]) -> list[PromptLogprobs]:
        found = self._mixed.run(step, [(entry, self._sequences[entry.seq_id].row) for entry in asking])
        if step.draws and self._samples and not self._needs_host:
            self._mixed.draw(step)
        return found

    def _run_rows(self, step: PagedStep, asking: list[ScheduledSequence]) -> list[PromptLogprobs]:
        size = step.shape.num_tokens
        if not self._shard.has_embedding:
            self._links.stage.receive_(self._hidden[:size])
        self._padded.run(step.shape)
        self._links.tensor.num_sums = self._links.tensor.num_gathers = 2**31  # in a graph: all of the step's
        if isinstance(self._head, HeadOwner):  # in a graph, too
            self._head.has_met = True
        if not self._shard.has_head:
            self._links.stage.send(self._hidden[:size])
        if isinstance(self._head, HeadHelper) and self._head.is_open:
            self._head.help(size)
        return self._found_of_rows(step, asking) if self._samples and asking else []

    def _found_of_rows(self, step: PagedStep, asking: list[ScheduledSequence]) -> list[PromptLogprobs]:
        """A prompt may have been cut so that one of its tokens stands alone: the step has its row's logits already."""
        rows = {seq_id: row for row, seq_id in enumerate(step.draws)}
        found = []
        for entry in asking:
            at = rows[entry.seq_id]
            of_row = next_logprobs(self._logits[at : at + 1].float(), entry.start, self._sequences[entry.seq_id].row)
            found.append(PromptLogprobs(entry.seq_id, of_row))
        return found

    def _end(self, plan: StepPlan, step: PagedStep, answer: Answer, found: list[PromptLogprobs]) -> LaunchedStep | None:
        """Tokens to whom they are not told yet: what draws them tells them where no other rank has to know."""
        result: LaunchedStep | None = None
        is_alone = self._links.tensor.size == 1
        tokens = self._padded.sampler.tokens[: len(step.draws)]
        if self._needs_host and self._samples:
            result = self._draw_with_host(plan, step, tokens, found)
        if step.draws and not is_alone:
            end_rows_(self._memory.draws(step), self._links.tensor.broadcast_(tokens))
        elif step.draws and self._needs_host:  # rows of a decode step have moved on
            self._memory.last_token_ids.index_copy_(0, self._memory.draw_slots(step), tokens)
        if step.draws and self._links.tokens is not None:
            self._links.tokens.send(tokens)
        answer.expect(len(step.draws))
        if result is not None or not self._samples:
            return result
        return RunningStep(plan.step_id, step.draws, answer, found, step.wanted)

    def _draw_with_host(
        self, plan: StepPlan, step: PagedStep, tokens: Tensor, found: list[PromptLogprobs]
    ) -> FinishedStep:
        """Rows of every kind, into ``tokens`` too; it waits. The other ranks wait for tokens even if there are none."""
        tokens.zero_()
        kept = list(range(len(step.draws))) if step.wanted is None else step.wanted
        rows = [self._drawing[i] for i in kept]
        logits = self._logits[: len(step.draws)]
        wanted = logits if len(kept) == len(step.draws) else logits[kept]
        try:
            sampled = self._sampler.sample(wanted.float(), rows)
        except SamplingError as error:
            return FinishedStep(failed_step(plan.step_id, error, error.seq_ids))
        tokens[kept] = torch.tensor([one.token_id for one in sampled], dtype=torch.int64, device=self._device)
        return FinishedStep(sampled_result(plan.step_id, sampled, found))


def build_shapes(spec: DecoderSpec, shard: RankShard, max_rows: int, graph_tokens: int) -> StepShapes:
    """Long chunks have a kernel of their own, if there are enough of them. Ranks with more heads than others have no
    shapes of their own: each graph sums over all ranks."""
    has_long = partial(hopper_attention.has_rows, num_heads=-(-spec.num_heads // shard.tp_size))
    return StepShapes(max_rows, graph_tokens, hopper_attention.FEWEST_QUERIES, has_long)


def build_works(
    spec: DecoderSpec,
    shard: RankShard,
    caches: Sequence[Tensor],
    max_rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[int | None, DecodeWork]:
    """How decode attention is shared out, for each window among the rank's layers."""
    return {
        window: build_decode_work(
            max_rows,
            num_heads=len(shard.heads),
            num_kv_heads=len(shard.kv_heads),
            head_dim=spec.head_dim,
            dtype=dtype,
            cache_dtype=caches[0].dtype if caches else dtype,
            window=window,
            device=device,
        )
        for window in {spec.window_of(layer) for layer in shard.layers}
    }
