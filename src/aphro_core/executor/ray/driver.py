"""The process between engine and Ray: ``python -m aphro_core.executor.ray.driver``, lines of JSON on its stdio.

A process of its own, so that nothing of Ray (threads, pickles, signal handlers) is in the engine, and its end is the
end of the Ray job: when its input closes, or it dies in any way, Ray ends the agents, and the ranks end with them.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import msgspec
import ray
import ray._private.state
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from aphro_core.checkpoint.digests import DigestProgress
from aphro_core.executor.ray.agent import Agent
from aphro_core.executor.ray.protocol import (
    AgentPlace,
    AgentReport,
    Agents,
    Cluster,
    Connect,
    DigestFiles,
    FilesDigested,
    FromDriver,
    KillRank,
    Look,
    Offer,
    OpenAgents,
    RankEnded,
    RankStart,
    RayNode,
    Refused,
    Resource,
    StartRanks,
    ToDriver,
)
from aphro_core.lifeline import exit_on_hangup, name_process

_RESOURCES: Final[tuple[Resource, ...]] = ("GPU", "aphro_slot", "CPU")
_UNEXPECTED: Final = 2  # Ray's DeathReason of a node that was not taken away by somebody
_GCS_SECONDS: Final = 5.0
_PROBE_SECONDS: Final = 1.5  # the kernel asks again after one: a lost packet is no dead host
_SILENT_SECONDS: Final = 6.0  # a node that has not answered is not asked again for so long
_GRACE_SECONDS: Final = 1.0  # to end the agents before this process ends and Ray does it
_MAX_WORDS: Final = 600


class Driver:
    """Answers one request at a time; ends of ranks are told by a thread of their own."""

    def __init__(self, send: Callable[[FromDriver], None]) -> None:
        self._send = send
        self._group: PlacementGroup | None = None
        self._agents: list[Any] = []
        self._agent_of: dict[int, Any] = {}  # by rank
        self._silent_since: dict[str, float] = {}  # by node id

    def take(self, request: ToDriver) -> None:
        match request:
            case Connect():
                self._connect(request)
            case Look():
                self._send(self._look())
            case OpenAgents():
                self._send(self._open_agents(request))
            case DigestFiles():
                threading.Thread(target=self._digest, args=(request,), name="digests", daemon=True).start()
            case StartRanks(ranks=ranks):
                self._start_ranks(ranks)
            case KillRank(rank=rank):
                self._agent_of[rank].kill_rank.remote(rank)

    def close(self) -> None:
        for agent in self._agents:
            ray.kill(agent)

    def _connect(self, request: Connect) -> None:
        host, colon, port = request.address.rpartition(":")
        if colon and port.isdigit():  # Ray itself would try for half a minute
            socket.create_connection((host.strip("[]"), int(port)), _GCS_SECONDS).close()
        ray.init(
            address=request.address,
            _node_ip_address=request.node_address or None,
            namespace="aphro",
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=False,
        )
        if request.placement_group:
            self._group = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(request.placement_group)))

    def _look(self) -> Cluster:
        nodes = _nodes()
        own = ray.get_runtime_context().get_node_id()
        nodes.sort(key=lambda node: (node["NodeID"] != own, _sort_key(node["NodeManagerAddress"])))
        offers = self._bundle_offers() if self._group is not None else _node_offers(nodes)
        with ThreadPoolExecutor(max_workers=max(1, len(nodes))) as pool:
            reachable = list(pool.map(self._is_reachable, nodes))
        found = [
            RayNode(
                id=node["NodeID"],
                hostname=node["NodeManagerHostname"],
                address=node["NodeManagerAddress"],
                reachable=is_reachable,
                offers=offers.get(node["NodeID"], []),
            )
            for node, is_reachable in zip(nodes, reachable, strict=True)
        ]
        return Cluster(ray.util.get_node_ip_address(), found)

    def _is_reachable(self, node: dict[str, Any]) -> bool:
        if not node["Alive"] or time.monotonic() - self._silent_since.get(node["NodeID"], -math.inf) < _SILENT_SECONDS:
            return False
        try:
            socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _PROBE_SECONDS).close()
        except ConnectionRefusedError:
            return False
        except OSError:
            self._silent_since[node["NodeID"]] = time.monotonic()
            return False
        return True

    def _bundle_offers(self) -> dict[str, list[Offer]]:
        """What the placement group has reserved, by node: nothing else may be used."""
        table = placement_group_table(self._group)
        if table["state"] != "CREATED":
            raise RuntimeError(f"the placement group is {table['state']}: its resources are not reserved")
        offers: dict[str, list[Offer]] = {}
        for index, resources in table["bundles"].items():
            total = _counts(resources)
            offers.setdefault(table["bundles_to_node_id"][index], []).append(Offer(total, total, int(index)))
        return offers

    def _open_agents(self, request: OpenAgents) -> Agents:
        self.close()
        self._agents = [self._open_agent(place) for place in request.places]
        answers = [agent.report.remote(request.model_path) for agent in self._agents]
        ray.wait(answers, num_returns=len(answers), timeout=request.timeout_seconds)
        reports: list[AgentReport | None] = []
        failures: list[str] = []
        for answer in answers:
            try:
                reports.append(msgspec.json.decode(ray.get(answer, timeout=0), type=AgentReport))
                failures.append("")
            except ray.exceptions.GetTimeoutError:
                reports.append(None)
                failures.append(f"has not started an agent of ours within {request.timeout_seconds:g} s")
            except ray.exceptions.RayError as error:
                reports.append(None)
                failures.append(f"cannot run an agent of ours: {_words(error)}")
        return Agents(reports, failures)

    def _open_agent(self, place: AgentPlace) -> Any:
        strategy = (
            NodeAffinitySchedulingStrategy(node_id=place.node, soft=False)
            if self._group is None
            else PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=place.bundle)
        )
        share: dict[str, Any] = {"num_cpus": 0}
        match place.resource:
            case "GPU":
                share["num_gpus"] = place.num_ranks
            case "CPU":
                share["num_cpus"] = place.num_ranks
            case custom:
                share["resources"] = {custom: place.num_ranks}
        options = {"max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": strategy, **share}
        return ray.remote(Agent).options(**options).remote()

    def _digest(self, request: DigestFiles) -> None:
        try:
            for said in self._agents[request.agent].digest_files.remote(request.model_path):
                self._send(FilesDigested(request.agent, msgspec.json.decode(ray.get(said), type=DigestProgress)))
        except ray.exceptions.RayError as error:
            self._send(FilesDigested(request.agent, DigestProgress(0, 0), _words(error)))

    def _start_ranks(self, ranks: list[RankStart]) -> None:
        running = {}
        for start in ranks:
            agent = self._agents[start.agent]
            self._agent_of[start.rank] = agent
            running[agent.run_rank.remote(msgspec.json.encode(start))] = start.rank
        threading.Thread(target=self._tell_ends, args=(running,), name="ends", daemon=True).start()

    def _tell_ends(self, running: dict[Any, int]) -> None:
        while running:
            (ended, *_), _ = ray.wait(list(running), num_returns=1)
            rank = running.pop(ended)
            try:
                self._send(msgspec.json.decode(ray.get(ended), type=RankEnded))
            except ray.exceptions.RayError as error:  # its agent, and it, are gone
                self._send(RankEnded(rank, None, _words(error)))


def _nodes() -> list[dict[str, Any]]:
    """The live ones, and those that died under it and have not come back: they are missed, where one is missing."""
    found = ray.nodes()
    alive = [node for node in found if node["Alive"]]
    addresses = {node["NodeManagerAddress"] for node in alive}
    died = {
        node["NodeManagerAddress"]: node
        for node in found
        if node["DeathReason"] == _UNEXPECTED and node["NodeManagerAddress"] not in addresses
    }
    return alive + list(died.values())


def _node_offers(nodes: list[dict[str, Any]]) -> dict[str, list[Offer]]:
    available = ray._private.state.available_resources_per_node()  # of Ray's API only the sum over nodes is public
    return {
        node["NodeID"]: [Offer(_counts(node["Resources"]), _counts(available.get(node["NodeID"], {})))]
        for node in nodes
    }


def _counts(resources: dict[str, float]) -> dict[Resource, int]:
    return {name: int(resources[name]) for name in _RESOURCES if resources.get(name)}


def _sort_key(address: str) -> tuple[int, bytes]:
    try:
        return (0, socket.inet_aton(address))
    except OSError:
        return (1, address.encode())


def _words(error: BaseException) -> str:
    """Ray's reason without its decoration and its guesses: the last line that says something."""
    text = str(error).partition(" Some common causes include")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:_MAX_WORDS]


def main() -> None:
    name_process("aphro-ray")
    out, lock = os.dup(1), threading.Lock()
    os.dup2(2, 1)  # whatever libraries print is no line of ours

    def send(message: FromDriver) -> None:
        data = msgspec.json.encode(message) + b"\n"
        with lock:
            while data:
                data = data[os.write(out, data) :]

    exit_on_hangup(0, _GRACE_SECONDS)
    driver = Driver(send)
    requests = msgspec.json.Decoder(ToDriver)
    try:
        for line in sys.stdin.buffer:
            driver.take(requests.decode(line))
        driver.close()
    except Exception as error:
        send(Refused(_words(error), ""))
    os._exit(0)  # at once: Ray's own farewell may wait for a head that is gone


if __name__ == "__main__":
    main()
