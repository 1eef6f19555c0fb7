"""``--config`` and ``--print-config``: which value wins, what is refused and where it stands, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from aphro_cli.config_file import read_entries
from aphro_cli.effective import render_values
from aphro_cli.main import app
from aphro_core import api
from aphro_core.errors import ExitCode

YAML = """\
# a comment
model: ./llama
tp: 2
pipeline_parallel_size: 3
--pp-layers: [4, 3, 3]
gpu-memory-utilization: 0.5
enable-prefix-caching: false
enforce-eager: yes
api-key: [one, two]
served-model-name: "007"
revision: 0123
allowed-origins: ["http://a", "http://b:1"]
allowed-methods: '["POST"]'
"""
TOML = """\
model = "./llama"
tp = 2
pipeline_parallel_size = 3
"pp-layers" = [4, 3, 3]
gpu-memory-utilization = 0.5
enable-prefix-caching = false
enforce-eager = true
api-key = ["one", "two"]
served-model-name = "007"
revision = "0123"
allowed-origins = ["http://a", "http://b:1"]
allowed-methods = '["POST"]'
"""


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[api.ServeOptions]:
    """The options of every start; nothing is started."""
    found: list[api.ServeOptions] = []
    monkeypatch.delenv("APHRO_API_KEY", raising=False)
    monkeypatch.delenv("APHRO_LOG_LEVEL", raising=False)
    monkeypatch.setattr(api, "serve", lambda options, reporter: found.append(options) or 0)
    return found


def run(*words: object, **environment: str) -> Any:
    return CliRunner().invoke(app, ["run", *map(str, words)], env=environment)


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    file.chmod(0o600)
    return file


@pytest.mark.parametrize(("text", "name"), [(YAML, "run.yaml"), (YAML, "run.yml"), (TOML, "run.toml")])
def test_values_are_as_typed(text: str, name: str, tmp_path: Path, starts: list[api.ServeOptions]) -> None:
    result = run("--config", write(tmp_path, text, name))
    assert result.exit_code == 0, result.stderr
    (options,) = starts
    assert options == api.ServeOptions(
        model="./llama",
        tensor_parallel_size=2,
        pipeline_parallel_size=3,
        pp_layers=(4, 3, 3),
        gpu_memory_utilization=0.5,
        enable_prefix_caching=False,
        enforce_eager=True,
        api_keys=("one", "two"),
        served_model_name="007",
        revision="0123",
        allowed_origins=("http://a", "http://b:1"),
        allowed_methods=("POST",),
    )
    assert result.stderr == ""


def test_flags_win_then_the_environment(tmp_path: Path, starts: list[api.ServeOptions]) -> None:
    file = write(tmp_path, YAML)
    words = ("-tp", 1, "other", "--config", file, "--enable-prefix-caching")
    assert run(*words, APHRO_API_KEY="three").exit_code == 0
    (options,) = starts
    assert (options.model, options.tensor_parallel_size, options.pipeline_parallel_size) == ("other", 1, 3)
    assert options.enable_prefix_caching
    assert options.api_keys == ("three",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "model: x\ntensor-paralel-size: 2\n",
            "line 2: 'tensor-paralel-size' is not an option\ntry: the nearest is",
        ),
        ("model: x\n\ntp: 2\n-tp: 3\n", "line 4: '-tp' stands in line 3 already"),
        ("tp: two\n", "line 1: tensor-parallel-size: "),
        ("tp: 0\n", "line 1: tensor-parallel-size: "),
        ("tp: 2.5\n", "line 1: tensor-parallel-size: "),
        ("tp: true\n", "line 1: tp is true, which is a switch's"),
        ("dtype: int3\n", "line 1: dtype: "),
        ("served-model-name: no\n", 'try: a text is quoted: "false"'),
        ("enforce-eager: 1\n", "line 1: enforce-eager is '1', allowed: true or false"),
        ("port:\n", "line 1: port has no value"),
        ("model: x\nserver:\n  port: 1\n", "line 2: server is nested"),
        ("model: x\n  tp: 2\n", "line 2: "),
        ("- tp\n", "line 1: expected KEY: VALUE"),
        ("dry-run: true\n", "line 1: 'dry-run' is not an option"),
        ("config: other.yaml\n", "line 1: 'config' is not an option"),
    ],
)
def test_what_a_file_may_not_say(text: str, said: str, tmp_path: Path, starts: list[api.ServeOptions]) -> None:
    result = run("--config", write(tmp_path, text), "model")
    assert result.exit_code == ExitCode.USAGE
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert starts == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model = 'x'\n\n[server]\nport = 1\n", "line 3: server is nested"),
        ("model = 'x'\ntensor-size = 2\n", "line 2: 'tensor-size' is not an option"),
        ("model = x\n", "line 1"),
        ("tp = true\n", "line 1: tp is true"),
        ("port = []\nhost = 'a'\n", "line 1: port: "),
    ],
)
def test_what_a_toml_file_may_not_say(text: str, said: str, tmp_path: Path, starts: list[api.ServeOptions]) -> None:
    result = run("--config", write(tmp_path, text, "run.toml"), "model")
    assert (result.exit_code, starts) == (ExitCode.USAGE, [])
    assert said in result.stderr


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for file, said in ((tmp_path / "none.yaml", "cannot be read"), (write(tmp_path, "", "run.ini"), "neither YAML")):
        result = run("--config", file, "model")
        assert result.exit_code == ExitCode.USAGE
        assert said in result.stderr
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in run("--config", tmp_path / "bytes.yaml", "model").stderr


def test_an_empty_file_says_nothing(tmp_path: Path, starts: list[api.ServeOptions]) -> None:
    assert run("--config", write(tmp_path, "# nothing\n"), "model").exit_code == 0
    assert starts == [api.ServeOptions(model="model")]


def test_keys_that_others_can_read(tmp_path: Path, starts: list[api.ServeOptions]) -> None:
    file = write(tmp_path, "api-key: secret\n")
    file.chmod(0o644)
    result = run("--config", file, "model")
    assert "others can read it: chmod 600" in result.stderr
    assert starts[0].api_keys == ("secret",)


def test_print_config_has_no_secret(starts: list[api.ServeOptions]) -> None:
    result = run("model", "--print-config", "-e", "NCCL_DEBUG=INFO", "-e", "HF_TOKEN=hf_secret")
    assert "hf_secret" not in result.stdout
    assert [line for line in result.stdout.splitlines() if line.startswith("env: ") and "NCCL_DEBUG=INFO" in line]


def test_print_config_says_where_values_are_from(tmp_path: Path, starts: list[api.ServeOptions]) -> None:
    file = write(tmp_path, YAML)
    result = run("--config", file, "--port", 8000, "--print-config", APHRO_LOG_LEVEL="warning")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert f"tensor-parallel-size: 2  # {file} line 3" in lines
    assert "port: 8000  # command line" in lines
    assert "log-level: warning  # APHRO_LOG_LEVEL" in lines
    assert "block-size: 16  # default" in lines
    assert f"# api-key:  # {file} line 9; 2 set, not shown" in lines
    assert "one" not in [word for line in lines for word in line.split()]
    rows = json.loads(run("--config", file, "--print-config", "--json").stdout)
    assert {"key": "tensor-parallel-size", "value": 2, "source": f"{file} line 3"} in rows
    assert starts == []


def test_what_is_printed_can_be_read_again(tmp_path: Path, starts: list[api.ServeOptions]) -> None:
    words = ("./my model", "-tp", 3, "-pp", 2, "--pp-layers", "4,3", "--served-model-name", "no # 7", "--drain-seconds")
    words = (*words, "inf", "--no-enable-prefix-caching", "--max-model-len", "auto", "--revision", "0123")
    words = (*words, "--allowed-origins", '["http://a"]', "--allowed-headers", "[]")
    printed = run(*words, "--print-config")
    assert printed.exit_code == 0, printed.stderr
    assert run(*words).exit_code == run("--config", write(tmp_path, printed.stdout)).exit_code == 0
    assert starts[0] == starts[1]
    assert starts[0].served_model_name == "no # 7"


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_survives_printing(value: str) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        text = "\n".join(render_values([{"key": "host", "value": value, "source": "command line"}]))
        (entry,) = read_entries(write(Path(folder), text))
    assert entry.value == value
