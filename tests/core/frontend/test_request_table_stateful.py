"""The request table as a state machine: whatever the order of events, an engine can be told exactly what is open."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from aphro_core.errors import OverloadedError
from aphro_core.frontend.request_table import RequestTable, Row
from aphro_core.request import Request, SamplingParams

MAX_ROWS = 4


class Table(RuleBasedStateMachine):
    """The model: per row and choice the tokens it has got, or None once it has finished."""

    rows = Bundle("rows")

    def __init__(self) -> None:
        super().__init__()
        self.table = RequestTable(MAX_ROWS)
        self.open: dict[int, tuple[Row, list[list[int] | None]]] = {}  # by the first choice's seq_id
        self.seen: set[int] = set()

    @rule(target=rows, n=st.integers(1, 3), length=st.integers(1, 5), seed=st.integers(0, 2**63 - 1))
    def open_row(self, n: int, length: int, seed: int) -> object:
        request = Request("r", list(range(length)), SamplingParams(n=n), cache_salt="s")
        try:
            row = self.table.open(request, max_tokens=9, eos_token_ids=(2,), seed=seed)
        except OverloadedError:
            assert len(self.open) == MAX_ROWS
            return multiple()
        assert len(self.open) < MAX_ROWS
        seq_ids = {choice.seq_id for choice in row.choices}
        assert len(seq_ids) == n
        assert not seq_ids & self.seen, "an id means one choice for ever"
        self.seen |= seq_ids
        self.open[row.choices[0].seq_id] = (row, [[] for _ in range(n)])
        return row

    @rule(row=rows, which=st.integers(0, 2), token_id=st.integers(0, 50), ends=st.booleans())
    def gain(self, row: Row, which: int, token_id: int, ends: bool) -> None:
        index = which % len(row.choices)
        _, choices = self.open.get(row.choices[0].seq_id, (row, [None] * 3))
        tokens = choices[index]
        if tokens is None:
            return
        row.choices[index].output_token_ids.append(token_id)
        tokens.append(token_id)
        if ends:
            row.choices[index].finish_reason = "stop"
            choices[index] = None

    @rule(row=consumes(rows))
    def close(self, row: Row) -> None:
        first = row.choices[0].seq_id
        _, choices = self.open.pop(first)
        left = [first + index for index, tokens in enumerate(choices) if tokens is not None]
        assert self.table.close(row) == left, "what the engine has to forget"

    @invariant()
    def an_engine_could_go_on(self) -> None:
        assert len(self.table) == len(self.open)
        told = {
            add.seq_id: (add.prompt_token_ids, add.output_token_ids, add.cache_salt)
            for row in self.table
            for choice in row.choices
            if choice.finish_reason is None
            for add in [row.add_sequence(choice)]
        }
        expected = {
            first + index: (list(row.request.prompt_token_ids), tokens, "s")
            for first, (row, choices) in self.open.items()
            for index, tokens in enumerate(choices)
            if tokens is not None
        }
        assert told == expected
        assert list(told) == sorted(told), "oldest first"


TestTable = Table.TestCase
TestTable.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
