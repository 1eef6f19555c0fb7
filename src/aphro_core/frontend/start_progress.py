"""Where each rank is in its start, for whoever waits for it: a phase and how much of it is done."""

from __future__ import annotations

from prometheus_client.metrics_core import GaugeMetricFamily

from aphro_core.messages.requests import EngineProgress


class StartProgress:
    """The last word of each rank of the engine that starts, or has started."""

    def __init__(self) -> None:
        self._ranks: dict[int, EngineProgress] = {}

    def take(self, progress: EngineProgress) -> None:
        self._ranks[progress.rank] = progress

    def forget(self) -> None:
        """Another engine begins."""
        self._ranks.clear()

    def family(self, model_name: str) -> GaugeMetricFamily:
        labels = ["model_name", "rank", "phase"]
        family = GaugeMetricFamily(
            "aphro:rank_start_progress", "Share of a rank's last start phase, 1 = done.", labels=labels
        )
        for rank, progress in sorted(self._ranks.items()):
            share = progress.done / progress.total if progress.total else 0.0
            family.add_metric([model_name, str(rank), progress.phase], min(share, 1.0))
        return family
