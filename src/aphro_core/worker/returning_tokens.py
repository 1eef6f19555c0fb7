"""On the first stage of a pipeline of GPUs: tokens that the last stage drew, put in place just before they are read."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from torch import Tensor

from aphro_core.distributed.stage_links import MOST_DUE, TokenLink
from aphro_core.messages.steps import StepPlan
from aphro_core.worker.sequences import SequenceState


class ReturningTokens:
    """Tokens are received when a plan has a row whose token only the device has, for which its stream waits; those of
    other steps behind them, or when as many are due as may be."""

    def __init__(self, link: TokenLink, last_token_ids: Tensor, num_stages: int) -> None:
        self._link = link
        self._most_due = max(MOST_DUE, num_stages)  # fewer would not fill that many stages
        self._last_token_ids = last_token_ids
        self._due: deque[tuple[int, Tensor]] = deque()  # step number, slots of its tokens
        self._num_steps = 0
        self._drawn_in: dict[int, int] = {}  # seq_id -> number of the step that drew its last token

    def expect(self, draws: list[int], slots: Tensor) -> None:
        """A step has been launched here that ``draws`` a token for each of these; they will come, for ``slots``."""
        if not draws:
            return
        slots = slots.clone()  # where those of a decode step were sent, the next one's will be
        self._num_steps += 1
        self._drawn_in.update((seq_id, self._num_steps) for seq_id in draws)
        self._expect(slots)

    def expect_void(self, count: int) -> None:
        """A step that draws ``count`` tokens has failed here; they will come all the same."""
        if count and not self._link.has_passed:
            self._num_steps += 1
            self._expect(self._last_token_ids.new_full((count,), len(self._last_token_ids) - 1))

    def _expect(self, slots: Tensor) -> None:
        self._link.has_passed = True
        self._due.append((self._num_steps, slots))

    def forget_all(self) -> None:
        """Nobody reads what is due; it is received, so that what comes next is the next step's."""
        while self._due:
            self._receive()
        self._drawn_in.clear()

    def take_for(self, plan: StepPlan, sequences: Mapping[int, SequenceState]) -> None:
        """Put the tokens in place that rows of ``plan`` read, and all that were drawn before them. Comes before
        ``plan`` is launched."""
        for seq_id in plan.released:
            self._drawn_in.pop(seq_id, None)
        unknown = [e.seq_id for e in plan.scheduled if e.start >= len(sequences[e.seq_id].row.token_ids)]
        wanted = max((self._drawn_in.get(seq_id, 0) for seq_id in unknown), default=0)
        while self._due and (self._due[0][0] <= wanted or len(self._due) >= self._most_due):
            self._receive()

    def _receive(self) -> None:
        _, slots = self._due[0]
        tokens = self._link.receive(len(slots), self._last_token_ids.device)
        self._due.popleft()  # not before: where memory runs out they are still to come, and all behind them
        self._last_token_ids.index_copy_(0, slots, tokens)
