"""What is decided from the command line alone: backends, lengths, stages, access, files, environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphro_cli import options
from aphro_core.config import HostSlots
from aphro_core.errors import ExitCode, UsageError


def test_hosts(tmp_path: Path) -> None:
    assert options.parse_hosts(None) == ()
    expected = (HostSlots("node0", 2), HostSlots("10.0.0.7", 1))
    assert options.parse_hosts("node0:2, 10.0.0.7") == expected
    file = tmp_path / "hosts"
    file.write_text("node0:2  # the large one\n\n10.0.0.7:1\n")
    assert options.parse_hosts(str(file)) == expected
    assert options.parse_hosts("[fd00::1]:2,[fd00::2]") == (HostSlots("[fd00::1]", 2), HostSlots("[fd00::2]", 1))
    for wrong in ("fd00::1:2", "", "node0:", "node0:0", "node0:two", ":2", "node0:-1"):
        with pytest.raises(UsageError, match="--hosts"):
            options.parse_hosts(wrong)
    with pytest.raises(UsageError, match="names node0 twice"):
        options.parse_hosts("node0,node0:2")


def test_backends() -> None:
    assert options.parse_backend(None) == "auto"
    assert options.parse_backend("mp") == "mp"
    assert options.parse_backend("ssh") == "ssh"
    assert options.parse_backend("ray") == "ray"
    with pytest.raises(UsageError, match="threads is not a backend"):
        options.parse_backend("threads")


def test_every_dtype_that_is_offered_is_understood() -> None:
    offered = get_args(get_args(options.DTypeOption)[0])
    assert {options.parse_dtype(text) for text in offered} == {"auto", "float32", "bfloat16", "float16"}
    assert options.parse_dtype("half") == "float16"
    assert options.parse_dtype("float") == "float32"


@given(st.lists(st.integers(1, 200), min_size=1, max_size=8))
def test_pp_layers_round_trip(layers: list[int]) -> None:
    assert options.parse_pp_layers(",".join(map(str, layers))) == tuple(layers)


@pytest.mark.parametrize("text", ["", "a", "3,", "3;4", "3,0", "-1,4", "1.5,2"])
def test_pp_layers_refuse(text: str) -> None:
    with pytest.raises(UsageError, match="--pp-layers is"):
        options.parse_pp_layers(text)


def test_max_model_len() -> None:
    assert options.parse_max_model_len(None) is None
    assert options.parse_max_model_len("4096") == 4096
    assert options.parse_max_model_len("auto") == options.parse_max_model_len("-1") == "auto"


@pytest.mark.parametrize("text", ["0", "-2", "4k", "", "1e3", "²"])
def test_max_model_len_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="--max-model-len is"):
        options.parse_max_model_len(text)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_key(host: str) -> None:
    options.check_access(host, (), allow_anonymous=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.7", "example.org", "127.0.0.1.example.org"])
def test_other_hosts_need_a_key_or_consent(host: str) -> None:
    with pytest.raises(UsageError, match="there is no API key") as refusal:
        options.check_access(host, (), allow_anonymous=False)
    assert "--allow-anonymous" in (refusal.value.hint or "")
    assert refusal.value.exit_code is ExitCode.USAGE
    options.check_access(host, ("key",), allow_anonymous=False)
    options.check_access(host, (), allow_anonymous=True)


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "line\nbreak"])
def test_keys_that_no_header_carries_are_refused_and_not_shown(key: str) -> None:
    with pytest.raises(UsageError, match="API key 2 of 2") as refusal:
        options.check_access("127.0.0.1", ("good", key), allow_anonymous=False)
    assert not key or key not in refusal.value.message


def test_missing_chat_template(tmp_path: Path) -> None:
    options.check_files(None, None)
    with pytest.raises(UsageError, match="--chat-template"):
        options.check_files(str(tmp_path / "none.jinja"), None)


def test_json_ready_must_be_writable(tmp_path: Path) -> None:
    options.check_files(None, str(tmp_path / "ready.json"))
    for place in (tmp_path / "none" / "ready.json", tmp_path, Path(os.devnull)):
        with pytest.raises(UsageError, match="--json-ready"):
            options.check_files(None, str(place))


def test_nan_is_no_duration() -> None:
    options.check_finite(drain_seconds=float("inf"))
    with pytest.raises(UsageError, match="--drain-seconds is nan"):
        options.check_finite(drain_seconds=float("nan"))


def test_unknown_variables_name_the_nearest() -> None:
    environ = {"APHRO_API_KEYS": "x", "APHRO_LOG_LEVEL": "info", "APHRODITE_API_KEY": "x", "HOME": "/"}
    (warning,) = options.unknown_variables(environ)
    assert "APHRO_API_KEYS is set" in warning
    assert warning.endswith("nearest known name is APHRO_API_KEY")
    assert options.unknown_variables(dict.fromkeys(options.ENVIRONMENT, "x")) == []


def test_every_option_has_help() -> None:
    from aphro_cli.run import run

    for name, hint in get_type_hints(run, include_extras=True).items():
        if name not in ("return", "context"):
            assert get_args(hint)[1].help, name
