"""The address that others use: by route, by hand, and never one that they cannot reach."""

from __future__ import annotations

import pytest

from aphro_core.cluster import address as module
from aphro_core.cluster.address import Chosen, check_head, choose_address, kind_of
from aphro_core.cluster.cluster import parse_head
from aphro_core.errors import UsageError
from aphro_core.interfaces import Way

OWN = {"127.0.0.1": "lo", "10.0.0.5": "eth0", "192.168.7.5": "ib0", "172.17.0.1": "docker0", "100.64.0.9": "tailscale0"}


@pytest.fixture(autouse=True)
def _host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "own_addresses", lambda: OWN)
    monkeypatch.setattr(module, "_CONTAINER_MARKS", ())
    route(monkeypatch, Way("203.0.113.1", "10.0.0.5", "eth0"))


def route(monkeypatch: pytest.MonkeyPatch, way: Way | OSError) -> None:
    def answer(peer: str) -> Way:
        if isinstance(way, OSError):
            raise way
        return way

    monkeypatch.setattr(module, "way_to", answer)


def choose(advertise: str | None = None, interface: str | None = None, peer: str | None = None) -> Chosen:
    return choose_address(advertise=advertise, interface=interface, peer=peer)


def test_the_route_decides_and_the_rest_is_named() -> None:
    assert str(choose()) == (
        "10.0.0.5 on eth0: the default route leaves there; "
        "not ib0 192.168.7.5, docker0 172.17.0.1 (a container bridge), tailscale0 100.64.0.9 (a tunnel)"
    )


def test_what_is_typed_wins() -> None:
    assert choose(interface="ib0").address == "192.168.7.5"
    assert choose(advertise="192.168.7.5").interface == "ib0"
    assert choose(advertise="100.64.0.9").interface == "tailscale0"  # a tunnel, when somebody says so


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ({"advertise": "10.0.0.6"}, "--advertise 10.0.0.6 is no address of this host"),
        ({"advertise": "10.0.0.5", "interface": "ib0"}, "is on eth0, not on --interface ib0"),
        ({"interface": "eth7"}, "--interface eth7 does not exist on this host"),
        ({"advertise": "127.0.0.1"}, "lo is loopback"),
        ({"interface": "docker0"}, "docker0 is a container bridge"),
    ],
)
def test_refusals_name_what_would_do(typed: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        choose(**typed)
    assert "eth0 10.0.0.5, ib0 192.168.7.5" in str(refused.value.hint)
    assert "docker0" not in str(refused.value.hint)


def test_a_route_into_a_container_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    route(monkeypatch, Way("172.17.0.9", "172.17.0.1", "docker0"))
    with pytest.raises(UsageError, match=r"other hosts cannot reach 172\.17\.0\.1"):
        choose(peer="172.17.0.9")


def test_without_a_route(monkeypatch: pytest.MonkeyPatch) -> None:
    route(monkeypatch, OSError(101, "Network is unreachable"))
    with pytest.raises(UsageError, match=r"no route to the head 10\.9\.9\.9: Network is unreachable"):
        choose(peer="10.9.9.9")
    with pytest.raises(UsageError, match="several networks and no default route"):
        choose()
    monkeypatch.setattr(
        module, "own_addresses", lambda: {"127.0.0.1": "lo", "10.0.0.5": "eth0", "172.17.0.1": "docker0"}
    )
    assert choose().reason == "the only network of this host"


@pytest.mark.parametrize("head", ["127.0.0.1", "10.0.0.5", "172.17.0.1", "0.0.0.0"])
def test_this_host_is_not_the_head(head: str) -> None:
    with pytest.raises(UsageError, match=f"--head {head} is this host"):
        check_head(head)
    check_head("10.0.0.1")


@pytest.mark.parametrize(
    ("interface", "kind"),
    [("eth0", ""), ("ib0", ""), ("bond0", ""), ("br-0123456789ab", "a container bridge"),
     ("veth12", "a container bridge"), ("lxdbr0", "a container bridge"), ("wg0", "a tunnel"), ("lo", "loopback")],
)  # fmt: skip
def test_kinds_of_interfaces(interface: str, kind: str) -> None:
    assert kind_of(interface) == kind


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("10.0.0.1", ("10.0.0.1", 22420)), ("10.0.0.1:6379", ("10.0.0.1", 6379)), ("[fd00::1]:7000", ("fd00::1", 7000)),
     ("fd00::1", ("fd00::1", 22420)), ("[fd00::1]", ("fd00::1", 22420))],
)  # fmt: skip
def test_head_as_typed(text: str, parsed: tuple[str, int]) -> None:
    assert parse_head(text) == parsed


def test_a_head_that_is_none() -> None:
    with pytest.raises(UsageError, match="'x' is no port"):
        parse_head("10.0.0.1:x")
    with pytest.raises(UsageError, match="--head no-such-host"):
        parse_head("no-such-host.invalid")
