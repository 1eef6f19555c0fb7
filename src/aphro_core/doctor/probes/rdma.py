"""Run on a host: whether the verbs library, providers, device files and a network plug-in can be opened. JSON."""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os

PROVIDERS = ("mlx5", "efa", "irdma", "mlx4", "bnxt_re", "hns", "qedr", "rxe", "siw")
FOLDERS = ("/usr/lib/*/libibverbs", "/usr/lib64/libibverbs", "/usr/lib/libibverbs", "/etc/libibverbs.d")


def load(name: str) -> str:
    """Empty if the loader finds the library, else its words."""
    try:
        ctypes.CDLL(name)
    except OSError as error:
        return str(error)
    return ""


def open_node(path: str) -> str:
    """Empty if the device file opens, else the errno's name."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return ""


def plugin_name() -> str:
    """The file that NCCL_NET_PLUGIN stands for."""
    name = os.environ.get("NCCL_NET_PLUGIN", "")
    return name if ".so" in name else f"libnccl-net-{name}.so" if name and name != "none" else "libnccl-net.so"


if __name__ == "__main__":
    listed = [path for folder in FOLDERS for path in glob.glob(f"{folder}/*")]
    nodes = {os.path.basename(os.path.dirname(path)): path for path in glob.glob("/sys/class/infiniband_verbs/*/ibdev")}
    print(
        json.dumps(
            {
                "library_error": load("libibverbs.so.1"),
                "providers": [name for name in PROVIDERS if any(name in os.path.basename(path) for path in listed)],
                "nodes": {name: open_node(f"/dev/infiniband/{name}") for name in sorted(nodes)},
                "plugin": plugin_name(),
                "plugin_error": load(plugin_name()),
            }
        )
    )
