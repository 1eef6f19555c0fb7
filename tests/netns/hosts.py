"""Real hosts out of namespaces: each with its own network, processes, name, /dev/shm and sshd, on one Ethernet switch.

    with hosts(2) as [node0, node1]:
        node0.run("ping", "-c1", node1.address)   # a command there
        node1.slow_link("50mbit")                 # tc tbf, both ways
        node1.drop("tcp dport 29500")             # nft, what comes in
        node1.link_down(); node1.link_up()
        node1.pause(); node1.resume(); node1.kill()

While the block lasts, the `ssh` in PATH of this process (and of what it starts) knows the hosts by their names, with a
key of its own, and the hosts know each other by name and by ssh in the same way. The file system is this host's, so
that `sys.executable` is there too. This process is on the switch as well, at ``DRIVER`` of the same network.
Nothing has a name outside, and every process dies with its parent: whatever happens, the kernel takes all of it away.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import pytest

DRIVER = 254  # the last number of this process's own address
COMMANDS = ("unshare", "setpriv", "nsenter", "ip", "tc", "nft", "ssh", "ssh-keygen", "sshd")
_START_SECONDS = 10.0
_MOST_NETWORKS = 250


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"}


def missing() -> str:
    """Why hosts cannot be made here, "" if they can."""
    absent = [name for name in COMMANDS if shutil.which(name, path=_environment()["PATH"]) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: apt-get install openssh-server nftables iproute2)"
    if os.geteuid() != 0:
        return "namespaces need root"
    tried = subprocess.run(
        [_which("unshare"), "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c",
         "mount -t sysfs sysfs /sys && ip link add veth1 type veth peer name veth2 && ip link add switch type bridge"],
        env=_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass
class NetnsHost:
    """One host. ``pid`` is its first process, as seen from outside; ``interface`` its one network card."""

    name: str
    address: str
    pid: int
    port: int = 22
    interface: str = "eth0"
    switch_pid: int = 0
    folder: Path = Path()

    def command(self, *argv: str) -> list[str]:
        """What runs ``argv`` on this host, for subprocess."""
        return [_which("nsenter"), "-t", str(self.pid), "-n", "-u", "-i", "-m", "-p", *argv]

    def run(
        self, *argv: str, check: bool = True, timeout: float = 20, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            self.command(*argv),
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **options,
        )
        assert not check or result.returncode == 0, f"{self.name}: {' '.join(argv)}: {result.stderr}"
        return result

    def popen(self, *argv: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(self.command(*argv), text=True, **options)

    def add_interface(self, name: str, address: str) -> None:
        """A card that leads nowhere, with ``address`` as A.B.C.D/LENGTH."""
        self.run("ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}-end")
        self.run("ip", "address", "add", address, "dev", name)
        self.run("ip", "link", "set", name, "up")
        self.run("ip", "link", "set", f"{name}-end", "up")

    def slow_link(self, rate: str, *, burst: str = "64kb", latency: str = "200ms") -> None:
        """No more than ``rate`` (as tc writes it) in either direction."""
        shape = ["root", "tbf", "rate", rate, "burst", burst, "latency", latency]
        self.run("tc", "qdisc", "replace", "dev", self.interface, *shape)
        _in_net(self.switch_pid, "tc", "qdisc", "replace", "dev", self.name, *shape)

    def drop(self, what: str) -> None:
        """Lose what comes in by the cable and matches ``what``, as nft writes it (``tcp dport 29500``)."""
        self.run("nft", "add table inet fault; add chain inet fault in { type filter hook input priority 0; }; "
                        f"add rule inet fault in iifname {self.interface} {what} drop")  # fmt: skip

    def clear(self) -> None:
        """Undo ``drop`` and ``slow_link``."""
        self.run("nft", "delete table inet fault", check=False)
        self.run("tc", "qdisc", "delete", "dev", self.interface, "root", check=False)
        subprocess.run(
            ["nsenter", "-t", str(self.switch_pid), "-n", "tc", "qdisc", "delete", "dev", self.name, "root"],
            env=_environment(), capture_output=True, check=False,
        )  # fmt: skip

    def link_down(self) -> None:
        """Pull the cable: the card stays up with its address, and nothing passes."""
        _in_net(self.switch_pid, "ip", "link", "set", self.name, "nomaster")

    def link_up(self) -> None:
        _in_net(self.switch_pid, "ip", "link", "set", self.name, "master", "switch")

    def processes(self) -> list[int]:
        """Process ids, as seen from outside, of everything that runs on it; the first process first."""
        ours = os.stat(f"/proc/{self.pid}/ns/pid").st_ino
        found = []
        for entry in os.listdir("/proc"):
            try:
                if entry.isdigit() and os.stat(f"/proc/{entry}/ns/pid").st_ino == ours:
                    found.append(int(entry))
            except OSError:
                continue
        return sorted(found)

    def pause(self) -> None:
        """Stop every process: the host answers pings and accepts connections, and then says nothing."""
        for pid in self.processes():
            _signal(pid, signal.SIGSTOP)

    def resume(self) -> None:
        for pid in self.processes():
            _signal(pid, signal.SIGCONT)

    def kill(self) -> None:
        """End every process at once, and the network with them."""
        _signal(self.pid, signal.SIGKILL)


def driver_link_down(node: NetnsHost) -> None:
    """Pull the cable of this process's own card, on the switch of ``node``."""
    _in_net(node.switch_pid, "ip", "link", "set", "driver", "nomaster")


@contextmanager
def hosts(count: int, *, env: Mapping[str, Mapping[str, str]] | None = None) -> Iterator[list[NetnsHost]]:
    """``count`` hosts called node0, node1, ... ``env``: name -> variables that a session over ssh finds there.

    Skips the test, and says why, where such hosts cannot be made.
    """
    if reason := missing():
        pytest.skip(reason)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="aphro-hosts-")))
        number = stack.enter_context(_network_number())
        network, card = f"198.18.{number}", f"aphro{number}"  # of the range for benchmarks (RFC 2544)
        _write_ssh_client(folder, [f"node{number}" for number in range(count)], network)
        log = stack.enter_context((folder / "boot.log").open("wb"))
        switch = _start(stack, log, "sleep", "86400")
        _in_net(switch, "ip", "link", "add", "switch", "type", "bridge")
        _in_net(switch, "ip", "link", "set", "switch", "up")
        _plug(switch, os.getpid(), "driver", card, f"{network}.{DRIVER}/24")
        stack.callback(_unplug, card)
        made = [
            _boot(stack, log, folder, switch, network, number, (env or {}).get(f"node{number}", {}))
            for number in range(count)
        ]
        for host in made:
            _wait_for_sshd(host)
        old = os.environ.get("PATH", os.defpath)
        os.environ["PATH"] = f"{folder}:{old}"
        stack.callback(os.environ.__setitem__, "PATH", old)
        yield made


@contextmanager
def _network_number() -> Iterator[int]:
    """One that no other test has, in whatever process it runs: each is held by a socket of that name."""
    with socket.socket(socket.AF_UNIX) as claim:
        for number in range(_MOST_NETWORKS):
            try:
                claim.bind(f"\0aphro-hosts-{number}")
            except OSError:
                continue
            yield number
            return
    raise AssertionError(f"all {_MOST_NETWORKS} networks are in use")


def _boot(
    stack: ExitStack, log: IO[bytes], folder: Path, switch: int, network: str, number: int, env: Mapping[str, str]
) -> NetnsHost:
    name, address = f"node{number}", f"{network}.{number + 1}"
    variables = {"PATH": f"{folder}:{_environment()['PATH']}", **env}
    (folder / f"{name}.log").touch()
    (folder / f"{name}.sshd").write_text(
        f"Port 22\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/key.pub\nStrictModes no\nUsePAM no\n"
        "PidFile none\nPermitRootLogin prohibit-password\nPrintMotd no\nUseDNS no\n"
        f"SetEnv {' '.join(f'{key}={value}' for key, value in variables.items())}\n"
    )
    boot = (
        f"hostname {name} && mount --make-rprivate / && mount -t sysfs sysfs /sys && mount -t tmpfs tmpfs /dev/shm"
        f" && mount -t tmpfs tmpfs /run && mkdir /run/sshd && mount --bind {folder}/etc-hosts /etc/hosts"
        f" && ip link set lo up && until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done"
        f" && exec {_which('sshd')} -D -f {folder}/{name}.sshd -E {folder}/{name}.log"
    )
    pid = _start(stack, log, "--uts", "--ipc", "--mount", "--pid", "--mount-proc", "sh", "-c", boot)
    _plug(switch, pid, name, "eth0", f"{address}/24")
    return NetnsHost(name, address, pid, switch_pid=switch, folder=folder)


def _start(stack: ExitStack, log: IO[bytes], *argv: str) -> int:
    """Run ``argv`` in a new network, and whatever other namespaces it names; the id of the process inside."""
    # both die with their parent: the process that asked may be killed, too
    argv = (_which("setpriv"), "--pdeathsig", "KILL", _which("unshare"), "--net", "--kill-child", *argv)
    process = subprocess.Popen(argv, env=_environment(), start_new_session=True, stderr=log)
    stack.callback(_end, process)
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if children := _children(process.pid):
            return children[0]  # --kill-child forks, in the new namespaces
        time.sleep(0.01)
    raise AssertionError("unshare did not start")


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _end(process: subprocess.Popen[bytes]) -> None:
    """From the inside: unshare ends when the first process of its namespaces, and so all of them, have ended."""
    for pid in _children(process.pid):
        _signal(pid, signal.SIGKILL)
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _plug(switch: int, pid: int, port: str, card: str, address: str) -> None:
    """A cable between the switch's ``port`` and a new ``card`` of the network of ``pid``."""
    _in_net(switch, "ip", "link", "add", port, "type", "veth", "peer", "name", card)
    _in_net(switch, "ip", "link", "set", port, "master", "switch", "up")
    _in_net(switch, "ip", "link", "set", card, "netns", str(pid))
    _in_net(pid, "ip", "address", "add", address, "dev", card)
    _in_net(pid, "ip", "link", "set", card, "up")


def _unplug(card: str) -> None:
    subprocess.run(["ip", "link", "delete", card], env=_environment(), capture_output=True, check=False)


def _in_net(pid: int, *argv: str) -> None:
    enter = [_which("nsenter"), "-t", str(pid), "-n", *argv]
    result = subprocess.run(enter, env=_environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(argv)}: {result.stderr}"


def _write_ssh_client(folder: Path, names: list[str], network: str) -> None:
    """Keys, known hosts, a configuration, and an ``ssh`` in ``folder`` that uses them: it looks only at home itself."""
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    public = (folder / "host_key.pub").read_text()
    addresses = {name: f"{network}.{number + 1}" for number, name in enumerate(names)}
    (folder / "known_hosts").write_text("".join(f"{address} {public}" for address in addresses.values()))
    (folder / "etc-hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
    )
    (folder / "config").write_text(
        "".join(f"Host {name} {address}\n  HostName {address}\n" for name, address in addresses.items())
        + f"Host *\n  User root\n  IdentityFile {folder}/key\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  StrictHostKeyChecking yes\n"
    )
    wrapper = folder / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {_which("ssh")} -F {folder}/config "$@"\n')
    wrapper.chmod(0o755)


def _wait_for_sshd(host: NetnsHost) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host.address, host.port), timeout=1) as connection:
                if connection.recv(3) == b"SSH":
                    return
        except OSError:
            time.sleep(0.02)
    logs = [(host.folder / name).read_text() for name in ("boot.log", f"{host.name}.log")]
    raise AssertionError(f"no sshd on {host.name}: {' '.join(logs)}")


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        print(f"process {pid} ended before its signal", file=sys.stderr)


def _which(name: str) -> str:
    found = shutil.which(name, path=_environment()["PATH"])
    assert found is not None, name
    return found
