"""From measurements to findings: who is to blame, which remedy, and when a pair counts as slow."""

from __future__ import annotations

import pytest

from aphro_core.doctor.finding import Finding, Status
from aphro_core.doctor.live.live import LiveReport, Outcome, Problem
from aphro_core.doctor.live.plan import ASSUMED_MODEL, rounds_of_pairs
from aphro_core.doctor.live.protocol import Started, Timing
from aphro_core.doctor.live.ranks import Place
from aphro_core.doctor.live.verdict import findings_of
from aphro_core.remote.local import LocalHost


def report(
    hosts: list[str], problems: dict[tuple[int, ...], Problem] | None = None, *, device: str = "cpu",
    seconds: dict[tuple[int, ...], float] | None = None, interface: str = "eth0",
) -> LiveReport:  # fmt: skip
    """One rank a name; each pair needs 1 ms for 1 MiB unless ``seconds`` says otherwise."""
    problems, seconds = problems or {}, seconds or {}
    places = tuple(
        Place(LocalHost(name), device if device == "cpu" else f"cuda:{number}", f"10.0.0.{number}", "eth0")
        for number, name in enumerate(hosts)
    )
    pairs = []
    for pair in (pair for pairs in rounds_of_pairs(len(hosts)) for pair in pairs):
        timing = Timing("all_reduce", 1 << 20, seconds.get(pair, 0.001), 9, True)
        pairs.append(Outcome(pair, (timing,), problems.get(pair)))
    everybody = tuple(range(len(hosts)))
    decode = Timing("all_reduce", ASSUMED_MODEL.hidden_bytes(1), 20e-6, 99, True)
    started = tuple(Started(0, "2.11.0", None, "cpu", interface) for _ in hosts)
    return LiveReport(places, started, tuple(pairs), Outcome(everybody, (decode,), problems.get(everybody)))


def judge(given: LiveReport, speeds: dict[str, float] | None = None) -> list[Finding]:
    return findings_of("comm.gloo", "Gloo", given, ASSUMED_MODEL, speeds or {})


def test_success_says_what_a_token_pays() -> None:
    (found,) = judge(report(["a", "b"]))
    assert found.status is Status.PASS
    assert "at -tp 2 spends 1.3 ms in 65 all-reduces of 8 KiB" in found.title


@pytest.mark.parametrize(
    ("kind", "ranks", "words", "remedy"),
    [
        ("silent", (1,), "Gloo between a and b: rank 1 (b) stopped answering", "look at b"),
        ("failed", (0,), "Gloo between a and b fails", "ufw allow"),
        ("stuck", (0, 1), "Gloo between a and b hangs", "ufw allow"),
        ("wrong", (0, 1), "Gloo between a and b computes wrong sums", "ufw allow"),
    ],
)
def test_each_problem_names_both_ends_and_a_remedy(kind: str, ranks: tuple[int, ...], words: str, remedy: str) -> None:
    text = "rank 1 (b) stopped answering" if kind == "silent" else "x"
    (found,) = judge(report(["a", "b"], {(0, 1): Problem(kind, ranks, text)}))  # type: ignore[arg-type]
    assert found.status is Status.FAIL
    assert words in found.title
    assert remedy in found.remedy


def test_inside_a_host_the_direct_path_is_suspected() -> None:
    (found,) = judge(report(["a", "a"], {(0, 1): Problem("stuck", (0, 1), "x")}, device="cuda"))
    assert "ACS" in found.remedy
    assert "a cuda:0 and a cuda:1" in found.title


def test_a_forced_interface_is_answered_with_the_right_one() -> None:
    (found,) = judge(report(["a", "b"], {(0, 1): Problem("failed", (0,), "x")}, interface="docker0"))
    assert found.remedy == "on a: export GLOO_SOCKET_IFNAME=eth0; on b: export GLOO_SOCKET_IFNAME=eth0"


def test_a_host_blamed_twice_is_one_finding() -> None:
    silent = Problem("silent", (2,), "rank 2 (c) stopped answering")
    skipped = Problem("skipped", (), "not run")
    found, rest = judge(report(["a", "b", "c"], {(0, 2): silent, (1, 2): silent, (0, 1, 2): skipped}))
    assert (found.host, found.root_cause) == ("c", True)
    assert (rest.status, rest.title) == (Status.SKIP, "Gloo: 1 of 3 pairs add up, 0 were not run after that")
    assert rest.evidence[0].text.startswith("0 a - 1 b: all-reduce 1 MiB")


def test_a_slow_link_is_measured_against_what_it_promises() -> None:
    slow = report(["a", "b"], seconds={(0, 1): 0.2})  # 5 MB/s
    (found,) = judge(slow, {"a": 1.25e9, "b": 12.5e9})
    assert (found.status, "5.243 MB/s, of a link of 1250 MB/s" in found.title) == (Status.WARN, True)
    (found,) = judge(slow)
    assert "below a gigabit" in found.title
    (found,) = judge(report(["a", "a"], seconds={(0, 1): 0.2}))
    assert found.status is Status.PASS  # inside a host there is no link to compare with


def test_the_one_slow_pair_among_many_is_named() -> None:
    (found,) = judge(report(["a", "b", "c"], seconds={(1, 2): 0.008}), dict.fromkeys("abc", 1.25e9))
    assert (found.status, "1 b - 2 c 131.1 MB/s, while the pairs' median is 1049 MB/s" in found.title) == (
        Status.WARN, True
    )  # fmt: skip


def test_a_rank_that_never_came_up() -> None:
    given = report(["a", "b"])
    problem = Problem("start", (1,), "rank 1 (b) while running: its process ended with code 1: No module named torch")
    given = LiveReport(given.places, (given.started[0], None), (), Outcome((0, 1), problem=problem))
    (found,) = judge(given)
    assert (found.host, found.root_cause) == ("b", True)
    assert "same environment" in found.remedy
