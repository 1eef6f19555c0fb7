"""Tell the cluster which model runs: `aphro cluster status` shows it as long as whoever serves it lives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from aphro_core.channel import ChannelClosedError
from aphro_core.cluster.asking import token_of
from aphro_core.cluster.membership import Membership
from aphro_core.cluster.messages import Announce, Done, Model
from aphro_core.cluster.wire import connect
from aphro_core.errors import ClusterError


@contextmanager
def announced(here: Membership, model: Model) -> Iterator[None]:
    """The model is listed until the block is left, or this process ends, however it ends: a connection is held.

    Raises ClusterError where the head does not answer; what happens to the head later changes nothing here.
    """
    channel = connect(here.head[0], here.control_port, token_of(here))
    try:
        channel.send(Announce(model))
        if not isinstance(channel.receive(), Done):
            raise ClusterError(f"{here.head_address} does not take announcements", hint="aphro cluster status")
        yield
    except ChannelClosedError:
        raise ClusterError(f"the head {here.head_address} is gone", hint="aphro cluster status") from None
    finally:
        channel.close()
