"""Noted calls, made again: over other numbers in the same memory, by one thread and by several."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from aphro_kernels import cpu_program
from aphro_kernels.cpu_program import Recording
from aphro_kernels.cpu_rms_norm import CpuRMSNorm
from torch import Tensor

WIDTH = 96


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def norms(count: int) -> list[CpuRMSNorm]:
    source = torch.Generator().manual_seed(count)
    return [CpuRMSNorm(torch.rand(WIDTH, generator=source) + 0.5, 1e-5) for _ in range(count)]


def chain(parts: list[CpuRMSNorm], x: Tensor) -> Tensor:
    """Each reads what the one before has written, and the residual stream."""
    y = parts[0](x)
    for part in parts[1:]:
        y = part.add_(x, y)
    return y


def test_calls_are_made_again_in_their_order(threads: int) -> None:
    parts, x = norms(20), torch.randn(40, WIDTH).bfloat16()
    with Recording() as recording:
        y = chain(parts, x)
    assert not recording.foreign
    program = recording.program()
    for seed in range(5):
        fresh = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(seed)).bfloat16()
        x.copy_(fresh)
        program()
        assert torch.equal(y, chain(parts, fresh))
        assert torch.equal(x, fresh)  # the residual stream, too


def test_torch_does_not_import_its_compiler_to_note_calls() -> None:
    dispatch = cpu_program._ForeignOperations.__torch_dispatch__
    assert not hasattr(dispatch, "__wrapped__"), "torch wraps it in what imports torch._dynamo at the first call"


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    with Recording() as recording:
        first = recording.empty(640)
        address, view = first.data_ptr(), first.view(2, 320)[1]
        del first
        second = recording.empty(640)
        assert second.data_ptr() != address  # a view of it is held
        del view
        assert recording.empty(640).data_ptr() == address
        assert address % 64 == 0


@pytest.mark.parametrize("operation", [lambda x: x.mul_(2), lambda x: x[:, :5].contiguous(), lambda x: x.T.flatten()])
@torch.inference_mode()
def test_what_torch_does_meanwhile_is_noticed(operation: Callable[[Tensor], Tensor]) -> None:
    (norm,), x = norms(1), torch.randn(4, WIDTH).bfloat16()
    with Recording() as recording:
        norm(x.view(2, 2, WIDTH)[1].contiguous().flatten().view(2, WIDTH))  # all of them views
        assert not recording.foreign
        operation(norm(x))
    assert recording.foreign
    with pytest.raises(AssertionError):
        recording.program()
