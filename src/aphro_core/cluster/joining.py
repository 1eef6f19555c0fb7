"""Before a host joins: the head is waited for, versions are compared, and both directions are tried on each port."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from aphro_core.cluster.address import own_addresses
from aphro_core.cluster.messages import Done, Greeting, Hello, Node, Reach, Refused
from aphro_core.cluster.plan import Plan
from aphro_core.cluster.ports import Layout
from aphro_core.cluster.versions import compare
from aphro_core.cluster.wire import NoMemberError, WrongTokenError, ask, connect
from aphro_core.errors import ClusterError
from aphro_core.interfaces import way_to

_RETRY_SECONDS: Final = 1.0
_SAY_SECONDS: Final = 10.0
_CONNECT_SECONDS: Final = 3.0
Say = Callable[[str, bool], None]  # text, whether it is a warning


def wait_for_head(plan: Plan, node: Node, say: Say) -> Greeting:
    """Ask the head to be let in, until it is up or the time is over. Raises ClusterError; WrongTokenError at once."""
    control = Layout(plan.head_port).control
    deadline = time.monotonic() + plan.wait_seconds
    told, said_at = "", 0.0
    while True:
        try:
            answer = ask(plan.head, control, plan.token, Hello(node))
            break
        except WrongTokenError:
            raise ClusterError(
                f"the head {plan.head} refuses the token: it is not that of its cluster",
                hint="the token of this `up`: run `aphro cluster up` on the head again, it prints the join command",
            ) from None
        except NoMemberError as error:
            left = deadline - time.monotonic()
            if left <= 0:
                raise _not_there(plan, error) from None
            if error.message != told or time.monotonic() - said_at > _SAY_SECONDS:
                say(f"waiting for the head, {left:.0f} s left: {error.message}", False)
                told, said_at = error.message, time.monotonic()
            time.sleep(min(_RETRY_SECONDS, left))
    if not isinstance(answer, Greeting):
        refusal = answer if isinstance(answer, Refused) else Refused(str(answer))
        raise ClusterError(f"the head {plan.head} refuses: {refusal.message}", hint=refusal.hint or None)
    return answer


def check_versions(plan: Plan, node: Node, head: Node, say: Say) -> None:
    """Raises ClusterError naming every fatal difference, with both values; the harmless are warnings."""
    both = node.resource == head.resource == "GPU"
    differences = compare(node.versions, head.versions, both_have_gpus=both)
    fatal = [each for each in differences if each.is_fatal]
    for each in differences:
        if plan.allow_skew or not each.is_fatal:
            say(f"{each}: allowed{' by --allow-skew' if each.is_fatal else ''}", True)
    if fatal and not plan.allow_skew:
        remedies = dict.fromkeys(each.remedy for each in fatal)
        raise ClusterError(
            f"different versions: {'; '.join(map(str, fatal))}", hint=f"on this host: {', and '.join(remedies)}"
        )


def check_ways(plan: Plan, greeting: Greeting) -> None:
    """From here to Ray's port of the head, and from the head to our door.

    Raises ClusterError naming both ends and the line that opens the way.
    """
    layout = Layout(plan.head_port)
    try:
        socket.create_connection((plan.head, layout.head), _CONNECT_SECONDS).close()
    except OSError as error:
        words = "no answer" if isinstance(error, TimeoutError) else error.strerror
        raise ClusterError(
            f"this host cannot reach Ray on the head: {plan.head} port {layout.head}: {words}",
            hint=f"on the head: {allow(plan.address, layout)}",
        ) from None
    ask_head_to_reach(plan, greeting.head, layout.control)


def ask_head_to_reach(plan: Plan, head: Node, port: int) -> None:
    """Raises ClusterError where the head gets no connection to this host."""
    answer = ask(plan.head, Layout(plan.head_port).control, plan.token, Reach(plan.address, port))
    if isinstance(answer, Done) and answer.problems:
        why = next(iter(answer.problems.values()))
        hint = f"on this host: {allow(plan.head, Layout(plan.head_port))}"
        with suppress(OSError):
            way = way_to(plan.head)
            if way.address != plan.address:
                interface = way.interface or own_addresses().get(way.address)
                hint = f"--interface {interface}: the route to the head leaves there"
        raise ClusterError(
            f"the head {head.name} cannot reach this host at {plan.address} ({plan.interface}), port {port}: {why}",
            hint=hint,
        )


def reach(address: str, port: int, token: str, *, is_door: bool) -> Done:
    """On the head: try the way to a host that joins. At its door it must prove itself, Ray's ports only accept."""
    try:
        if is_door:
            connect(address, port, token).close()
        else:
            socket.create_connection((address, port), _CONNECT_SECONDS).close()
    except ClusterError as error:
        return Done({address: error.message.partition(": ")[2] or error.message})
    except OSError as error:
        return Done({address: "no answer in time" if isinstance(error, TimeoutError) else error.strerror or str(error)})
    return Done()


def allow(peer: str, layout: Layout) -> str:
    """The firewall's line that lets a peer in, collectives included: those get their ports from the kernel's range."""
    return f"sudo ufw allow proto tcp from {peer} to any port {layout.head}:{layout.workers[1]},32768:60999"


def _not_there(plan: Plan, error: NoMemberError) -> ClusterError:
    layout = Layout(plan.head_port)
    hint = "on the head: aphro cluster up, then the line that it prints"
    if "no answer" in error.message:
        hint = f"the head's address and firewall; on the head: {allow(plan.address, layout)}"
    return ClusterError(f"no head after {plan.wait_seconds:g} s: {error.message}", hint=hint)
