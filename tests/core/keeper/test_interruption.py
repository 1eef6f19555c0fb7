"""A signal within the block becomes an error with the phase; outside of it nothing has changed."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from aphro_core.errors import ExitCode, StartInterruptedError
from aphro_core.keeper.interruption import interruptible


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.TERMINATED)]
)
@pytest.mark.parametrize("is_in_loop", [False, True])
def test_a_signal_ends_the_block_with_its_phase(number: signal.Signals, code: ExitCode, is_in_loop: bool) -> None:
    async def in_loop() -> None:
        signal.raise_signal(number)
        await asyncio.sleep(5)

    def wait() -> None:
        signal.raise_signal(number)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    expected = pytest.raises(StartInterruptedError, match=f"{number.name}.*interrupted: files were read")
    with expected as raised, interruptible("files were read"):
        asyncio.run(in_loop()) if is_in_loop else wait()
    assert raised.value.exit_code == code == 128 + number
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_the_block_itself_decides_stays() -> None:
    """As a keeper that ends: further signals change nothing, not even its exit code."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with interruptible("files were read"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_who_ignores_it_goes_on() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with interruptible("files were read"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
