"""Which variables reach workers on other hosts."""

from __future__ import annotations

import pytest

from aphro_core.environment import is_secret, parse_assignments, travelling
from aphro_core.errors import UsageError


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


def test_secrets_are_known_by_the_words_of_their_names() -> None:
    assert all(map(is_secret, ("HF_TOKEN", "APHRO_API_KEY", "AWS_SECRET_ACCESS_KEY", "my_password")))
    assert not any(map(is_secret, ("NCCL_DEBUG", "TOKENIZERS_PARALLELISM", "KEYBOARD", "MONKEYS")))


def test_assignments_are_typed_or_taken_from_the_shell() -> None:
    shell = {"HF_TOKEN": "hf_secret"}
    assert parse_assignments(["A=1", "HF_TOKEN", "B=x=y", "C=", "A=2"], shell) == {
        "A": "2", "HF_TOKEN": "hf_secret", "B": "x=y", "C": ""
    }  # fmt: skip
    with pytest.raises(UsageError, match="-e NO: this shell has no such variable"):
        parse_assignments(["NO"], shell)
    for wrong in ("=1", "1A=2", "A-B=1", ""):
        with pytest.raises(UsageError, match="is no NAME=VALUE"):
            parse_assignments([wrong], shell)
