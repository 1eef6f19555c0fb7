"""``aphro run --dry-run``: the plan and its memory, what it refuses, and that nothing is started or left behind."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aphro_cli.main import app
from aphro_core import api
from aphro_core.errors import ExitCode
from tests.core.estimate.configs import LLAMA_8B


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model's config."""
    folder: Path = tmp_path_factory.mktemp("dry_run")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 5, "vocab_size": 512}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(LLAMA_8B | sizes))
    return folder


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "serve", lambda *_: pytest.fail("a server was started"))


def dry_run(model: Path, *words: object, **environment: str) -> Any:
    command = ["run", str(model), "--device", "cpu", "--port", "0", "--dry-run"]
    command += ["--load-format", "dummy", *map(str, words)]
    return CliRunner().invoke(app, command, env={"APHRO_API_KEY": None, **environment})


def test_the_plan(model: Path) -> None:
    result = dry_run(model, "-tp", 3, "-pp", 2, "--max-num-seqs", 4)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "LlamaForCausalLM: tp 3 x pp 2, " + lines[0].split()[-1]
    assert [line.split()[:1] for line in lines[2:8]] == [[str(rank)] for rank in range(6)]
    assert "# CPU blocks: 1024" in lines  # what 4 requests of 4,096 tokens can use
    assert "Maximum concurrency for 4,096 tokens per request: 4.00x" in lines
    assert "1 engine and 6 workers" in result.stdout
    assert "(no API key), as dry_run" in result.stdout
    assert max(map(len, lines)) <= 100


def test_ranks_on_other_hosts(model: Path) -> None:
    """Where they would run, and no figure that this host cannot know."""
    words = ("-tp", 2, "-pp", 2, "--hosts", "near:3,far:2")
    result = dry_run(model, *words)
    assert result.exit_code == 0, result.stderr
    assert "that of other hosts is not known here" in result.stdout
    assert "4 workers over ssh" in result.stdout
    found = json.loads(dry_run(model, *words, "--json").stdout)
    assert [rank["host"] for rank in found["per_rank"]] == ["near", "near", "far", "far"]
    assert (found["num_blocks"], found["tokens"], found["max_concurrency"]) == (None, None, None)


def test_json_adds_up(model: Path) -> None:
    found = json.loads(dry_run(model, "-tp", 2, "-pp", 2, "--api-key", "secret", "--json").stdout)
    assert [rank["rank"] for rank in found["per_rank"]] == [0, 1, 2, 3]
    assert found["tokens"] == found["num_blocks"] * found["block_size"]
    assert found["max_concurrency"] == found["tokens"] / found["max_model_len"]
    assert [(rank["first_layer"], rank["last_layer"]) for rank in found["per_rank"]] == [(0, 2), (0, 2), (3, 4), (3, 4)]
    assert sum(rank["num_heads"] for rank in found["per_rank"][:2]) == 8
    assert found["num_blocks"] <= min(rank["num_blocks"] for rank in found["per_rank"])
    assert (found["num_api_keys"], found["problem"], found["fetch_bytes"]) == (1, None, 0)


def test_the_environment_without_secrets(model: Path) -> None:
    variables = {"NCCL_SOCKET_IFNAME": "eth7", "HF_TOKEN": "hf_secret", "APHRO_API_KEY": "secret", "PATH_TO": "x"}
    result = dry_run(model, "--json", "-e", "ANY=1", "-e", "MY_TOKEN=a secret", **variables)
    environment = json.loads(result.stdout)["environment"]
    assert environment["NCCL_SOCKET_IFNAME"] == "eth7"
    assert environment["TOKENIZERS_PARALLELISM"] == "false"
    assert environment["HF_TOKEN"] == environment["APHRO_API_KEY"] == environment["MY_TOKEN"] == "set, not shown"
    assert environment["ANY"] == "1"
    assert environment.keys() >= {"OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME"}
    assert "PATH_TO" not in environment
    assert "secret" not in result.output.replace("a secret", "")


def test_what_would_not_fit_is_said_with_the_plan(model: Path) -> None:
    result = dry_run(model, "--num-gpu-blocks-override", 3)
    assert result.exit_code == ExitCode.MEMORY
    assert "# CPU blocks: 3\n" in result.stdout
    assert "error: To serve at least one request" in result.stderr
    assert result.stderr.endswith("try: --max-model-len 48\n")
    problem = json.loads(dry_run(model, "--num-gpu-blocks-override", 3, "--json").stdout)["problem"]
    assert (problem["exit_code"], problem["hint"]) == (5, "--max-model-len 48")
    shortened = dry_run(model, "--num-gpu-blocks-override", 3, "--max-model-len", "auto")
    assert (shortened.exit_code, "for 48 tokens per request: 1.00x" in shortened.stdout) == (0, True)


def test_what_a_start_refuses(model: Path) -> None:
    assert dry_run(model, "-tp", 9).exit_code == ExitCode.PLACEMENT
    assert dry_run(model / "none").exit_code == ExitCode.MODEL
    assert dry_run(model, "--host", "0.0.0.0").exit_code == ExitCode.USAGE
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = dry_run(model, "--port", taken.getsockname()[1])
    assert result.exit_code == ExitCode.ADDRESS
    assert result.stdout == ""


def test_nothing_is_left(model: Path, tmp_path: Path) -> None:
    """The port is free again, and the ready file of a running server stays."""
    ready = tmp_path / "ready.json"
    ready.write_text("{}")
    result = dry_run(model, "--json", "--json-ready", ready)
    port = int(json.loads(result.stdout)["url"].rsplit(":", 1)[1])
    assert ready.read_text() == "{}"
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_json_alone_is_refused(model: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(model), "--json"])
    assert result.exit_code == ExitCode.USAGE
    assert "--json is for --dry-run and --print-config" in result.stderr
