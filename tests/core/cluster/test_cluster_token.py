"""Where the token comes from, and what is none."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from aphro_core.cluster.token import given_token, keep_token, new_token, token_path
from aphro_core.errors import UsageError

TOKEN = "a" * 64


def test_sources_in_order(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert given_token(None, str(file), {"APHRO_CLUSTER_TOKEN": "b" * 64}) == TOKEN
    assert given_token("c" * 64, None, {"APHRO_CLUSTER_TOKEN": "b" * 64}) == "c" * 64
    assert given_token(None, None, {"APHRO_CLUSTER_TOKEN": "b" * 64}) == "b" * 64
    assert given_token(None, None, {}) is None


@pytest.mark.parametrize("text", ["short", "with space" * 8, "ü" * 64, ""])
def test_what_is_no_token_is_named_but_not_shown(text: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    with pytest.raises(UsageError, match="is no token of a cluster") as refused:
        given_token(None, str(file), {})
    assert not text or text not in str(refused.value)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="both given"):
        given_token(TOKEN, "file", {})
    with pytest.raises(UsageError, match="No such file"):
        given_token(None, str(tmp_path / "none"), {})


def test_it_is_kept_for_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    token = new_token()
    assert keep_token(token) == token_path()
    assert token_path().read_text() == token
    assert stat.S_IMODE(token_path().stat().st_mode) == 0o600
    assert given_token(None, str(token_path()), {}) == token
