"""stderr that is full, closed or held: writes return at once, and raise nothing, here and in children."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

SCRIPT = """
import os, subprocess, sys
from aphro_core import stderr
stderr.never_block()
for _ in range(5000):
    print("a line that is long enough to fill a pipe at some time", file=sys.stderr)
sys.stderr.flush()
code = "from aphro_core import stderr; stderr.make_lossy(); import sys; "
code += "[sys.stderr.write('x' * 999) for _ in range(999)]"
assert subprocess.run([sys.executable, "-c", code]).returncode == 0
print("done")
"""


@pytest.mark.parametrize("reader", ["never reads", "is gone"])
def test_nobody_waits_for_a_reader(reader: str) -> None:
    read_end, write_end = os.pipe()
    if reader == "is gone":
        os.close(read_end)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], stderr=write_end, stdout=subprocess.PIPE, check=False, timeout=30
    )
    assert done.returncode == 0
    assert done.stdout == b"done\n"
    assert time.monotonic() - began < 20
    assert os.get_blocking(write_end), "the flag is on a file of its own: others share this one"
    os.close(write_end)
    if reader != "is gone":
        assert os.read(read_end, 17) == b"a line that is lo"
        os.close(read_end)
