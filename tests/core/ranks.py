"""Functions run as the ranks of a group, in processes of their own that meet over Gloo."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from aphro_core.distributed.links import Links, join
from aphro_core.parallel.shard import ShardingPlan


def run_ranks(
    tmp_path: Path,
    plan: ShardingPlan,
    body: Callable[[Links, int], Any],
    timeout_seconds: float = 30.0,
    answer_seconds: float = 60.0,
) -> list[Any]:
    """``body(links, rank)`` as every rank of ``plan``; what each returned, in rank order."""
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in plan.ranks]
    store = str(tmp_path / "store")
    processes = [
        context.Process(target=_enter, args=(send, store, plan, rank, body, timeout_seconds), daemon=True)
        for rank, (_, send) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        answers = [receive.recv() if receive.poll(answer_seconds) else "no answer" for receive, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    for answer in answers:
        assert not isinstance(answer, str), answer
    return answers


def _enter(
    send: Connection,
    store: str,
    plan: ShardingPlan,
    rank: int,
    body: Callable[[Links, int], Any],
    timeout_seconds: float,
) -> None:
    torch.set_num_threads(1)  # a forked process has none of its parent's OpenMP threads, and would wait for them
    try:
        size = plan.tp_size * plan.pp_size
        links = join(plan, rank, lambda: FileStore(store, size), torch.device("cpu"), timeout_seconds)
        send.send(body(links, rank))
    except BaseException:
        send.send(traceback.format_exc())
    time.sleep(60)  # others may still need this end of their sockets; the parent ends all
