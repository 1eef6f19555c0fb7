"""Bytecode beside imports: which modules a module leads to, that all of them have it, and where Python looks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import cache_from_source
from pathlib import Path

import pytest

from aphro_core.bytecode import bytecode, compiler
from aphro_core.bytecode.bytecode import bytecode_environment, compiling_beside
from aphro_core.bytecode.compiler import compile_all, find_source, imports_of

SOURCE = """
import alpha.beta, gamma
from delta import one, two
from . import sibling
from .near import thing
from ..above import other
import typing
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import unseen
if typing.TYPE_CHECKING:
    from unseen import also
else:
    import otherwise
try:
    import tried
except ImportError:
    import instead
if one:
    import perhaps
def function():
    import later
"""


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    find_source.cache_clear()
    compiler._finder.cache_clear()


def test_imports_at_the_top_of_a_module() -> None:
    found = imports_of(compile(SOURCE, "source", "exec"), "pack.inner")
    assert found == {
        *("alpha.beta", "gamma", "delta", "delta.one", "delta.two"),
        *("pack.inner", "pack.inner.sibling", "pack.inner.near", "pack.inner.near.thing", "pack.above"),
        *("pack.above.other", "typing", "typing.TYPE_CHECKING", "otherwise", "tried", "instead", "perhaps"),
    }


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that leads to all its modules but one."""
    texts = {
        "__init__": "from .first import *",
        "first": "from rooted.folder import second\nimport rooted.broken",
        "folder/__init__": "raise SystemExit('nothing is executed')",
        "folder/second": "from .. import third",
        "third": "import missing_altogether",
        "broken": "def",
        "unreached": "",
    }
    for name, text in texts.items():
        path = tmp_path / "rooted" / f"{name}.py"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "rooted"


def test_what_is_led_to_is_compiled(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_ROOTS", ("rooted", "nowhere.to.be.found"))
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert compile_all(2) == 6
    made = {path.relative_to(package).with_suffix("").as_posix() for path in package.rglob("*.py")}
    compiled = {name for name in made if Path(cache_from_source(str(package / f"{name}.py"))).exists()}
    assert compiled == made - {"broken", "unreached"}
    assert all(bytecode._bytecode_of(package / f"{name}.py", str(tmp_path / "cache")).exists() for name in compiled)


def test_which_modules_are_python(package: Path) -> None:
    source = find_source("rooted.folder")
    assert source is not None
    assert source.is_package
    assert find_source("rooted.folder.second") == ("rooted.folder.second", str(package / "folder" / "second.py"), False)
    assert find_source("math") is None
    assert find_source("rooted.third.inside") is None


def test_where_bytecode_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = tmp_path / "torch" / "__init__.py"
    torch.parent.mkdir()
    torch.touch()
    monkeypatch.setattr(bytecode, "_torch", lambda: torch)
    writes_none = {"PYTHONDONTWRITEBYTECODE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert bytecode_environment({}) == {}, "Python itself writes it beside torch"
    folder = str(tmp_path / "cache" / "aphro" / "bytecode")
    ours = {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
    assert bytecode_environment(writes_none) == ours
    assert Path(folder).stat().st_mode & 0o777 == 0o700
    assert bytecode_environment({**writes_none, "PYTHONPYCACHEPREFIX": "/elsewhere"}) == {}
    monkeypatch.setattr(os, "access", lambda path, mode: path != torch.parent)
    assert bytecode_environment({"XDG_CACHE_HOME": str(tmp_path / "cache")}) == ours
    (tmp_path / "file").touch()
    assert bytecode_environment({**writes_none, "XDG_CACHE_HOME": str(tmp_path / "file")}) == {}
    own = bytecode._bytecode_of(torch, "")
    own.parent.mkdir()
    own.touch()
    assert str(own) == cache_from_source(str(torch))
    assert bytecode_environment(writes_none) == {}
    monkeypatch.setattr(bytecode, "_torch", lambda: None)
    assert bytecode_environment(writes_none) == {}


def test_bytecode_is_only_kept_where_nobody_else_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").touch()
    monkeypatch.setattr(bytecode, "_torch", lambda: tmp_path / "torch.py")
    environment = {"PYTHONDONTWRITEBYTECODE": "1", "XDG_CACHE_HOME": str(tmp_path)}
    folder = Path(bytecode_environment(environment)["PYTHONPYCACHEPREFIX"])
    for mode in (0o720, 0o702, 0o777):
        folder.chmod(mode)
        assert bytecode_environment(environment) == {}
    folder.chmod(0o755)
    assert bytecode_environment(environment)
    for seconds in (0, 946_684_800):  # of images whose files all have one time: a later torch would not be seen
        os.utime(tmp_path / "torch.py", (seconds, seconds))
        assert bytecode_environment(environment) == {}
    os.utime(tmp_path / "torch.py")
    assert bytecode_environment(environment)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert bytecode_environment(environment) == {}


def test_without_a_home_a_start_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(bytecode, "_torch", lambda: tmp_path / "torch" / "__init__.py")
    monkeypatch.setattr(Path, "home", no_home)
    assert bytecode_environment({"PYTHONDONTWRITEBYTECODE": "1"}) == {}


def test_a_folder_that_may_not_be_read_has_no_bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another user, say: Python itself passes over it."""

    def stat(*arguments: object, **options: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", stat)
    is_there = bytecode._is_there(Path("/site/torch/__init__.py"), "/of/another")
    monkeypatch.undo()
    assert not is_there


@pytest.mark.parametrize(
    ("writes_none", "is_writable", "num_cores", "expected"),
    [(False, True, 8, 1), (True, True, 8, 0), (False, False, 8, 0), (False, True, 3, 0)],
)
def test_processes_beside_end_with_the_block(
    writes_none: bool,
    is_writable: bool,
    num_cores: int,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: is_writable)
    monkeypatch.setattr(sys, "dont_write_bytecode", writes_none)
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    monkeypatch.setattr(bytecode, "num_cores", lambda: num_cores)
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*words: object, **options: object) -> subprocess.Popen[bytes]:
        started.append(popen(*words, **options))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    with compiling_beside():
        assert [process.poll() for process in started] == [None] * expected
    assert all(process.returncode is not None for process in started)
