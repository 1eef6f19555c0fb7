"""The map of the rooms, and the habits that a parser can check: ARCHITECTURE.md says it, this holds the code to it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"aphro_cli": ROOT / "src", "aphro_core": ROOT / "src", "aphro_kernels": ROOT / "kernels"}
SOURCES = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("kernels/**/*.py")])
OUTSIDE_WORLD = {"torch", "anyio", "asyncio", "httpx", "rich", "os", "socket", "subprocess", "threading", "time"}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "import_module", "torch.load", "os.system", "os.popen"}
DISTRIBUTIONS = {"pynvml": "nvidia-ml-py", "yaml": "pyyaml"}  # whose names are not those of what they install
OPTIONAL = {"triton", "ray"}  # comes with CUDA builds of torch, kernels do without; an extra, for clusters

sources = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def read_map(text: str) -> dict[str, str]:
    """Room -> kind, top to bottom, from the first fenced block: ``name[, name...]  [KIND ...]``, without indent."""
    block = text.split("```")[1]
    rooms: dict[str, str] = {}
    for line in block.splitlines():
        row = re.match(r"([a-z_]+(?:, [a-z_]+)*)(?:\s+(PURE|DEVICE|OUTSIDE)\b.*)?$", line)
        if row:
            rooms |= dict.fromkeys(row[1].split(", "), row[2] or "OUTSIDE")
    return rooms


ROOMS = read_map((ROOT / "ARCHITECTURE.md").read_text())


def room_of(path: Path) -> str:
    """``src/aphro_core/engine/entry.py`` -> engine, ``src/aphro_core/api.py`` -> api, else the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts[1:]
    return parts[1] if parts[0] == "aphro_core" else parts[0]


def modules_imported_by(tree: ast.AST) -> Iterator[str]:
    """Every module named by an import anywhere in the file: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported_by(tree: ast.AST) -> set[str]:
    modules = [module.split(".") for module in modules_imported_by(tree)]
    return {parts[1] if parts[0] == "aphro_core" else parts[0] for parts in modules if parts[0] in (*PACKAGES, "aphro")}


def packages_imported_by(tree: ast.AST) -> set[str]:
    return {module.split(".")[0] for module in modules_imported_by(tree)}


def offences_in(tree: ast.AST) -> list[str]:
    """What no file may do: run text or unpickle, through whatever door, or keep state in a module."""
    found = sorted(packages_imported_by(tree) & FORBIDDEN_IMPORTS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            short = name.rsplit(".", maxsplit=1)[-1] if name.endswith("import_module") else name
            found += [f"{name}()"] if short in FORBIDDEN_CALLS else []
            found += [
                ast.unparse(word)
                for word in node.keywords
                if word.arg == "trust_remote_code" or (word.arg == "shell" and ast.unparse(word.value) != "False")
            ]
        elif isinstance(node, ast.Global):
            found.append(f"global {', '.join(node.names)}")
    return found


def test_map_is_of_this_code() -> None:
    # a folder that nobody has filled yet is not a room
    on_disk = {room_of(path) for path in SOURCES if path.name != "__init__.py"}
    assert on_disk == set(ROOMS)


@sources
def test_imports_only_go_down(path: Path) -> None:
    if path.name == "__init__.py":
        return
    order = list(ROOMS)
    above = set(order[: order.index(room_of(path))])
    assert rooms_imported_by(ast.parse(path.read_text())) & above == set()


@sources
def test_pure_rooms_touch_nothing(path: Path) -> None:
    if ROOMS.get(room_of(path)) == "PURE":
        assert packages_imported_by(ast.parse(path.read_text())) & OUTSIDE_WORLD == set()


@sources
def test_first_line_is_a_caption(path: Path) -> None:
    text = path.read_text()
    if path.name == "__init__.py":
        assert text == "", "import from the file that defines"
        return
    caption = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    assert len(caption.split()) >= 3, "the first line says what the file is responsible for"
    assert text.startswith('"""'), "the caption is the first line"


@sources
def test_nothing_forbidden(path: Path) -> None:
    assert offences_in(ast.parse(path.read_text())) == []


def test_packages_have_their_init() -> None:
    folders = {path.parent for path in SOURCES} - {ROOT / "src"}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_test_names_are_unique() -> None:
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_dependencies_are_what_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=~;\[ ]", line)[0] for line in project["dependencies"]}
    trees = [ast.parse(path.read_text()) for path in SOURCES]
    packages = set().union(*map(packages_imported_by, trees)) - set(sys.stdlib_module_names) - {*PACKAGES, "aphro"}
    imported = {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in packages} - OPTIONAL
    assert imported == declared


def test_checks_see_offences() -> None:
    """The parser finds what it must find, wherever it hides."""
    source = """
import pickle
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from aphro_core.server.app import build_app
def load(path):
    from aphro_core import api
    import aphro_core.engine.entry as entry
    global cache
    return eval(path) or torch.load(path) or run(path, shell=True) or read(path, trust_remote_code=False)
"""
    tree = ast.parse(source)
    assert rooms_imported_by(tree) == {"server", "api", "engine"}
    assert offences_in(tree) == ["pickle", "global cache", "eval()", "torch.load()", "shell=True",
                                 "trust_remote_code=False"]  # fmt: skip
    assert offences_in(ast.parse("model.eval(); re.compile('x'); run(words, shell=False)")) == []


def test_map_is_read_whole() -> None:
    text = "x\n```\nalpha\nbeta   OUTSIDE  does: b.py,\n       c.py\ngamma, delta   PURE\n```\n```\nother\n```"
    assert read_map(text) == {"alpha": "OUTSIDE", "beta": "OUTSIDE", "gamma": "PURE", "delta": "PURE"}
