"""What tensor parallel between hosts costs each token, from what the ranks measured while they met."""

from __future__ import annotations

from collections.abc import Sequence

from aphro_core.messages.steps import WorkerLoaded
from aphro_core.parallel.shard import ShardingPlan


def tensor_link_warning(plan: ShardingPlan, ranks: Sequence[WorkerLoaded]) -> str:
    """A line for the operator, "" where no tensor-parallel group spans hosts.

    Each layer sums twice, and each sum is as slow as the slowest rank of its stage saw it.
    """
    seconds, num_sums, rate = 0.0, 0, float("inf")
    hosts: dict[str, None] = {}
    for pp_rank in range(plan.pp_size):
        group = [loaded for shard, loaded in zip(plan.ranks, ranks, strict=True) if shard.pp_rank == pp_rank]
        links = [loaded.link for loaded in group if loaded.link is not None]
        if not links or len({loaded.host for loaded in group}) == 1:
            continue
        sums = 2 * len(plan.ranks[pp_rank * plan.tp_size].layers)
        seconds += sums * max(link.sum_seconds for link in links)
        num_sums += sums
        rate = min(rate, *(link.bytes_per_second for link in links))
        hosts |= dict.fromkeys(loaded.host for loaded in group)
    if not num_sums:
        return ""
    times = "once" if len(hosts) == 2 else f"{len(hosts) - 1} times"
    return (
        f"Warning: tensor parallel spans {', '.join(hosts)}, which exchange {rate / 1e6:,.0f} MB/s: each token waits "
        f"{1e3 * seconds:.1f} ms for {num_sums} sums between them ({1e6 * seconds / num_sums:,.0f} us each, measured "
        f"now). With -tp for the devices of one host and -pp for the hosts it would wait {times}."
    )
