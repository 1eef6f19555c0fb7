"""Steps over one layer of each kind: whatever all layers call is called, and then all of them run again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aphro_core.worker.device_runner import DeviceRunner
from tests.core.worker.test_device_runner import device_runner
from tests.tiny import write_tiny_checkpoint


class Calls(TorchDispatchMode):
    """Which operations were called on tensors of which shapes and dtypes, and how often one was."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: set[tuple[object, ...]] = set()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.kinds.add((func, *((tensor.shape, tensor.dtype) for tensor in tensors)))
        self.count += 1
        return func(*args, **(kwargs or {}))


def calls_of(runner: DeviceRunner) -> Calls:
    with Calls() as calls, torch.inference_mode():
        runner.run_every_kind()
    return calls


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # gemma3: windows in some layers
def test_few_layers_call_what_all_do(family: str, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, family, num_layers=None if family == "gemma3" else 7)
    runner = device_runner(SimpleNamespace(folder=tmp_path))
    for block in runner._padded._decoder._blocks:
        block._attention._gathered = None  # as on a GPU: it is a CPU's
    calls_of(runner)  # what is made once
    expected = calls_of(runner)
    with runner.rehearsing():
        found = calls_of(runner)
        num_layers = len(runner._padded._decoder._places)
    assert found.kinds == expected.kinds
    assert num_layers == {"llama": 3, "gemma3": 4}[family]
    assert (found.count < expected.count) == (family == "llama")
    assert calls_of(runner).count == expected.count
