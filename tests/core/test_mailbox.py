"""Ranks of one host that share a temporary folder can hand each other descriptors; those of other containers cannot."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aphro_core.distributed import mailbox
from aphro_core.distributed.links import Links
from aphro_core.distributed.mailbox import Mailbox, socket_path
from aphro_core.parallel.shard import build_plan
from tests.core.ranks import run_ranks
from tests.core.test_distributed import SPEC, meeting

_NEW_MOUNTS, _NEW_IPC, _PRIVATE = 0x00020000, 0x08000000, 0x40000 | 0x4000  # unshare and mount: MS_PRIVATE | MS_REC


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def a_container_of_its_own(folder: Path) -> None:
    """Namespaces for mounts and IPC, and another folder in the same place; the boot id stays the host's."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = str(folder).encode()
    if libc.unshare(_NEW_MOUNTS | _NEW_IPC) or libc.mount(b"none", b"/", None, _PRIVATE, None):
        raise PermissionError(ctypes.get_errno(), "unshare")
    if libc.mount(b"tmpfs", place, b"tmpfs", 0, None):
        raise PermissionError(ctypes.get_errno(), "mount")


def same_numbers(folder: Path) -> None:
    """As of processes in two namespaces of PIDs."""
    mailbox.os.getpid = lambda: 7  # type: ignore[attr-defined]


def same_numbers_in_another_folder(folder: Path) -> None:
    """As of processes in namespaces of all kinds: each finds itself where the other should be."""
    own = folder / str(os.getpid())
    own.mkdir()
    mailbox.os.getpid = lambda: 7  # type: ignore[attr-defined]
    os.environ["TMPDIR"] = str(own)


def nothing_writable(folder: Path) -> None:
    os.environ["TMPDIR"] = str(folder / "missing")


def test_neighbours_meet_and_leave_nothing(folder: Path, tmp_path: Path) -> None:
    can = run_ranks(tmp_path, build_plan(SPEC, 3, 1), lambda links, rank: meeting(links)._can_hand_over())
    assert can == [True] * 3
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "isolate", [a_container_of_its_own, same_numbers, same_numbers_in_another_folder, nothing_writable]
)
def test_a_rank_in_a_container_of_its_own_is_told_of_at_once(
    folder: Path, tmp_path: Path, isolate: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    def meet(links: Links, rank: int) -> tuple[bool | str, float, list[str], list[float]]:
        began = time.monotonic()
        if rank == 1 or "same_numbers" in isolate.__name__:
            try:
                isolate(folder)
            except PermissionError as error:
                os.environ["TMPDIR"] = f"no namespaces here: {error}"
        can = meeting(links)._can_hand_over()
        after = links.tensor.all_reduce_(torch.full((1,), rank + 1.0))
        return can, time.monotonic() - began, [record.getMessage() for record in caplog.records], after.tolist()

    answers = run_ranks(tmp_path, build_plan(SPEC, 2, 1), meet, answer_seconds=20)
    lines = [line for _, _, lines, _ in answers for line in lines]
    if any("no namespaces here" in line for line in lines):
        pytest.skip(lines[0])
    assert [can for can, *_ in answers] == [False] * 2
    assert all(seconds < 5 for _, seconds, _, _ in answers)
    assert len(lines) == 1
    assert lines[0].startswith("tensor-parallel sums all go by NCCL: ranks cannot hand each other descriptors")
    assert [after for *_, after in answers] == [[3.0]] * 2  # they are still in step


def test_what_a_dead_process_of_this_number_left_is_taken_away(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as left:
        left.bind(socket_path(os.getpid()))
        with pytest.raises(OSError, match="in use"):
            Mailbox()
    Mailbox().close()
    assert list(folder.iterdir()) == []


def test_a_path_that_torch_would_overrun_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = folder / ("d" * 100)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    with pytest.raises(OSError, match="too long"):
        Mailbox()
