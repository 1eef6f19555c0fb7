"""The live check: real collectives over every pair and over all ranks; what hangs is found within a limit and named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import anyio

from aphro_core.doctor.live.plan import ModelSizes, group_works, pair_works, rounds_of_pairs
from aphro_core.doctor.live.protocol import Measure, Measured, Pong, RankFailed, Started, StartRank, Timing, Work
from aphro_core.doctor.live.ranks import Place, Rank, open_ranks
from aphro_core.remote.remote import HostUnreachableError

_SLACK_SECONDS: Final = 3.0  # behind a rank's own limit: then it hangs, or its words are still under way
_WORK_SECONDS: Final = 2.0  # what a work may take with its repeats and its verification


@dataclass(frozen=True)
class Problem:
    """Why a group came to no result.

    ``kind``: silent (ranks that do not even answer a ping), failed (a rank said why), stuck (all answer, none gets on),
    wrong (a sum), start (a rank never came up), skipped (others had failed before). ``ranks``: those to blame.
    """

    kind: Literal["silent", "failed", "stuck", "wrong", "start", "skipped"]
    ranks: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Outcome:
    """What a group of ranks measured, or its problem."""

    ranks: tuple[int, ...]
    timings: tuple[Timing, ...] = ()
    problem: Problem | None = None


@dataclass(frozen=True)
class LiveReport:
    """``started`` holds None for a rank that never came up. ``logs``: NCCL's, by rank, where there are any."""

    places: tuple[Place, ...]
    started: tuple[Started | None, ...]
    pairs: tuple[Outcome, ...]
    group: Outcome
    logs: Mapping[int, str] = field(default_factory=dict)

    @property
    def problems(self) -> list[Problem]:
        return [outcome.problem for outcome in (*self.pairs, self.group) if outcome.problem is not None]


@dataclass(frozen=True)
class LiveLimits:
    """Seconds: for a rank to come up (it imports torch), and for it to get on with a collective."""

    start: float
    collective: float


async def run_live(
    places: Sequence[Place],
    model: ModelSizes,
    limits: LiveLimits,
    *,
    group_size: int | None = None,
    env: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> LiveReport:
    """Start a rank at each place; measure every pair, then the first ``group_size`` ranks (None: all) together.

    Never raises for what ranks, hosts or links do: that is in the report. Nothing of it runs on when it returns.
    """
    is_cuda = places[0].device != "cpu"
    nobody = Outcome(tuple(range(group_size or len(places))))
    async with open_ranks(places, env or {}) as ranks:
        progress(f"starting {len(ranks)} ranks")
        started, failed = await _start(ranks, limits)
        if failed is not None:
            return LiveReport(tuple(places), started, (), Outcome(nobody.ranks, problem=failed))
        first = started[0]
        assert first is not None
        meeting = _Meeting(places[0].address, first.store_port, limits)
        pairs: list[Outcome] = []
        for number, pairs_of_round in enumerate(rounds := rounds_of_pairs(len(ranks)), 1):
            progress(f"round {number} of {len(rounds)}: {', '.join(f'{a}-{b}' for a, b in pairs_of_round)}")
            pairs += await meeting.measure_all(ranks, pairs_of_round, pair_works(model, is_cuda=is_cuda))
        progress(f"all {len(nobody.ranks)} ranks together")
        group = nobody
        if any(outcome.problem for outcome in pairs):
            group = Outcome(nobody.ranks, problem=Problem("skipped", (), "not run together: a pair has failed"))
        else:
            (group,) = await meeting.measure_all(ranks, [nobody.ranks], group_works(model, is_cuda=is_cuda))
        logs = {rank.number: await rank.log() for rank in ranks} if is_cuda else {}
        return LiveReport(tuple(places), started, tuple(pairs), group, {n: log for n, log in logs.items() if log})


async def _start(ranks: Sequence[Rank], limits: LiveLimits) -> tuple[tuple[Started | None, ...], Problem | None]:
    answers: list[Started | RankFailed | None] = [None] * len(ranks)

    async def start(rank: Rank) -> None:
        store_address = rank.place.address if rank.number == 0 else None
        try:
            await rank.tell(StartRank(rank.place.device, limits.collective, rank.place.interface, store_address))
            with anyio.fail_after(limits.start):
                answers[rank.number] = await rank.reply(Started)
        except HostUnreachableError as error:
            answers[rank.number] = RankFailed("starting", error.message)
        except TimeoutError:
            pong = await rank.ping()
            during = f"it is {pong.during}" if pong else "it does not answer"
            answers[rank.number] = RankFailed("starting", f"not up after {limits.start:g} s: {during}")

    async with anyio.create_task_group() as tasks:
        for rank in ranks:
            tasks.start_soon(start, rank)
    started = tuple(answer if isinstance(answer, Started) else None for answer in answers)
    late = [rank for rank, answer in zip(ranks, started, strict=True) if answer is None]
    if not late:
        return started, None
    words = answers[late[0].number]
    text = f"{late[0].label} while {words.during}: {words.message}" if isinstance(words, RankFailed) else "no answer"
    return started, Problem("start", tuple(rank.number for rank in late), text)


@dataclass
class _Meeting:
    """Where ranks meet, and which of them have been lost."""

    address: str
    port: int
    limits: LiveLimits
    lost: dict[int, str] = field(default_factory=dict)
    num_groups: int = 0

    async def measure_all(
        self, ranks: Sequence[Rank], groups: Sequence[tuple[int, ...]], works: Sequence[Work]
    ) -> list[Outcome]:
        """Groups without a rank in common, at the same time."""
        outcomes: dict[tuple[int, ...], Outcome] = {}

        async def measure(group: tuple[int, ...]) -> None:
            outcomes[group] = await self._measure([ranks[number] for number in group], works)

        async with anyio.create_task_group() as tasks:
            for group in groups:
                tasks.start_soon(measure, group)
        return [outcomes[group] for group in groups]

    async def _measure(self, members: Sequence[Rank], works: Sequence[Work]) -> Outcome:
        numbers = tuple(rank.number for rank in members)
        gone = [number for number in numbers if number in self.lost]
        if gone:
            return Outcome(numbers, problem=Problem("skipped", (), f"not run: {self.lost[gone[0]]}"))
        self.num_groups += 1
        group = f"{self.num_groups}:{'-'.join(map(str, numbers))}"
        answers: dict[int, Measured | RankFailed] = {}
        limit = anyio.CancelScope()

        async def ask(rank: Rank, place: int) -> None:
            message = Measure(group, place, len(members), self.address, self.port, list(works))
            try:
                await rank.tell(message)
                answer = await rank.reply(Measured)
            except HostUnreachableError as error:
                answer = RankFailed("running", error.message)
            answers[rank.number] = answer
            if isinstance(answer, RankFailed):  # its peers learn it soon, or never
                limit.deadline = min(limit.deadline, anyio.current_time() + _SLACK_SECONDS)

        limit.deadline = anyio.current_time() + self.limits.collective + _WORK_SECONDS * len(works) + _SLACK_SECONDS
        with limit:
            async with anyio.create_task_group() as tasks:
                for place, rank in enumerate(members):
                    tasks.start_soon(ask, rank, place)
        measured = [answer for number in numbers if isinstance(answer := answers.get(number), Measured)]
        if len(measured) == len(members):
            return _judge(numbers, measured)
        return Outcome(numbers, problem=await self._blame(members, answers))

    async def _blame(self, members: Sequence[Rank], answers: Mapping[int, Measured | RankFailed]) -> Problem:
        """Who does not even answer a ping is to blame; else who failed first in words; else the path between them."""
        pongs: dict[int, Pong | None] = {}

        async def ping(rank: Rank) -> None:
            pongs[rank.number] = await rank.ping()

        async with anyio.create_task_group() as tasks:
            for rank in members:
                tasks.start_soon(ping, rank)
        silent = [rank for rank in members if pongs[rank.number] is None]
        stuck = [rank for rank in members if rank.number not in answers and rank not in silent]
        failures = {
            rank.number: answer for rank in members if isinstance(answer := answers.get(rank.number), RankFailed)
        }
        for rank in (*silent, *stuck):
            self.lost[rank.number] = f"{rank.label} had stopped answering before"
        if silent:
            who = " and ".join(rank.label for rank in silent)
            said = next((f": {failures[rank.number].message}" for rank in silent if rank.number in failures), "")
            return Problem("silent", tuple(rank.number for rank in silent), f"{who} stopped answering{said}")
        if failures:
            return _first_failure(failures)
        doing = [f"{rank.label} is {pong.during}" for rank in stuck if (pong := pongs[rank.number])]
        text = f"{'; '.join(doing)}, and gets no further"
        return Problem("stuck", tuple(rank.number for rank in stuck), text)


def _first_failure(failures: Mapping[int, RankFailed]) -> Problem:
    """The cause is with the rank that came least far: whoever waited for it only says that nobody came."""
    stages = ("reaching", "joining", "in ")

    def stage(number: int) -> int:
        during = failures[number].during
        return next((place for place, start in enumerate(stages) if during.startswith(start)), len(stages))

    number = min(failures, key=stage)
    text = f"rank {number}, while {failures[number].during}: {failures[number].message}"
    return Problem("failed", (number,), text)


def _judge(numbers: tuple[int, ...], measured: Sequence[Measured]) -> Outcome:
    """The slowest rank's time of each work; a sum that is wrong anywhere is wrong."""
    timings = tuple(
        max(of_ranks, key=lambda timing: (not timing.is_right, timing.seconds))
        for of_ranks in zip(*(answer.timings for answer in measured), strict=True)
    )
    wrong = [timing for timing in timings if not timing.is_right]
    if not wrong:
        return Outcome(numbers, timings)
    text = f"{wrong[0].kind.replace('_', '-')} of {wrong[0].num_bytes} bytes came out wrong"
    return Outcome(numbers, timings, Problem("wrong", numbers, text))
