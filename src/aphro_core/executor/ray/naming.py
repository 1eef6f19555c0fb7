"""Lets `aphro cluster status` name the model that runs, and say on which nodes."""

from __future__ import annotations

import sys
from contextlib import ExitStack

from aphro_core.cluster.announce import announced
from aphro_core.cluster.membership import read_membership
from aphro_core.cluster.messages import Model
from aphro_core.config import EngineConfig
from aphro_core.errors import AphroError


def announce(stack: ExitStack, config: EngineConfig, driver: str, ranks: dict[int, str]) -> None:
    """Until ``stack`` is left, if this is an aphro cluster. ``driver`` and ``ranks``: addresses of nodes."""
    here, ray = read_membership(), config.parallel.ray
    if here is None or ray is None or here.head_address != ray.address:
        return
    try:
        stack.enter_context(announced(here, Model(config.model.served_name, ray.url, driver, ranks)))
    except AphroError as error:  # nobody's request depends on it
        print(f"`aphro cluster status` will not name this model: {error.message}", file=sys.stderr, flush=True)
