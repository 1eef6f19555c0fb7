"""Which cards and which Triton the kernels for Hopper are for, and what the log says of another."""

from __future__ import annotations

import logging

import pytest
import torch
from aphro_kernels import hopper


@pytest.mark.parametrize(
    ("capability", "version", "is_ready", "num_lines"),
    [
        ((9, 0), "3.6.0", True, 0),
        ((9, 0), "3.60.1", False, 1),
        ((9, 0), "3.9.0", False, 1),
        ((8, 0), "3.9.0", False, 0),
    ],
)
def test_choice(
    capability: tuple[int, int],
    version: str,
    is_ready: bool,
    num_lines: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(hopper, "gl", object())
    monkeypatch.setattr(hopper.triton, "__version__", version)
    hopper._is_ready.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [hopper._is_ready(0) for _ in range(2)] == [is_ready] * 2
    assert len(caplog.records) == num_lines
    hopper._is_ready.cache_clear()
