"""The documents say what the code does: flags, defaults, exit codes, files."""

from __future__ import annotations

import inspect
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from aphro_cli.bench import bench
from aphro_cli.chat import chat
from aphro_cli.main import app
from aphro_cli.options import ENVIRONMENT
from aphro_cli.run import run
from aphro_cli.top import top
from aphro_core.config import ServerConfig
from aphro_core.doctor.nccl_log.topics import TOPICS
from aphro_core.errors import ExitCode
from aphro_core.server.app import build_app
from aphro_core.server.schema import ChatBody, CompletionBody

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND: Any = typer.main.get_command(app)


def options_of(command: str) -> dict[str, str]:
    params = COMMAND.commands[command].params
    options = {name: param.name for param in params for name in (*param.opts, *param.secondary_opts)}
    return {name: field for name, field in options.items() if name.startswith("-")}


PARAMETERS = options_of("run")
CLIENTS: dict[str, Any] = {"bench": bench, "chat": chat, "top": top}


def rows_of(document: str) -> list[list[str]]:
    text = (ROOT / document).read_text().replace("\\|", "/")
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]


def test_cli_page_has_every_option() -> None:
    documented = [name for row in rows_of("docs/cli.md") for name in re.findall(r"`(-[a-z-]+)`", row[0])]
    assert sorted(documented) == sorted(PARAMETERS)


def test_cli_page_has_the_defaults() -> None:
    signature = inspect.signature(run).parameters
    compared = 0
    for row in rows_of("docs/cli.md"):
        names = re.findall(r"`(-[a-z-]+)`", row[0])
        default = signature[PARAMETERS[names[-1]]].default if names else None
        if isinstance(default, str) or (isinstance(default, (int, float)) and not isinstance(default, bool)):
            assert row[1] == (default if isinstance(default, str) else f"{default:g}"), names
            compared += 1
        elif isinstance(default, bool):
            assert row[1] == ("on" if default else "off"), names
            compared += 1
    assert compared >= 20


def test_cli_page_has_the_environment() -> None:
    documented = [name for row in rows_of("docs/cli.md") for name in re.findall(r"^`(APHRO_[A-Z0-9_]+)`$", row[0])]
    assert documented == list(ENVIRONMENT)


def test_no_other_variable_is_read() -> None:
    read = {
        name
        for folder in ("src", "kernels", "tests/e2e", "tests/gpu")
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"\bAPHRO_[A-Z0-9_]+\b", path.read_text())
    }
    assert read <= set(ENVIRONMENT)


def test_cli_page_has_the_exit_codes() -> None:
    rows = [row for row in rows_of("docs/cli.md") if row[0].isdigit()]
    assert [int(row[0]) for row in rows] == [code.value for code in ExitCode]
    named = {name for row in rows for name in re.findall(r"`([a-z]+)`", row[2])}
    assert named <= set(COMMAND.commands)


@pytest.mark.parametrize("command", CLIENTS)
def test_clients_page_has_every_option_and_default(command: str) -> None:
    pages = re.split(r"^## ", (ROOT / "docs" / "clients.md").read_text(), flags=re.MULTILINE)
    (own,) = [page for page in pages if page.startswith(f"aphro {command}\n")]
    rows = [line.strip("|").split("|") for page in (pages[0], own) for line in page.splitlines() if line[:3] == "| `"]
    names = [(re.findall(r"`(-[a-z-]+)`", row[0]), row[1].strip()) for row in rows]
    assert sorted(name for each, _ in names for name in each) == sorted(options_of(command))
    signature = inspect.signature(CLIENTS[command]).parameters
    for each, documented in names:
        default = signature[options_of(command)[each[-1]]].default
        if each == ["--timeout"]:
            continue  # the page says where it differs
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            assert documented == f"{default:g}", each
        elif isinstance(default, bool):
            assert documented == ("on" if default else "off"), each


def test_readme_flags_exist() -> None:
    named = re.findall(r"(?<![\w-])(--?[a-z][a-z_-]+)\b", (ROOT / "README.md").read_text())
    foreign = {"--use-system-torch", "--help", "--full-matrix"}
    known = {name for command in COMMAND.commands for name in options_of(command)} | foreign
    unknown = {name for name in named if name.replace("_", "-") not in known}
    assert unknown == set()
    assert len(named) > 10


def test_api_page_has_every_field() -> None:
    documented = {name for row in rows_of("docs/api.md") for name in re.findall(r"`([a-z_]+)`", row[0])}
    assert documented == {*CompletionBody.__struct_fields__, *ChatBody.__struct_fields__}


def test_api_page_has_every_route() -> None:
    class Frontend:
        served_name = "model"

    routes = build_app(Frontend(), ServerConfig())._routes()  # type: ignore[arg-type]
    served = {route.path.replace("{model:path}", "{id}") for route in routes}
    documented = re.findall(r"`(?:GET|POST) (/[^`]+)`", (ROOT / "docs" / "api.md").read_text())
    assert sorted(documented) == sorted(served)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", document.read_text())
    assert [link for link in links if "://" not in link and not (document.parent / link).exists()] == []


def test_cluster_page_has_every_option_and_default() -> None:
    rows = [row for row in rows_of("docs/cluster.md") if re.match(r"`-", row[0])]
    documented = {name for row in rows for name in re.findall(r"`(-[a-z-]+)`", row[0])}
    children = COMMAND.commands["cluster"].commands.values()
    params = {
        name: param for child in children for param in child.params for name in (*param.opts, *param.secondary_opts)
    }
    assert documented == set(params) - {"--help", "-h"}
    defaults = {name: row[2] for row in rows for name in re.findall(r"`(-[a-z-]+)`", row[0]) if row[2].isdigit()}
    assert defaults == {name: f"{params[name].default:g}" for name in ("--port", "--wait-timeout", "--lines", "-n")}


def test_estimate_page_has_every_option() -> None:
    documented = {name for row in rows_of("docs/estimate.md") for name in re.findall(r"`(--?[a-z-]+)`", row[0])}
    assert documented == set(options_of("estimate"))


def test_doctor_page_has_every_option_and_finding() -> None:
    rows = [row[0] for row in rows_of("docs/doctor.md")]
    documented = {
        name for row in rows for name in re.findall(r"`(-[a-z-]+)|, `(-[a-z-]+)", row) for name in name if name
    }
    long_names = {"--tensor-parallel-size", "--pipeline-parallel-size"}
    assert documented | long_names == set(options_of("doctor"))
    assert {id for row in rows for id in re.findall(r"`(log\.[a-z0-9-]+)`", row)} == set(TOPICS)


def test_container_page_has_scripts_that_are_bash_and_options_that_exist() -> None:
    text = (ROOT / "docs" / "containers.md").read_text()
    scripts = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    consoles = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    scripts += [re.sub(r"^\S*\$ ", "", console, flags=re.MULTILINE) for console in consoles]
    assert len(scripts) >= 8
    for script in scripts:
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")
    joined = text.replace("\\\n", " ")
    runs = re.findall(r"(?:aphro|aphro \\?\s+) run (.*)", joined) + re.findall(
        r"^\s+run (/models.*)", joined, re.MULTILINE
    )
    members = re.findall(r"aphro cluster (up|join)([^&;]*)", joined)
    assert len(runs) >= 4
    assert len(members) >= 4
    for words in runs:
        assert set(re.findall(r"(?<=\s)(--?[a-z][a-z-]+)", words)) <= set(PARAMETERS), words
    for command, words in members:
        known = {name for param in COMMAND.commands["cluster"].commands[command].params for name in param.opts}
        assert set(re.findall(r"(?<=\s)(--?[a-z][a-z-]+)", words)) <= known, words
