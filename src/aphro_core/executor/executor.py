"""The group of workers as the engine sees it: start, plans out, results in, the first cause of a death, stop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from anyio.abc import ObjectReceiveStream

from aphro_core.config import Backend, EngineConfig
from aphro_core.executor.multiprocess import open_multiprocess
from aphro_core.executor.ray.ray import open_ray
from aphro_core.executor.ssh import open_ssh
from aphro_core.messages.steps import StepPlan, StepResult, WorkerLoaded, WorkerProgress
from aphro_core.spawn import Spawner

OnProgress = Callable[[WorkerProgress], None]


class Executor(Protocol):
    """A started group. A death of any rank is raised as EngineDeadError out of the block that opened the group."""

    results: ObjectReceiveStream[StepResult]  # one per submitted plan, in order

    @property
    def ranks(self) -> list[WorkerLoaded]:
        """In rank order, weights loaded."""

    async def allocate(self, num_blocks: int) -> None:
        """Every rank allocates its KV cache and is ready for plans."""

    async def submit(self, plan: StepPlan) -> None:
        """Hand a plan to every rank; ranks apply plans in this order."""

    async def dump_stacks(self) -> None:
        """Every rank that can writes the stacks of its threads to stderr."""


@asynccontextmanager
async def open_executor(
    config: EngineConfig, spawner: Spawner | None, on_progress: OnProgress
) -> AsyncIterator[Executor]:
    """Start the workers of ``config.parallel`` and load the weights; leaving the block ends every one of them.

    ``spawner`` forks them; None: where no process but this one is needed.
    """
    async with _opener(config.parallel.backend)(config, spawner, on_progress) as executor:
        yield executor


def _opener(
    backend: Backend,
) -> Callable[[EngineConfig, Spawner | None, OnProgress], AbstractAsyncContextManager[Executor]]:
    if backend == "inprocess":
        from aphro_core.executor.inprocess import (
            open_inprocess,
        )  # loads torch, which the other backends do not need here

        return open_inprocess
    if backend == "ssh":
        return open_ssh
    if backend == "ray":
        return open_ray
    return open_multiprocess
