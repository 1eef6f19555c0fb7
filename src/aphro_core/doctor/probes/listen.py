"""Run on a host: listens at an address on ports of the kernel's range, and tells the size of each datagram."""

from __future__ import annotations

import json
import os
import select
import socket
import sys

from aphro_core.lifeline import die_with_parent

NUM_PORTS = 3  # as many as a rendezvous and two channels would take


def main(address: str) -> None:
    die_with_parent()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listeners = []
    for _ in range(NUM_PORTS):
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind((address, 0))
        listener.listen(16)
        listeners.append(listener)
    datagrams = socket.socket(family, socket.SOCK_DGRAM)
    datagrams.bind((address, 0))
    ports = {"tcp_ports": [listener.getsockname()[1] for listener in listeners]}
    print(json.dumps({**ports, "udp_port": datagrams.getsockname()[1]}), flush=True)
    waiting = select.poll()
    by_fd = {listener.fileno(): listener for listener in listeners}
    for fd in (0, datagrams.fileno(), *by_fd):
        waiting.register(fd, select.POLLIN)
    while True:
        for fd, _ in waiting.poll():
            if fd in by_fd:
                by_fd[fd].accept()[0].close()
            elif fd == datagrams.fileno():
                print(len(datagrams.recv(1 << 16)), flush=True)
            elif not os.read(0, 1 << 12):
                return  # whoever asked has gone


if __name__ == "__main__":
    main(sys.argv[1])
