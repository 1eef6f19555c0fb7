"""The rule that chooses a backend, row by row, and what it says where nothing is to be had."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aphro_core.errors import PlacementError, UsageError
from aphro_core.parallel.backend import Asked, Surroundings, choose_backend

ALONE = Surroundings(tp_size=2, pp_size=1, device="cuda", num_devices=2)
FULL = replace(ALONE, pp_size=2)
CPUS = replace(ALONE, device="cpu", num_devices=None)
MEMBER = replace(FULL, cluster="aphro cluster")


@pytest.mark.parametrize(
    ("asked", "around", "backend", "why"),
    [
        ("auto", replace(ALONE, tp_size=1), "inprocess", "1 rank on this host"),
        ("auto", ALONE, "mp", "2 ranks on this host"),
        ("auto", replace(CPUS, tp_size=7), "mp", "7 ranks on this host"),
        ("auto", replace(ALONE, cluster="aphro cluster"), "mp", "2 ranks on this host"),
        ("auto", MEMBER, "ray", "4 ranks, 2 devices on this host, which is in an aphro cluster"),
        ("auto", replace(FULL, cluster="Ray cluster"), "ray", "4 ranks, 2 devices on this host, which is in a Ray"),
        ("auto", replace(MEMBER, tp_size=1, pp_size=1, num_devices=0), "ray", "1 rank, no devices on this host"),
        ("auto", replace(ALONE, cluster="placement group"), "ray", "this is a job of Ray, in a placement group"),
        ("auto", replace(ALONE, has_hosts=True), "ssh", "--hosts"),
        ("auto", replace(MEMBER, has_hosts=True), "ssh", "--hosts"),
        ("ssh", replace(ALONE, has_hosts=True), "ssh", "asked for"),
        ("ray", ALONE, "ray", "asked for"),
        ("mp", replace(ALONE, tp_size=1), "mp", "asked for"),
        ("mp", replace(ALONE, cluster="placement group"), "mp", "asked for"),
        ("mp", replace(CPUS, num_devices=0), "mp", "asked for"),
    ],
)  # fmt: skip
def test_rule(asked: Asked, around: Surroundings, backend: str, why: str) -> None:
    choice = choose_backend(asked, around)
    assert choice.backend == backend
    assert choice.why.startswith(why)


@pytest.mark.parametrize("asked", ["auto", "mp"])
def test_too_few_devices(asked: Asked) -> None:
    with pytest.raises(PlacementError) as refused:
        choose_backend(asked, FULL)
    assert refused.value.message.startswith(
        "World size (4) is larger than the number of available GPUs (2) in this node"
    )
    assert "2 more than there are" in refused.value.message
    assert refused.value.hint is not None
    for remedy in ("-tp 2", "--device cpu", "--hosts HOST:2", "aphro cluster up", "aphro cluster join"):
        assert remedy in refused.value.hint


@pytest.mark.parametrize(
    ("asked", "around", "words"),
    [
        ("mp", replace(ALONE, has_hosts=True), "--hosts with the mp backend"),
        ("ray", replace(ALONE, has_hosts=True), "--hosts with the ray backend"),
        ("ssh", ALONE, "needs to know the hosts"),
    ],
)
def test_contradictions(asked: Asked, around: Surroundings, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        choose_backend(asked, around)
