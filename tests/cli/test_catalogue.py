"""aphro models and aphro quants, and docs/models.md, which is generated."""

from __future__ import annotations

import json
import subprocess
import sys

from typer.testing import CliRunner

from aphro_cli.main import app
from aphro_core.models.quant_config import METHODS, ONLINE, RECOGNISED
from aphro_core.models.registry import FAMILIES
from tests.models_page import PAGE, render


def output(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_every_family_is_listed() -> None:
    rows = json.loads(output("models", "--json"))
    assert [row["architecture"] for row in rows if row["is_supported"]] == list(FAMILIES)
    assert all(row["family"] and row["devices"] for row in rows if row["is_supported"])
    text = output("models")
    assert all(architecture in text for architecture in FAMILIES)
    assert "Recognised, not supported: Baichuan" in text


def test_every_format_is_listed() -> None:
    rows = json.loads(output("quants", "--json"))
    assert {row["name"] for row in rows if row["status"] == "supported"} == {*ONLINE, *METHODS}
    assert [row["name"] for row in rows if row["status"] == "recognised"] == list(RECOGNISED)
    assert "compressed-tensors" in output("quants")


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == render(), "run python -m tests.models_page"


def test_version_for_scripts() -> None:
    assert json.loads(output("version", "--json")).keys() == {"aphro", "python", "torch"}


def test_a_reader_that_leaves_early_wanted_no_more() -> None:
    command = [sys.executable, "-m", "aphro_cli.main", "models"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == b""
