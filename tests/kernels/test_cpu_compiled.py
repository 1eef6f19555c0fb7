"""Compiled kernels are found on disk by the next start: what they are made of has the same key in each process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from aphro_core import host

PROGRAM = """
from aphro_kernels import cpu_decode_attention, cpu_linear, cpu_packed_linear, cpu_rms_norm, cpu_rotary

made = [cpu_decode_attention._compile(1, 1, 1, 16), cpu_rms_norm._compile(), cpu_rotary._compile()]
if {has_kernels}:
    made += [cpu_linear._compile(), cpu_packed_linear._compile(0, 2, 32)]
print([function.cache_hits for function in made])
"""


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM.format(has_kernels=host.has_product_kernels())]
    found = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout
        for _ in range(2)
    ]
    first, second = (set(each.strip("[]\n").split(", ")) for each in found)
    assert (first, second) == ({"0"}, {"1"})
