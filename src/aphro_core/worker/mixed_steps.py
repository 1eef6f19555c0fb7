"""Steps with chunks of prompts, from the numbers that were sent to the logits of the rows that are drawn from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from aphro_core.distributed.links import Links
from aphro_core.layers.decoder import Decoder
from aphro_core.messages.steps import PromptLogprobs, ScheduledSequence
from aphro_core.worker.padded_steps import PaddedSteps
from aphro_core.worker.prompt_logprobs import prompt_logprobs
from aphro_core.worker.sampler import SamplingRow
from aphro_core.worker.step_memory import PagedStep
from aphro_core.worker.step_shapes import StepShape

Asking = Sequence[tuple[ScheduledSequence, SamplingRow]]  # who wants to know log-probabilities of its prompt


class MixedSteps:
    """Their layers are a graph, if they have a shape that has one, and nobody asks for the rows that it leaves out."""

    def __init__(self, padded: PaddedSteps, decoder: Decoder, caches: Sequence[Tensor], links: Links) -> None:
        self._padded, self._decoder, self._caches, self._links = padded, decoder, caches, links
        self._memory, self._shapes = padded.memory, padded.shapes

    def run(self, step: PagedStep, asking: Asking) -> list[PromptLogprobs]:
        """To ``padded.logits``, or to the next stage."""
        keeps_draws = self._padded.keeps_draws and not asking
        hidden = self._states(step, keeps_draws=keeps_draws)
        if not self._padded.has_head:
            self._links.stage.send(hidden)
            return []
        found = [
            prompt_logprobs(self._decoder, hidden[step.first_rows[entry.seq_id] :], entry, row) for entry, row in asking
        ]
        if step.draws:
            rows = self._drawn_rows(step, hidden, keeps_draws=keeps_draws)
            self._decoder.logits(rows, out=self._padded.logits[: len(rows)])
        return [one for one in found if one is not None]

    def draw(self, step: PagedStep) -> None:
        """Tokens from ``padded.logits``, told where no other rank has to know them."""
        assert step.numbers is not None
        count = len(step.draws)
        end = self._memory.draws(step) if self._links.tensor.size == 1 else None
        positions = step.numbers.draw_positions[:count]
        self._padded.sampler.draw(self._padded.logits[:count], positions, end, peaks=self._padded.peaks)

    def num_kept(self, shape: StepShape, num_draws: int) -> int | None:
        """Rows that the last layer goes on with where nobody asks, which all ranks sum; None: all."""
        if not self._padded.keeps_draws:
            return None
        return shape.num_rows if self._shapes.has(shape) else self.padded(max(num_draws, 1), shape.num_tokens)

    def padded(self, num_draws: int, most: int) -> int:
        """As many rows as a decode step has, ``most`` at most: of a size that is new to it a library may choose a
        kernel that is not loaded yet, and loading waits for the steps in flight."""
        return min(self._shapes.of_rows(num_draws).num_rows, most)

    def _states(self, step: PagedStep, *, keeps_draws: bool) -> Tensor:
        """Behind the layers, until the next step: of all rows, or of those that are drawn from."""
        padded, num_tokens = self._padded, step.shape.num_tokens
        hidden = padded.hidden[:num_tokens]
        received = None
        if not padded.has_embedding:
            # of a step that is not padded there may be more
            into = hidden if len(hidden) == num_tokens else hidden.new_empty(num_tokens, hidden.shape[1])
            received = self._links.stage.receive_(into)
        if not self._shapes.has(step.shape) or keeps_draws != padded.keeps_draws:
            batch = self._memory.mixed_batch(step)
            kept = self._pad(batch.sampled_rows, num_tokens) if keeps_draws else None
            return self._decoder(batch, received, self._caches, kept)
        padded.run(step.shape)
        self._links.tensor.num_sums = 2**31  # in a graph: all of the step's
        return hidden

    def _drawn_rows(self, step: PagedStep, hidden: Tensor, *, keeps_draws: bool) -> Tensor:
        if keeps_draws:
            return hidden[: self._shapes.of_rows(len(step.draws)).num_rows]
        assert step.numbers is not None
        return hidden.index_select(0, self._pad(step.numbers.draw_rows[: len(step.draws)], len(hidden)))

    def _pad(self, rows: Tensor, most: int) -> Tensor:
        """By row 0, to :meth:`padded` of them."""
        return functional.pad(rows, (0, self.padded(len(rows), most) - len(rows)))
