"""How long ago a process began."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from aphro_core.host import process_age


def test_age_counts_from_the_process_begin() -> None:
    before = time.monotonic()
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as process:
        begun = time.monotonic()
        time.sleep(0.1)
        age, now = process_age(process.pid), time.monotonic()
        assert now - begun - 0.03 <= age <= now - before + 0.03
        process.kill()
    assert process_age(os.getpid()) > age


def test_of_a_process_that_is_none_it_is_nothing() -> None:
    assert process_age(2**30) == 0.0
