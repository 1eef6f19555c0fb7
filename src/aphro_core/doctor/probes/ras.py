"""Run on a host: asks the RAS port of a running NCCL job for its status, twice. JSON."""

from __future__ import annotations

import json
import os
import socket
import time

LIMIT_SECONDS = 6.0


def status(host: str, port: int) -> str:
    """Everything it says until it closes the connection or falls silent."""
    with socket.create_connection((host, port), timeout=2.0) as connection:
        connection.sendall(b"verbose status\n")
        connection.settimeout(LIMIT_SECONDS)
        parts = []
        try:
            while part := connection.recv(1 << 16):
                parts.append(part)
        except TimeoutError:
            pass
    return b"".join(parts).decode(errors="replace")


if __name__ == "__main__":
    address = os.environ.get("NCCL_RAS_ADDR", "localhost:28028")
    host, _, port = address.rpartition(":")
    said = {"address": address, "error": "", "first": "", "second": ""}
    try:
        said["first"] = status(host.strip("[]"), int(port))
        time.sleep(1)
        said["second"] = status(host.strip("[]"), int(port))
    except (OSError, ValueError) as error:
        said["error"] = str(error)
    print(json.dumps(said))
