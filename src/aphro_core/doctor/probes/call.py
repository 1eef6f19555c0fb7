"""Run on a host: connects to the ports of a listener, and sends it a datagram that may not be fragmented. JSON."""

from __future__ import annotations

import json
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

IP_MTU_DISCOVER, IP_PMTUDISC_PROBE = 10, 3  # no fragments, and no memory of smaller paths
HEADER_BYTES = 28  # of IPv4 and UDP


def connect(address: str, port: int, seconds: float) -> float | str:
    started = time.monotonic()
    try:
        socket.create_connection((address, port), timeout=seconds).close()
    except TimeoutError:
        return f"no answer within {seconds:g} s (packets are dropped)"
    except OSError as error:
        return error.strerror or str(error)
    return time.monotonic() - started


def send(address: str, port: int, packet_bytes: int) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_PROBE)
        try:
            sender.sendto(bytes(packet_bytes - HEADER_BYTES), (address, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


if __name__ == "__main__":
    target, limit, udp_port, size = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    ports = sys.argv[5:]
    with ThreadPoolExecutor() as threads:  # at the same time: where packets are dropped, each waits for its limit
        answers = dict(zip(ports, threads.map(lambda port: connect(target, int(port), limit), ports), strict=True))
    failed = send(target, udp_port, size) if size and ":" not in target else ""
    print(json.dumps({"tcp": answers, "udp_error": failed}))
