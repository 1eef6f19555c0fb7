"""Streams over an engine that the test plays by hand: text, stops, aborts, errors and exact usage."""

from __future__ import annotations

from typing import Any

import anyio
import anyio.lowlevel
import pytest

from aphro_core.errors import AphroError, EngineDeadError, ExitCode, MemoryBudgetError, OverloadedError, RequestError
from aphro_core.frontend.frontend import Frontend
from aphro_core.frontend.request_table import choice_seed
from aphro_core.frontend.tokenizer import Tokenizer
from aphro_core.messages.requests import (
    AbortSequences,
    AddSequence,
    EnginePulse,
    EngineReady,
    EngineStats,
    Gains,
    SequenceOutput,
    StepOutputs,
    ToEngine,
)
from aphro_core.messages.steps import TokenLogprobs
from aphro_core.request import Logprob, OutputDelta, Request, SamplingParams

pytestmark = pytest.mark.anyio

END = 1  # of the byte-level vocabulary
PROMPT = [0, 50, 51]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class FakeEngine:
    """Keeps what it is told; ``step`` answers through the frontend."""

    def __init__(self) -> None:
        self.sent: list[ToEngine] = []
        self.frontend: Frontend | None = None
        self.dead: AphroError | None = None
        self.num_steps = 0

    async def send(self, message: ToEngine) -> None:
        await anyio.lowlevel.checkpoint()
        if self.dead is not None:
            raise self.dead
        self.sent.append(message)

    def step(self, *outputs: SequenceOutput) -> None:
        assert self.frontend is not None
        self.num_steps += 1
        self.frontend.on_outputs(StepOutputs(Gains(list(outputs)), EngineStats(self.num_steps, 1, 0, 1, 0, 0, 0)))

    @property
    def added(self) -> list[AddSequence]:
        return [message for message in self.sent if isinstance(message, AddSequence)]

    @property
    def aborted(self) -> list[int]:
        return [seq_id for message in self.sent if isinstance(message, AbortSequences) for seq_id in message.seq_ids]


class Clock:
    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def build(engine: FakeEngine, tokenizer: Tokenizer | None, clock: Clock | None = None, **changes: Any) -> Frontend:
    options: dict[str, Any] = {
        "served_name": "m",
        "vocab_size": 300,
        "max_model_len": 64,
        "eos_token_ids": (299,),
        "max_queued_requests": 4,
        "clock": clock or Clock(),
        "draw_seed": lambda: 77,
    }
    frontend = Frontend(tokenizer, **options | changes)
    engine.frontend = frontend
    return frontend


async def attach(frontend: Frontend, engine: FakeEngine, max_model_len: int = 64) -> None:
    frontend.on_engine_ready(EngineReady(num_blocks=4, max_model_len=max_model_len, ranks=[]))
    await frontend.resume(engine)


@pytest.fixture
async def frontend(engine: FakeEngine, byte_level: Tokenizer, clock: Clock) -> Frontend:
    frontend = build(engine, byte_level, clock)
    await attach(frontend, engine, max_model_len=48)
    return frontend


def ask(**sampling: Any) -> Request:
    return Request("r", PROMPT, SamplingParams(**{"max_tokens": None} | sampling))


async def take_all(deltas: Any) -> list[OutputDelta]:
    with anyio.fail_after(2):
        return [delta async for delta in deltas]


def gained(seq_id: int, token_ids: list[int], reason: Any = None, **more: Any) -> SequenceOutput:
    return SequenceOutput(seq_id, token_ids, finish_reason=reason, **more)


# --- text and tokens ---


async def test_a_reader_of_the_whole_is_woken_once(
    engine: FakeEngine, frontend: Frontend, byte_level: Tokenizer
) -> None:
    hello, world = byte_level.encode("hello"), byte_level.encode(" world")
    async with frontend.stream(ask(), is_whole=True) as deltas:
        engine.step(gained(1, hello, num_cached_tokens=2))
        with anyio.move_on_after(0.02):
            await anext(deltas)
            raise AssertionError("a part of the answer")
        engine.step(gained(1, world, "length"))
        (delta,) = await take_all(deltas)
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("hello world", [*hello, *world], "length")
    assert delta.num_cached_tokens == 2


async def test_text_streams_as_tokens_come(engine: FakeEngine, frontend: Frontend, byte_level: Tokenizer) -> None:
    hello, world = byte_level.encode("hello"), byte_level.encode(" world")
    async with frontend.stream(ask()) as deltas:
        engine.step(gained(1, hello, num_cached_tokens=2))
        with anyio.fail_after(1):
            first = await anext(deltas)
        assert (first.index, first.text, first.token_ids, first.finish_reason) == (0, "hello", hello, None)
        assert first.num_cached_tokens == 2
        engine.step(gained(1, world))
        engine.step(gained(1, [END], "stop", stop_token_id=END))
        (last,) = await take_all(deltas)
        assert (last.text, last.token_ids, last.finish_reason, last.stop_reason) == (
            " world",
            [*world, END],
            "stop",
            None,
        )
    assert engine.aborted == []


async def test_what_the_engine_is_asked(engine: FakeEngine, frontend: Frontend) -> None:
    async with frontend.stream(ask(seed=5, stop_token_ids=[9], temperature=0.5)):
        pass
    async with frontend.stream(ask(ignore_eos=True, n=2)):
        pass
    first, *others = engine.added
    assert first.prompt_token_ids == PROMPT
    assert first.stop_token_ids == [299, END, 9]
    assert (first.seed, first.max_tokens, first.sampling.temperature) == (5, 48 - 3, 0.5)
    assert [each.seed for each in others] == [77, choice_seed(77, 1)]
    assert [each.stop_token_ids for each in others] == [[], []]
    assert [each.seq_id for each in others] == [2, 3]


async def test_characters_split_over_tokens(engine: FakeEngine, frontend: Frontend, byte_level: Tokenizer) -> None:
    """A token that shows nothing waits for the one that does; none is lost."""
    ids = byte_level.encode("😀!")
    async with frontend.stream(ask()) as deltas:
        for token_id in ids[:3]:
            engine.step(gained(1, [token_id]))
        with anyio.move_on_after(0.05) as waited:
            await anext(deltas)
        assert waited.cancelled_caught, "there is nothing to show yet"
        engine.step(gained(1, ids[3:4]))
        delta = await anext(deltas)
        assert (delta.text, delta.token_ids) == ("😀", ids[:4])
        engine.step(gained(1, [ids[0]], "length"))
        (last,) = await take_all(deltas)
        assert (last.text, last.token_ids, last.finish_reason) == ("\ufffd", [ids[0]], "length")


async def test_choices_are_apart(engine: FakeEngine, frontend: Frontend, byte_level: Tokenizer) -> None:
    letters = [byte_level.encode(letter)[0] for letter in "abc"]
    async with frontend.stream(ask(n=3)) as deltas:
        engine.step(*[gained(seq_id, [letter], num_cached_tokens=seq_id) for seq_id, letter in enumerate(letters, 1)])
        engine.step(gained(3, [letters[2]], "length"), gained(1, [letters[0]]))
        engine.step(gained(1, [], "abort"), gained(2, [9], "stop", stop_token_id=9))
        answer = await take_all(deltas)
    assert [(delta.index, delta.text, delta.finish_reason) for delta in answer] == [
        (0, "aa", "abort"), (1, "b", "stop"), (2, "cc", "length"),
    ]  # fmt: skip
    assert [delta.num_cached_tokens for delta in answer] == [1, 0, 0], "of the prompt, which is the same for all"
    assert answer[1].stop_reason == 9


async def test_a_slow_reader_gets_one_delta(engine: FakeEngine, frontend: Frontend, byte_level: Tokenizer) -> None:
    (letter,) = byte_level.encode("a")
    async with frontend.stream(ask()) as deltas:
        for _ in range(30):
            engine.step(gained(1, [letter]))
        engine.step(gained(1, [letter], "length"))
        (only,) = await take_all(deltas)
    assert (only.text, only.token_ids, only.finish_reason) == ("a" * 31, [letter] * 31, "length")


async def test_a_shown_stop_token(engine: FakeEngine, frontend: Frontend) -> None:
    for include, skip, text in ((True, False, "<|end|>"), (True, True, ""), (False, False, "")):
        async with frontend.stream(ask(include_stop_str_in_output=include, skip_special_tokens=skip)) as deltas:
            seq_id = engine.added[-1].seq_id
            engine.step(gained(seq_id, [END], "stop", stop_token_id=END))
            (only,) = await take_all(deltas)
        assert (only.text, only.token_ids) == (text, [END])


# --- stop strings ---


@pytest.mark.parametrize(("include", "text"), [(False, "one "), (True, "one two")])
async def test_a_stop_string_ends_a_choice(
    engine: FakeEngine, frontend: Frontend, byte_level: Tokenizer, include: bool, text: str
) -> None:
    ids = byte_level.encode("one two three")
    shown = ""
    async with frontend.stream(ask(stop=["two"], include_stop_str_in_output=include)) as deltas:
        engine.step(gained(1, ids[:5]))
        delta = await anext(deltas)
        assert delta.text == "one "
        shown += delta.text
        logprobs = [TokenLogprobs([token_id], [-1.0], 1) for token_id in ids[5:]]
        engine.step(gained(1, ids[5:], logprobs=logprobs))
        engine.step(gained(1, ids[:1]))  # it does not know yet
        (last,) = await take_all(deltas)
        assert engine.aborted == [1], "while the stream is still open"
    assert shown + last.text == text
    assert (last.finish_reason, last.stop_reason) == ("stop", "two")
    assert byte_level.decode(delta.token_ids + last.token_ids) == "one two", "up to the token that completed it"
    assert last.logprobs is not None
    assert len(last.logprobs) == len(last.token_ids)
    for name in ("generation_tokens_total", "request_generation_tokens_sum"):
        assert f'aphro:{name}{{model_name="m"}} 7.0' in frontend.metrics.render().decode(), "what is paid for"
    assert engine.aborted == [1]


async def test_a_stop_string_of_one_choice_leaves_the_others(
    engine: FakeEngine, frontend: Frontend, byte_level: Tokenizer
) -> None:
    (stop, letter) = byte_level.encode("."), byte_level.encode("a")
    async with frontend.stream(ask(n=2, stop=["."])) as deltas:
        engine.step(gained(1, stop), gained(2, letter))
        engine.step(gained(1, letter), gained(2, letter, "length"))
        answer = {delta.index: delta async for delta in deltas}
    assert (answer[0].text, answer[0].finish_reason, answer[0].token_ids) == ("", "stop", stop)
    assert (answer[1].text, answer[1].finish_reason) == ("aa", "length")
    assert engine.aborted == [1]


async def test_a_stop_string_with_the_last_token_needs_no_abort(
    engine: FakeEngine, frontend: Frontend, byte_level: Tokenizer
) -> None:
    async with frontend.stream(ask(stop=["."])) as deltas:
        engine.step(gained(1, byte_level.encode("."), "length"))
        (only,) = await take_all(deltas)
    assert (only.finish_reason, only.stop_reason) == ("stop", ".")
    assert engine.aborted == []


# --- log-probabilities ---


async def test_logprobs(engine: FakeEngine, frontend: Frontend, byte_level: Tokenizer) -> None:
    a, b, c = (byte_level.encode(letter)[0] for letter in "abc")
    entry = TokenLogprobs([c, a, b], [-3.0, -0.5, -1.0], 7)
    chosen_is_best = TokenLogprobs([a, a, b], [-0.5, -0.5, -1.0], 1)
    async with frontend.stream(ask(logprobs=2, prompt_logprobs=1, n=2)) as deltas:
        engine.step(gained(1, [c], logprobs=[entry], prompt_logprobs=[TokenLogprobs([50], [-2.0], 4)]))
        engine.step(gained(1, [a], "length", logprobs=[chosen_is_best]), gained(2, [END], "length"))
        answer = {delta.index: delta async for delta in deltas}
    assert [each.sampling.prompt_logprobs for each in engine.added] == [1, None]
    first = answer[0]
    assert first.prompt_logprobs == [None, {50: Logprob(-2.0, 4, byte_level.token_text(50))}]
    assert first.logprobs == [
        {c: Logprob(-3.0, 7, "c"), a: Logprob(-0.5, 1, "a"), b: Logprob(-1.0, 2, "b")},
        {a: Logprob(-0.5, 1, "a"), b: Logprob(-1.0, 2, "b")},
    ]
    assert [list(position) for position in first.logprobs] == [[c, a, b], [a, b]]
    assert answer[1].logprobs is None
    assert answer[1].prompt_logprobs is None


# --- without text ---


async def test_ids_alone(engine: FakeEngine) -> None:
    frontend = build(engine, None)
    await attach(frontend, engine)
    async with frontend.stream(ask(logprobs=0)) as deltas:
        engine.step(gained(1, [200], logprobs=[TokenLogprobs([200], [-1.0], 1)]))
        first = await anext(deltas)
        assert (first.text, first.token_ids, first.logprobs) == ("", [200], [{200: Logprob(-1.0, 1, None)}])
        engine.step(gained(1, [299], "stop", stop_token_id=299))
        (last,) = await take_all(deltas)
        assert (last.text, last.stop_reason) == ("", None)


async def test_stop_strings_need_text(engine: FakeEngine, frontend: Frontend) -> None:
    bare = build(engine, None)
    await attach(bare, engine)
    for each, request, why in (
        (frontend, ask(stop=["x"], detokenize=False), "detokenize is false"),
        (bare, ask(stop=["x"]), "without a tokenizer"),
    ):
        with pytest.raises(RequestError, match=why) as caught:
            async with each.stream(request):
                pass
        assert caught.value.field == "stop"


async def test_a_wrong_request_reaches_nobody(engine: FakeEngine, frontend: Frontend) -> None:
    for wrong in (ask(max_tokens=46), Request("r", [300], SamplingParams()), ask(n=True)):
        with pytest.raises(RequestError):
            async with frontend.stream(wrong):
                pass
    assert engine.sent == []
    assert frontend.health().detail == "0 requests open"


# --- leaving ---


async def test_leaving_early_aborts_what_is_open(engine: FakeEngine, frontend: Frontend) -> None:
    async with frontend.stream(ask(n=2)):
        engine.step(gained(2, [END], "stop", stop_token_id=END))
    assert engine.aborted == [1]
    engine.step(gained(1, [50]))  # still on its way then
    assert frontend.health().detail == "0 requests open"


async def test_a_cancelled_reader_aborts(engine: FakeEngine, frontend: Frontend) -> None:
    async with anyio.create_task_group() as tasks:

        async def read() -> None:
            async with frontend.stream(ask()) as deltas:
                await take_all(deltas)

        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        assert engine.aborted == []
        tasks.cancel_scope.cancel()
    assert engine.aborted == [1]


async def test_one_that_leaves_while_it_is_sent_is_sent_whole(engine: FakeEngine, frontend: Frontend) -> None:
    """Half a frame on the way to the engine would be the end of all others."""
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with frontend.stream(ask()):
            await anyio.sleep(1)
    assert len(engine.added) == 1
    assert engine.aborted == [1]


# --- overload and death ---


async def test_overload_is_answered_at_once(engine: FakeEngine, byte_level: Tokenizer) -> None:
    frontend = build(engine, byte_level, max_queued_requests=1)
    await attach(frontend, engine)
    async with frontend.stream(ask()):
        with pytest.raises(OverloadedError, match="1 requests are open, allowed: 1") as caught:
            frontend.check_admission()
        assert not caught.value.draining
        with pytest.raises(OverloadedError):
            await frontend.stream(ask()).__aenter__()
    frontend.check_admission()


async def test_a_starting_engine_takes_nothing(engine: FakeEngine, byte_level: Tokenizer) -> None:
    frontend = build(engine, byte_level)
    with pytest.raises(OverloadedError, match="starting") as caught:
        async with frontend.stream(ask()):
            pass
    assert caught.value.draining
    health = frontend.health()
    assert (health.phase, health.ready, health.seconds_since_step) == ("starting", False, None)


async def test_death_ends_every_stream(engine: FakeEngine, frontend: Frontend) -> None:
    cause = MemoryBudgetError("rank 1 on host b: out of memory", hint="a smaller model")
    texts, errors = [], []

    async def read() -> None:
        async with frontend.stream(ask(n=2)) as deltas:
            texts.append((await anext(deltas)).text)
            with pytest.raises(EngineDeadError, match="rank 1 on host b") as caught:
                await anext(deltas)
            errors.append(caught.value)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        engine.step(*[gained(seq_id, [70]) for seq_id in (1, 3)])
        frontend.on_engine_dead(cause)
    assert len(texts) == 2, "what was there before is delivered"
    first, second = errors
    assert first is not second, "each stream has a traceback of its own"
    assert (first.exit_code, first.hint, first.__cause__) == (ExitCode.MEMORY, "a smaller model", cause)
    assert engine.aborted == []
    health = frontend.health()
    assert (health.phase, health.ready, health.detail) == ("dead", False, cause.message)
    with pytest.raises(EngineDeadError, match="out of memory"):
        frontend.check_admission()


async def test_what_was_finished_survives_a_death(engine: FakeEngine, frontend: Frontend) -> None:
    async with frontend.stream(ask()) as deltas:
        engine.step(gained(1, [END], "stop", stop_token_id=END))
        frontend.on_engine_dead(EngineDeadError("gone"))
        (only,) = await take_all(deltas)
    assert only.finish_reason == "stop"


# --- what the operator reads ---


async def test_health_and_metrics_count_tokens(engine: FakeEngine, frontend: Frontend, clock: Clock) -> None:
    async with frontend.stream(ask(n=2)) as deltas:
        assert frontend.health().detail == "1 requests open"
        clock.now += 0.5
        engine.step(gained(1, [70]), gained(2, [70]))
        clock.now += 0.25
        engine.step(gained(1, [END], "stop", stop_token_id=END), gained(2, [70], "length"))
        await take_all(deltas)
    async with frontend.stream(ask()):
        pass
    clock.now += 2.0
    frontend.on_pulse(EnginePulse(2))
    health = frontend.health()
    assert (health.phase, health.ready, health.step, health.seconds_since_step) == ("ready", True, 2, 2.0)
    assert frontend.stats.step == 2
    text = frontend.metrics.render().decode()
    for line in (
        'aphro:generation_tokens_total{model_name="m"} 4.0',
        'aphro:prompt_tokens_total{model_name="m"} 3.0',
        'aphro:time_to_first_token_seconds_sum{model_name="m"} 0.5',
        'aphro:time_to_first_token_seconds_count{model_name="m"} 1.0',
        'aphro:inter_token_latency_seconds_sum{model_name="m"} 0.5',
        'aphro:inter_token_latency_seconds_count{model_name="m"} 2.0',
        'aphro:e2e_request_latency_seconds_sum{model_name="m"} 0.75',
        'aphro:request_generation_tokens_sum{model_name="m"} 4.0',
        'aphro:request_success_total{finished_reason="stop",model_name="m"} 1.0',
        'aphro:request_success_total{finished_reason="length",model_name="m"} 1.0',
        'aphro:request_success_total{finished_reason="abort",model_name="m"} 1.0',
        'aphro:kv_cache_num_blocks{model_name="m"} 4.0',
    ):
        assert line in text.splitlines(), line


async def test_the_context_may_shrink_to_the_memory(frontend: Frontend) -> None:
    assert (frontend.max_model_len, frontend.vocab_size, frontend.served_name) == (48, 300, "m")
