"""What belongs to a member is found by session or mark, and ended; nothing else is."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from aphro_core.cluster.membership import Membership, process_start, with_process
from aphro_core.cluster.processes import end_processes, processes_of
from tests.core.cluster.test_membership import HERE

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
# a leader of a session that has started one process there, and ends when its input does
LEADER = [
    sys.executable,
    "-c",
    "import subprocess, sys; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True); input()",
]


def leader() -> tuple[subprocess.Popen[str], Membership, int]:
    process = subprocess.Popen(
        [*LEADER, *SLEEP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    return process, with_process(replace(HERE, id="5e55"), process.pid), child


def test_session_and_mark_and_no_others() -> None:
    process, member, child = leader()
    marked = subprocess.Popen(SLEEP, env={"APHRO_CLUSTER_NODE": "5e55"}, start_new_session=True)
    stranger = subprocess.Popen(SLEEP, env={"APHRO_CLUSTER_NODE": "another"}, start_new_session=True)
    try:
        while b"APHRO" not in Path(f"/proc/{marked.pid}/environ").read_bytes():
            time.sleep(0.01)  # it is still our own image
        assert sorted(processes_of(member)) == sorted([child, marked.pid])
        assert end_processes(member) == []
        assert marked.wait(5) == -9
        assert process.poll() is None
        assert stranger.poll() is None
        assert processes_of(member) == []
    finally:
        for each in (process, marked, stranger):
            each.kill()
            each.wait()


def test_also_after_the_member_was_killed() -> None:
    process, member, child = leader()
    process.kill()
    process.wait()
    assert processes_of(member) == [child]
    assert processes_of(replace(member, boot_id="before the reboot")) == []
    assert end_processes(member) == []
    assert process_start(child) == 0


def test_a_session_of_another_process_with_the_same_number_is_not_ours() -> None:
    process, member, child = leader()
    try:
        assert processes_of(replace(member, pid_started=member.pid_started + 1)) == []
    finally:
        end_processes(member)
        process.kill()
        process.wait()
    assert process_start(child) == 0
