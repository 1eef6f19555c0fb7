"""``aphro`` itself: help at once, versions, and TAB."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aphro_cli import cluster
from aphro_cli.completions import RENDERERS, render
from aphro_cli.main import app

ROOT = Path(__file__).parent.parent.parent
HEAVY = [
    "torch",
    "transformers",
    "rich",
    "anyio",
    "starlette",
    "hypercorn",
    "tokenizers",
    "huggingface_hub",
    "httpx",
    "ray",
]


def cpu_seconds(*words: str) -> float:
    """Processor time of one run: what else the machine does counts little."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize("words", [("--help",), ("run", "--help")])
def test_help_is_there_at_once(words: tuple[str, ...]) -> None:
    """At most 200 ms more than a bare interpreter, in the best of a few runs.

    A bare start takes about 20 ms; where it takes longer the cores are shared, and help may take longer alike.
    """
    for _ in range(8):
        bare = cpu_seconds("-c", "pass")
        if cpu_seconds("-m", "aphro_cli.main", *words) - bare <= max(0.2, 10 * bare):
            return
    pytest.fail("help took too long in each of 8 runs")


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, aphro_cli.main; print([name for name in sys.argv[1:] if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, *HEAVY], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


COMMANDS = [str(row.name) for row in app.registered_commands]
COMMANDS += [f"cluster {row.name}" for row in cluster.app.registered_commands]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("columns", [80, 200])
def test_help_has_examples_and_fits(name: str, columns: int) -> None:
    """Examples stay as they are written; all else is wrapped to the terminal."""
    result = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": str(columns)}, terminal_width=columns)
    assert result.exit_code == 0
    text, _, examples = result.stdout.partition("Examples:")
    assert f"  aphro {'run' if name == 'serve' else name}" in examples
    assert max(map(len, text.splitlines())) <= columns
    assert max(map(len, examples.splitlines())) <= 120
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize("words", [["version"], ["--version"]])
def test_version(words: list[str]) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"aphro {metadata.version('aphro')} (Python 3.")
    assert f"torch {metadata.version('torch')}" in result.stdout


def test_no_command_shows_help() -> None:
    result = CliRunner().invoke(app, [])
    assert "Commands:" in result.output


def test_unknown_command() -> None:
    result = CliRunner().invoke(app, ["rum"])
    assert result.exit_code == 2
    assert "rum" in result.stderr


@pytest.mark.parametrize("name", RENDERERS)
def test_completions_are_up_to_date(name: str) -> None:
    assert (ROOT / "completions" / name).read_text() == render(name), "run: python -m aphro_cli.completions"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["r"], ["run"]),
        (["run", "--tensor-p"], ["--tensor-parallel-size"]),
        (["serve", "model", "-t"], ["-tp"]),
        (["run", "--dtype", "b"], ["bfloat16"]),
        (["run", "--dtype", "=", "ha"], ["half"]),
        (["run", "--block-size", ""], ["8", "16", "32"]),
        (["run", "--port", ""], []),
        (["version", "--tensor-p"], []),
        (["cluster", "st"], ["status"]),
        (["cluster", "join", "--interf"], ["--interface"]),
        (["cluster", "down", "--interf"], []),
    ],
)
def test_bash_completes_without_starting_anything(words: list[str], expected: list[str]) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    script = 'source "$1"; shift; COMP_WORDS=(aphro "$@"); COMP_CWORD=$#; _aphro; echo "${COMPREPLY[@]}"'
    command = [bash, "--norc", "-c", script, "bash", str(ROOT / "completions" / "aphro.bash"), *words]
    done = subprocess.run(command, env={"PATH": os.devnull}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected
    assert done.stderr == ""


@pytest.mark.parametrize(("shell", "name"), [("zsh", "_aphro"), ("fish", "aphro.fish")])
def test_other_shells_parse_theirs(shell: str, name: str) -> None:
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"{shell} is not installed here")
    subprocess.run([path, "-n", str(ROOT / "completions" / name)], check=True)
