"""Asking the cluster: the head for all nodes, each node for itself, from any host that is in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from aphro_core.channel import ChannelClosedError
from aphro_core.cluster.membership import Membership, read_membership, read_record
from aphro_core.cluster.messages import (
    AskEnvironment,
    AskLog,
    AskPorts,
    AskStatus,
    Environment,
    LogLines,
    Node,
    Ports,
    Refused,
    Request,
    Status,
)
from aphro_core.cluster.wire import NoMemberError, ask, connect
from aphro_core.errors import ClusterError

AnswerType = TypeVar("AnswerType")


def membership() -> Membership:
    """Of this host. Raises ClusterError where it is in no cluster."""
    found = read_membership()
    if found is not None:
        return found
    if read_record() is not None:
        raise ClusterError(
            "this host's member was killed, and its node is no longer in the cluster",
            hint="aphro cluster down cleans up here; then join again",
        )
    raise ClusterError("this host is in no cluster", hint="aphro cluster up, or aphro cluster join --head IP")


def token_of(here: Membership) -> str:
    try:
        return Path(here.token_path).read_text()
    except OSError as error:
        raise ClusterError(f"{here.token_path}: {error.strerror}", hint="aphro cluster down, then join again") from None


def read_status(here: Membership) -> Status:
    """Asked of the head, from any node."""
    try:
        return ask_for(here, here.head[0], AskStatus(), Status)
    except NoMemberError as error:
        raise ClusterError(
            f"the head does not answer: {error.message}",
            hint="if it is gone for good: aphro cluster down here, and `up` on another host",
        ) from None


def read_environment(here: Membership, node: Node) -> Environment:
    """One node's own answer. Raises ClusterError."""
    return ask_for(here, node.address, AskEnvironment(), Environment)


def read_ports(here: Membership, node: Node) -> Ports:
    """One node's own answer. Raises ClusterError."""
    return ask_for(here, node.address, AskPorts(), Ports)


def follow_log(here: Membership, node: Node, request: AskLog) -> Iterator[Sequence[str]]:
    """The lines of a node's log, in parts; with ``follow`` until the node is gone. Raises ClusterError."""
    channel = connect(node.address, here.control_port, token_of(here))
    try:
        channel.send(request)
        channel.set_timeout(None if request.follow else 10.0)
        while True:
            match channel.receive():
                case LogLines(lines=lines, is_last=is_last):
                    yield lines
                    if is_last:
                        return
                case Refused(message=message):
                    raise ClusterError(message)
    except ChannelClosedError:
        raise ClusterError(f"{node.name} ({node.address}) is gone") from None
    finally:
        channel.close()


def ask_for(
    here: Membership, address: str, request: Request, kind: type[AnswerType], *, timeout: float = 10.0
) -> AnswerType:
    """An answer of that kind. Raises ClusterError for any other, refusals included."""
    answer = ask(address, here.control_port, token_of(here), request, timeout=timeout)
    if isinstance(answer, kind):
        return answer
    refusal = answer if isinstance(answer, Refused) else Refused(f"{address} answers {answer}")
    raise ClusterError(refusal.message, hint=refusal.hint or None)
