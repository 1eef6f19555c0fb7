"""Which variables reach workers on other hosts."""

from __future__ import annotations

from aphro_core.environment import travelling


def test_settings_travel_and_what_belongs_to_one_host_stays() -> None:
    travels = {"NCCL_DEBUG": "INFO", "NCCL_SOCKET_IFNAME": "eth0", "HF_TOKEN": "secret", "OMP_NUM_THREADS": "4"}
    stays = {
        "PATH": "/bin",
        "HOME": "/root",
        "CUDA_VISIBLE_DEVICES": "0",
        "APHRO_API_KEY": "secret",
        "APHRO_CLUSTER_TOKEN": "secret",
        "HF_HOME": "/here",
    }
    assert travelling(travels | stays) == travels
