"""``aphro run``: how options may be typed, what reaches the core, and what each failure exits with."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from aphro_cli.main import app
from aphro_cli.run import run
from aphro_core import api
from aphro_core.errors import (
    AddressError,
    AphroError,
    EngineDeadError,
    ExitCode,
    MemoryBudgetError,
    ModelError,
    PlacementError,
)
from aphro_core.reporter import Reporter

ROOT = Path(__file__).parent.parent.parent
Aphro = Callable[..., Any]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[api.ServeOptions]:
    """The options of every start; nothing is started."""
    for name in ("APHRO_API_KEY", "APHRO_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    starts: list[api.ServeOptions] = []

    def serve(options: api.ServeOptions, reporter: Reporter) -> int:
        starts.append(options)
        reporter.ready("http://127.0.0.1:1", "model", "curl")
        return 0

    monkeypatch.setattr(api, "serve", serve)
    return starts


def aphro(*words: str, env: dict[str, str] | None = None) -> Any:
    return CliRunner().invoke(app, list(words), env=env)


@pytest.mark.parametrize(
    "words",
    [
        "-tp 3 -pp 2 -gmu 0.5 --max-num-seqs 7",
        "-tp=3 -pp=2 -gmu=0.5 --max-num-seqs=7",
        "--tensor-parallel-size 3 --pipeline-parallel-size=2 --gpu-memory-utilization 0.5 --max_num_seqs=7",
        "--tensor_parallel_size=3 --pipeline_parallel_size 2 --gpu_memory_utilization=0.5 --max_num_seqs 7",
    ],
)
@pytest.mark.parametrize("command", ["run", "serve"])
def test_spellings(command: str, words: str, served: list[api.ServeOptions]) -> None:
    result = aphro(command, "some_model/with_underscores", *words.split())
    assert result.exit_code == 0, result.stderr
    (options,) = served
    assert options.model == "some_model/with_underscores"  # only names are normalised, never values
    assert (options.tensor_parallel_size, options.pipeline_parallel_size) == (3, 2)
    assert (options.gpu_memory_utilization, options.max_num_seqs) == (0.5, 7)


def test_options_before_the_model(served: list[api.ServeOptions]) -> None:
    assert aphro("run", "-tp", "2", "model").exit_code == 0
    assert served[0].model == "model"


def test_defaults_are_the_cores_own(served: list[api.ServeOptions]) -> None:
    assert aphro("run", "model").exit_code == 0
    assert served[0] == api.ServeOptions(model="model")


def test_every_option_reaches_the_core(served: list[api.ServeOptions], tmp_path: Path) -> None:
    """Each flag is given a value that is not its default; no field of ServeOptions stays at its default."""
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    words = f"""--deterministic
        -tp 2 -pp 3 --pp-layers 4,3,3 --distributed-executor-backend mp --device cpu --dtype half
        --max-model-len 99 --enable-expert-parallel --max-num-seqs 8 --max-num-batched-tokens 512 -gmu 0.8
        --max-num-prefill-tokens 600 --enforce-eager --cpu-memory-utilization 0.4 --block-size 32
        --num-gpu-blocks-override 77 --no-enable-prefix-caching --load-format dummy -q int4
        --revision v1 --model-from head --verify full --kv-cache-dtype fp8
        --served-model-name name --chat-template {template} --skip-tokenizer-init --seed 5 --host 0.0.0.0 --port 8000
        --api-key one --api-keys two --max-queued-requests 9 --drain-seconds 3 --json-ready {tmp_path}/ready.json
        --start-timeout 60 --distributed-timeout 20 --step-timeout 9 --max-recoveries 2 --hosts a:2
        --wait-nodes 2 --wait-timeout 9 -e A=b --queue-timeout 50 --request-timeout 70
        --allowed-origins ["http://a"] --allowed-methods ["POST"] --allowed-headers ["X-A"] --allow-credentials"""
    result = aphro("run", "model", *words.split())
    assert result.exit_code == 0, result.stderr
    (options,) = served
    at_default = [field.name for field in dataclasses.fields(options) if getattr(options, field.name) == field.default]
    assert at_default == []
    assert options.pp_layers == (4, 3, 3)
    assert options.dtype == "float16"
    assert options.api_keys == ("one", "two")
    assert (options.allowed_origins, options.allowed_methods) == (("http://a",), ("POST",))
    assert options.allowed_headers == ("X-A",)


def test_keys_from_the_environment(served: list[api.ServeOptions]) -> None:
    assert aphro("run", "model", "--host", "0.0.0.0", env={"APHRO_API_KEY": "one two"}).exit_code == 0
    assert served[0].api_keys == ("one", "two")


def test_an_open_address_is_refused_before_anything_starts(served: list[api.ServeOptions]) -> None:
    result = aphro("run", "model", "--host", "0.0.0.0")
    assert result.exit_code == ExitCode.USAGE
    assert "error: --host 0.0.0.0 can be reached from other machines" in result.stderr
    assert "try: set APHRO_API_KEY" in result.stderr
    assert served == []
    assert aphro("run", "model", "--host", "0.0.0.0", "--allow-anonymous").exit_code == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--distributed-executor-backend dask", "dask is not a backend"),
        ("--pp-layers 3,x", "--pp-layers is '3,x'"),
        ("--max-model-len many", "--max-model-len is 'many'"),
        ("--allowed-origins http://a", "--allowed-origins is 'http://a', allowed: a JSON list of texts"),
        ('--allowed-origins ["http://a/"]', "--allowed-origins has 'http://a/', allowed: "),
        ('--allowed-methods ["post"]', "--allowed-methods has 'post', allowed: "),
        ('--allowed-headers ["X:"]', "--allowed-headers has 'X:', allowed: "),
        ("--chat-template /none.jinja", "--chat-template /none.jinja"),
        ("--drain-seconds nan", "--drain-seconds"),
        ("-tp 0", "-tp"),
        ("-tp two", "-tp"),
        ("--port 70000", "--port"),
        ("--dtype int3", "int3"),
        ("--tensor-paralel-size 2", "--tensor-parallel-size"),
    ],
)
def test_wrong_usage(words: str, text: str, served: list[api.ServeOptions]) -> None:
    result = aphro("run", "model", *words.split())
    assert result.exit_code == ExitCode.USAGE
    assert text in result.stderr
    assert served == []


def test_a_stale_ready_file_is_gone_before_the_start(served: list[api.ServeOptions], tmp_path: Path) -> None:
    file = tmp_path / "ready.json"
    file.write_text(json.dumps({"url": "of an earlier server"}))
    assert aphro("run", "model", "--json-ready", str(file)).exit_code == 0
    assert not file.exists()


def test_unknown_variables_are_named(served: list[api.ServeOptions]) -> None:
    result = aphro("run", "model", env={"APHRO_APIKEY": "x"})
    assert "warning: APHRO_APIKEY is set" in result.stderr
    assert "APHRO_API_KEY" in result.stderr
    assert len(served) == 1


def test_talk_goes_to_stderr(served: list[api.ServeOptions]) -> None:
    result = aphro("run", "model")
    assert result.stdout == ""
    assert "ready: model answers at http://127.0.0.1:1" in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        ModelError("m", hint="h"),
        PlacementError("m", hint="h"),
        MemoryBudgetError("m", hint="h"),
        AddressError("m", hint="h"),
        EngineDeadError("m", hint="h"),
        AphroError("m", hint="h", exit_code=ExitCode.MEMORY),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_the_core(error: AphroError, monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(options: object, reporter: object) -> int:
        raise error

    monkeypatch.setattr(api, "serve", serve)
    result = aphro("run", "model")
    assert result.exit_code == error.exit_code
    assert result.stderr.endswith("error: m\ntry: h\n")


def test_the_exit_code_of_the_core_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "serve", lambda options, reporter: 7)
    assert aphro("run", "model").exit_code == 7


def test_a_missing_model_end_to_end(tmp_path: Path) -> None:
    """The whole way, in a process: no fake."""
    command = [sys.executable, "-m", "aphro_cli.main", "run", str(tmp_path / "none.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == ExitCode.MODEL, done.stderr
    assert re.search(r"^error: .*none\.gguf", done.stderr, re.MULTILINE)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_flags_named_in_the_core_exist() -> None:
    """A hint that names a flag names one that can be typed."""
    commands = list(typer.main.get_command(app).commands.values())  # type: ignore[attr-defined]
    commands += [child for command in commands for child in getattr(command, "commands", {}).values()]
    params = [param for command in commands for param in command.params]
    known = {name for param in params for name in (*param.opts, *param.secondary_opts)}
    named: dict[str, str] = {}
    for path in (ROOT / "src" / "aphro_core").rglob("*.py"):
        if path.is_relative_to(ROOT / "src" / "aphro_core" / "doctor"):
            continue  # its remedies are lines for docker, sysctl and others
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+[a-z]", path.read_text()):
            named[flag] = path.name
    foreign = {
        "--pid",
        "--merge",
        "--query-gpu",
        "--format",
        "--network",
    }  # of py-spy, gguf-split, nvidia-smi and docker
    assert {flag: file for flag, file in named.items() if flag not in known | foreign} == {}
    assert len(named) >= 5


def test_every_parameter_is_passed_on() -> None:
    """A new option cannot be forgotten in the call."""
    parameters = set(inspect.signature(run).parameters)
    fields = {field.name for field in dataclasses.fields(api.ServeOptions)}
    own = {"context", "config", "print_config", "dry_run", "as_json"}
    renamed = {"distributed_executor_backend", "api_key", "env"}
    assert parameters - fields - own == {*renamed, "allow_anonymous", "log_level"}
    assert fields - parameters == {"backend", "api_keys", "environment"}
