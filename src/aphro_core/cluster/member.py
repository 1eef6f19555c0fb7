"""The member process: it holds a node's Ray in a cluster, answers for the node, and leaves nothing when it ends."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from aphro_core.cluster import joining
from aphro_core.cluster.answers import environment_of, log_lines, memory_now, ports_of
from aphro_core.cluster.headquarters import Headquarters
from aphro_core.cluster.joining import Say
from aphro_core.cluster.membership import (
    Membership,
    private_folder,
    remove_membership,
    write_membership,
)
from aphro_core.cluster.messages import (
    Announce,
    Answer,
    AskEnvironment,
    AskLog,
    AskMemory,
    AskPorts,
    AskStatus,
    Beat,
    Done,
    Down,
    Hello,
    Leaving,
    MemoryNow,
    Node,
    Reach,
    Refused,
    Request,
)
from aphro_core.cluster.plan import Plan
from aphro_core.cluster.ports import Layout
from aphro_core.cluster.processes import end_processes, name_of
from aphro_core.cluster.raylet import SlowStartError, ray_environment, start_command, start_ray
from aphro_core.cluster.registry import BEAT_SECONDS
from aphro_core.cluster.service import Service, open_door
from aphro_core.cluster.token import keep_token, token_path
from aphro_core.cluster.versions import installed_versions
from aphro_core.cluster.wire import Serving, ask
from aphro_core.errors import ClusterError
from aphro_core.listeners import holder_of

_PR_SET_CHILD_SUBREAPER: Final = 36
_TICK_SECONDS: Final = 0.5
_LEAVE_SECONDS: Final = 30.0
_VITAL: Final = ("raylet", "gcs_server")


class Member:
    """``say`` reaches the command that started this process, until the node is in; ``log`` always does the log."""

    def __init__(self, plan: Plan, membership: Membership, say: Say, log: Callable[[str], None]) -> None:
        self._plan = plan
        self._say = say
        self._log = log
        self._membership = membership
        self._layout = Layout(plan.head_port)
        self._node = Node(
            id=membership.id,
            name=socket.gethostname(),
            role=plan.role,
            address=plan.address,
            interface=plan.interface,
            devices=plan.devices,
            resource=plan.resource,
            device_names=plan.device_names,
            versions=installed_versions(),
            started_at=membership.started_at,
        )
        self._headquarters: Headquarters | None = None
        self._environment = dict(os.environ)
        self._leaving = ""  # why, once that is decided
        self._unheard = ""  # since when, and why the head does not hear us
        self._decided = threading.Event()
        self._left = threading.Event()
        self._problems: dict[str, str] = {}

    def start(self) -> None:
        """Get in, or raise AphroError: whoever called ends what was started by then."""
        self._check_ports()
        if self._plan.role == "head":
            self._start_ray()
            self._headquarters = Headquarters(
                self._node, self._plan.token, self._layout.control, self._membership.environment
            )
            self._open_door()
        else:
            self._open_door()
            self._join()
        signal.signal(signal.SIGTERM, lambda *_: self._decide("SIGTERM"))

    def _join(self) -> None:
        plan = self._plan
        greeting = joining.wait_for_head(plan, self._node, self._say)
        joining.check_versions(plan, self._node, greeting.head, self._say)
        joining.check_ways(plan, greeting)
        self._say(f"{greeting.head.name} ({plan.head}) and this host ({plan.address}) reach each other", False)
        environment = {**greeting.environment, **plan.environment}
        self._membership = replace(self._membership, environment=environment)
        self._start_ray()
        for port in (self._layout.node_manager, self._layout.object_manager):
            joining.ask_head_to_reach(plan, greeting.head, port)
        self._tell_head(Beat(self._node))

    def _check_ports(self) -> None:
        layout = self._layout
        ports = [layout.control, layout.node_manager, layout.object_manager, layout.runtime_env]
        for port in [layout.head, *ports] if self._plan.role == "head" else ports:
            try:
                open_door(self._plan.address, port).close()
            except OSError as error:
                who = holder_of(port)
                raise ClusterError(
                    f"port {port} of {self._plan.address}: {error.strerror}{f', by {who}' if who else ''}",
                    hint="end that process, or take other ports for the whole cluster: aphro cluster up --port 23420",
                ) from None

    def _open_door(self) -> None:
        Service(open_door(self._plan.address, self._layout.control), self._plan.token, self.respond).start()

    def _start_ray(self) -> None:
        self._say("starting Ray", False)
        keep_token(self._plan.token)
        private_folder(Path(self._membership.temp_dir))
        write_membership(self._membership)  # from here on `down` knows what there is to end
        self._environment = ray_environment(self._membership, os.environ)
        command = start_command(self._membership, self._layout, name=self._node.name, dashboard=self._plan.dashboard)
        log = Path(self._membership.log_dir) / "ray.log"
        try:
            start_ray(command, self._environment, log)
        except SlowStartError as error:
            self._say(f"{error.message}; once more", True)
            end_processes(self._membership)
            _reap()  # else their end would be taken for the end of what is started now
            start_ray(command, self._environment, log)

    # ---- while it is in

    def run(self) -> None:
        """Until somebody asks this node to end, or Ray's own processes do."""
        if self._headquarters is None:
            threading.Thread(target=self._beat, name="heart", daemon=True).start()
        while not self._leaving:
            for name, how in _reap():
                if name in _VITAL:
                    self._decide(self._unheard or f"{name} ended: {how}")
            self._decided.wait(_TICK_SECONDS)
        self.leave()

    def _decide(self, reason: str) -> None:
        """To leave; the first reason is the one."""
        self._leaving = self._leaving or reason
        self._decided.set()

    def leave(self) -> None:
        """Nothing of this node is left after it: processes, files, ports."""
        self._log(f"leaving: {self._leaving}")
        if self._headquarters is not None:
            self._problems |= self._headquarters.end_members(f"the cluster ends on {self._node.name}: {self._leaving}")
        else:
            with suppress(ClusterError):
                self._tell_head(Leaving(self._node.id, self._leaving))
        remaining = end_processes(self._membership)
        if remaining:
            self._problems[self._node.name] = f"these do not end: {', '.join(map(str, remaining))}"
        clean_files(self._membership)
        self._left.set()
        time.sleep(_TICK_SECONDS)  # who asked for it gets the answer

    def respond(self, request: Request, channel: Serving) -> Answer | None:
        match request:
            case AskMemory():
                return MemoryNow(self._node.id, memory_now())
            case AskEnvironment():
                return environment_of(self._environment, self._membership.environment, self._plan.token)
            case AskPorts():
                return ports_of(self._membership)
            case AskLog():
                return self._send_log(request, channel)
            case Down(reason=reason):
                self._decide(reason)
                self._left.wait(_LEAVE_SECONDS)
                return Done(self._problems)
        return self._respond_as_head(request, channel)

    def _respond_as_head(self, request: Request, channel: Serving) -> Answer | None:
        if self._headquarters is None:
            return Refused(f"{self._node.name} ({self._plan.address}) is not the head", f"--head {self._plan.head}")
        match request:
            case Hello():
                return self._headquarters.greet(request)
            case Reach(address=address, port=port):
                return joining.reach(address, port, self._plan.token, is_door=port == self._layout.control)
            case Beat() | Leaving():
                return self._headquarters.hear(request)
            case AskStatus():
                return self._headquarters.status()
            case Announce():
                self._headquarters.hold(request, channel)
        return None

    def _send_log(self, request: AskLog, channel: Serving) -> Answer | None:
        name = "member.log" if request.rank is None else f"rank-{request.rank}.log"
        try:
            for frame in log_lines(Path(self._membership.log_dir) / name, request.num_lines, request.follow):
                channel.send(frame)
        except FileNotFoundError:
            return Refused(f"{self._node.name} has no log of rank {request.rank}")
        return None

    def _beat(self) -> None:
        """The head's silence is not our end: Ray ends a node that has lost its head, a minute later."""
        while not self._leaving:
            try:
                self._tell_head(Beat(self._node))
                if self._unheard:
                    self._log("the head answers again")
                self._unheard = ""
            except ClusterError as error:
                if not self._unheard:
                    self._log(f"the head does not hear us: {error.message}")
                    self._unheard = f"the head was lost at {time.strftime('%H:%M:%S')}: {error.message}"
            time.sleep(BEAT_SECONDS)

    def _tell_head(self, message: Beat | Leaving) -> None:
        ask(self._plan.head, self._layout.control, self._plan.token, message, timeout=5.0, source=self._plan.address)


def clean_files(membership: Membership) -> None:
    """Everything a member has written but its logs: those say why it ended."""
    shutil.rmtree(membership.temp_dir, ignore_errors=True)
    token_path().unlink(missing_ok=True)
    remove_membership()


def _reap() -> list[tuple[str, str]]:
    """Name and end of each process that has ended: all of Ray's become our children when what started them is gone."""
    ended = []
    with suppress(ChildProcessError):
        while (info := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            name = name_of(info.si_pid)
            code = os.waitstatus_to_exitcode(os.waitpid(info.si_pid, 0)[1])
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            ended.append((name, how))
    return ended
