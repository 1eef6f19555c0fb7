"""Any order of operations, searched and shrunk by hypothesis; the simulation checks each of them."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from aphro_core.errors import RequestError
from tests.core.scheduler.simulation import Setup, Simulation, sequence

MAX_IDS = 8

setups = st.builds(
    lambda num_stages, run_ahead, **others: Setup(max_in_flight=num_stages + run_ahead, run_ahead=run_ahead, **others),
    num_blocks=st.integers(3, 12),
    block_size=st.integers(1, 4),
    max_model_len=st.integers(4, 24),
    max_num_seqs=st.integers(1, 4),
    max_num_batched_tokens=st.sampled_from([1, 3, 8, 32]),
    context_per_token=st.sampled_from([None, 1, 5]),
    free_context=st.sampled_from([0, 7]),
    tokens_unit=st.sampled_from([1, 3]),
    num_stages=st.integers(1, 3),
    run_ahead=st.integers(0, 2),
    enable_prefix_caching=st.booleans(),
    vocab_size=st.just(4),
)


class AnyOrder(RuleBasedStateMachine):
    simulation: Simulation

    @initialize(setup=setups)
    def start(self, setup: Setup) -> None:
        self.simulation = Simulation(setup)

    @rule(
        seq_id=st.integers(0, MAX_IDS),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        max_tokens=st.integers(1, 20),
        stop=st.sampled_from([(), (), (1,)]),
        salt=st.sampled_from(["", "other"]),
        prompt_logprobs=st.booleans(),
    )
    def add(
        self, seq_id: int, prompt: list[int], max_tokens: int, stop: tuple[int, ...], salt: str, prompt_logprobs: bool
    ) -> None:
        if seq_id in self.simulation.clients:
            return
        add = sequence(seq_id, prompt, max_tokens=max_tokens, stop=stop, salt=salt, prompt_logprobs=prompt_logprobs)
        try:
            self.simulation.add(add)
        except RequestError:
            assert seq_id not in self.simulation.clients

    @rule(seq_ids=st.lists(st.integers(0, MAX_IDS + 1), max_size=3))
    def abort(self, seq_ids: list[int]) -> None:
        self.simulation.abort(seq_ids)

    @rule()
    def schedule(self) -> None:
        self.simulation.schedule()

    @precondition(lambda self: self.simulation.in_flight)
    @rule(times=st.integers(1, 3))
    def answer(self, times: int) -> None:
        for _ in range(min(times, len(self.simulation.in_flight))):
            self.simulation.answer()

    @rule()
    def restart(self) -> None:
        self.simulation.restart()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.drain()


AnyOrder.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
