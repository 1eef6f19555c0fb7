"""Versions are compared before a host joins: what is fatal, what is not, and what to type."""

from __future__ import annotations

import sys
from importlib import metadata

import pytest

from aphro_core.cluster.joining import check_versions
from aphro_core.cluster.messages import Node
from aphro_core.cluster.plan import Plan
from aphro_core.cluster.versions import compare, installed_versions
from aphro_core.errors import ClusterError

HEAD = {"Python": "3.11.7", "aphro": "0.1.0", "torch": "2.13.0+cu130", "ray": "2.60.0", "CUDA": "13.0",
        "NCCL": "2.28.3", "driver": "580.1"}  # fmt: skip


def node(**versions: str) -> Node:
    return Node(id="a", name="b", role="member", address="10.0.0.2", interface="eth0", devices=1, resource="GPU",
                device_names=[], versions={**HEAD, **versions}, started_at=0.0)  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "both_have_gpus", "fatal"),
    [
        ({}, True, None),
        ({"Python": "3.11.9"}, True, False),
        ({"Python": "3.12.7"}, True, True),
        ({"aphro": "0.2.0"}, False, True),
        ({"torch": "2.13.0+cpu"}, False, False),
        ({"torch": "2.13.0+cpu"}, True, True),
        ({"torch": "2.12.0+cpu"}, False, True),
        ({"ray": "2.59.0"}, False, True),
        ({"NCCL": "2.27.0"}, True, True),
        ({"NCCL": "2.27.0"}, False, None),
        ({"driver": "570.1"}, True, False),
    ],
)
def test_what_is_fatal(changed: dict[str, str], both_have_gpus: bool, fatal: bool | None) -> None:
    found = compare({**HEAD, **changed}, HEAD, both_have_gpus=both_have_gpus)
    assert [each.is_fatal for each in found] == ([] if fatal is None else [fatal])


def test_both_values_and_what_to_type() -> None:
    here = {name: version for name, version in HEAD.items() if name != "ray"} | {"Python": "3.11.9", "aphro": "9"}
    found = compare(here, HEAD, both_have_gpus=False)
    assert [str(each) for each in found] == [
        "aphro 9 here, 0.1.0 on the head",
        "ray not there here, 2.60.0 on the head",
        "Python 3.11.9 here, 3.11.7 on the head",
    ]  # fmt: skip
    assert [each.remedy for each in found[:2]] == ["pip install aphro==0.1.0", "pip install ray==2.60.0"]


def plan(*, allow_skew: bool) -> Plan:
    return Plan(role="member", head="10.0.0.1", head_port=22420, address="10.0.0.2", interface="eth0", token="t" * 32,
                devices=1, resource="GPU", device_names=[], environment={}, allow_skew=allow_skew)  # fmt: skip


def test_a_fatal_difference_refuses_unless_allowed() -> None:
    said: list[str] = []

    def say(text: str, is_warning: bool) -> None:
        said.append(text)

    with pytest.raises(ClusterError, match=r"different versions: aphro 9 here, 0\.1\.0 on") as refused:
        check_versions(
            plan(allow_skew=False), node(aphro="9", driver="570.1"), node(), lambda text, _: said.append(text)
        )
    assert refused.value.hint == "on this host: pip install aphro==0.1.0"
    check_versions(plan(allow_skew=True), node(aphro="9"), node(), say)
    assert said == [
        "driver 570.1 here, 580.1 on the head: allowed", "aphro 9 here, 0.1.0 on the head: allowed by --allow-skew"
    ]  # fmt: skip


def test_versions_of_this_host() -> None:
    found = installed_versions()
    assert found["Python"] == ".".join(map(str, sys.version_info[:3]))
    assert {name: found[name] for name in ("aphro", "torch")} == {
        name: metadata.version(name) for name in ("aphro", "torch")
    }
