"""``aphro estimate`` as it is typed: the JSON contract, exit codes, plans, comparison, and what it must not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aphro_cli import estimate_view
from aphro_cli.estimate_options import parse_memory, parse_plan
from aphro_cli.main import app
from aphro_core import host
from aphro_core.cluster.messages import Memory, Node, NodeRow, Status
from aphro_core.errors import UsageError
from tests.core.estimate.configs import GEMMA3_27B, GPT_OSS_20B, LLAMA_8B, QWEN_72B


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write(tmp_path, LLAMA_8B)


def write(folder: Path, values: dict[str, Any], name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(values))
    return path


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["estimate", *map(str, words)])
    return result.exit_code, result.stdout, result.stderr


def run_json(*words: object) -> tuple[int, dict[str, Any]]:
    code, out, _ = run(*words, "--json")
    found: dict[str, Any] = json.loads(out)
    return code, found


def test_json_contract(config: Path) -> None:
    code, found = run_json(config, "--gpu", "H100", "-tp", 2, "--max-model-len", 8192)
    assert code == 0
    assert found["block_size"] == 16
    assert found["tokens"] == found["num_blocks"] * 16
    assert found["max_concurrency"] == pytest.approx(found["tokens"] / 8192, rel=0.01)
    assert found["fits"] is True
    assert found["limiting_rank"] == 0
    keys = {"rank", "stage", "tp_rank", "weights_bytes", "kv_bytes", "activation_bytes", "overhead_bytes", "num_blocks"}
    assert all(keys <= rank.keys() for rank in found["per_rank"])
    assert min(rank["num_blocks"] for rank in found["per_rank"]) == found["num_blocks"]
    (plan,) = found["plans"]
    assert {"tp", "pp", "legal", "reason", "num_blocks", "tokens", "recommended"} <= plan.keys()


def test_plans_and_the_recommended_one(tmp_path: Path) -> None:
    path = write(tmp_path, QWEN_72B)
    code, found = run_json(path, "--gpu", "L40S", "--max-gpus", 8, "--gpus-per-node", 4, "--max-model-len", 8192)
    assert code == 0
    assert {plan["tp"] * plan["pp"] for plan in found["plans"]} == set(range(1, 9))
    (best,) = [plan for plan in found["plans"] if plan["recommended"]]
    assert (best["tp"], best["pp"]) == (4, 1)
    assert "does not fit" in next(plan["reason"] for plan in found["plans"] if plan["tp"] * plan["pp"] == 1)
    assert "uneven: 3+3+2" in next(plan["reason"] for plan in found["plans"] if (plan["tp"], plan["pp"]) == (3, 1))


def test_a_bare_config_is_quantised_where_older_writers_say_so(tmp_path: Path) -> None:
    plain = run_json(write(tmp_path, QWEN_72B), "--gpu", "H200", "-tp", 1, "-pp", 1)[1]
    scheme = {"quant_method": "fp8", "activation_scheme": "static"}
    path = write(tmp_path, QWEN_72B | {"compression_config": scheme}, "other.json")
    found = run_json(path, "--gpu", "H200", "-tp", 1, "-pp", 1)[1]
    assert found["per_rank"][0]["weights_bytes"] < 0.6 * plain["per_rank"][0]["weights_bytes"]


def test_does_not_fit(tmp_path: Path) -> None:
    path = write(tmp_path, QWEN_72B)
    code, found = run_json(path, "--gpu", "A100-80GB", "-tp", 1, "-pp", 1)
    assert (code, found["fits"], found["tokens"]) == (5, False, 0)
    assert found["missing_bytes"] > 60 * 2**30
    assert "rank" in found["reason"] or "device" in found["reason"]
    assert found["remedies"]
    again = run_json(path, "--gpu", "A100-80GB", *found["remedies"][0]["flags"].split())[1]
    assert (again["fits"], again["tokens"]) == (True, found["remedies"][0]["tokens"])
    _, out, _ = run(path, "--gpu", "A100-80GB", "-tp", 1, "-pp", 1)
    assert "try: -tp" in out


def test_illegal_sizes(config: Path, tmp_path: Path) -> None:
    code, found = run_json(config, "--gpu", "H100", "-tp", 64)
    assert (code, found["fits"], found["plans"][0]["legal"]) == (4, False, False)
    assert "32 query heads" in found["reason"]
    code, found = run_json(config, "--gpu", "H100", "-tp", 5, "--engine", "vllm:0.19.0")
    assert (code, found["fits"]) == (4, False)
    assert "128256 does not divide by 5" in found["reason"]
    scheme = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    quantised = write(tmp_path, QWEN_72B | {"quantization_config": scheme}, "gptq.json")
    _, found = run_json(quantised, "--gpu", "4090", "--engine", "vllm:0.19.0", "-tp", 2)
    assert "29568 / 2 = 14784 columns are not whole groups of 128" in found["reason"]
    assert run_json(quantised, "--gpu", "4090", "-tp", 3, "--max-model-len", 8192)[1]["fits"]  # aphro cuts by groups


def test_length_is_fitted(config: Path) -> None:
    _, found = run_json(config, "--gpu", "4090", "--max-model-len", "auto", "-tp", 1)
    length = found["settings"]["max_model_len"]
    assert 16 < length < 131072
    assert found["max_concurrency"] == pytest.approx(1, abs=0.01)
    assert found["fits"]


def test_each_option_moves_what_it_should(config: Path) -> None:
    words = (config, "--gpu", "H100", "-tp", 1, "--engine", "vllm:0.19.0", "--max-model-len", 8192)
    plain = run_json(*words)[1]
    changes: dict[tuple[object, ...], int] = {  # option -> whether there are more blocks than without
        ("--kv-cache-dtype", "fp8"): 1,
        ("-q", "fp8"): 1,
        ("-gmu", 0.8): -1,
        ("--max-num-seqs", 64): 1,
        ("--max-num-batched-tokens", 131072): -1,
        ("--dtype", "float32"): -1,
        ("--block-size", 32): -1,
        ("--enable-lora", "--max-lora-rank", 64): -1,
        ("--draft-layers", 1): -1,
        ("--enforce-eager",): 0,  # graphs come after sizing in 0.19
        ("--gpu-memory", "70GiB"): -1,
    }
    for change, sign in changes.items():
        changed = run_json(*words, *change)[1]
        difference = changed["num_blocks"] - plain["num_blocks"]
        assert (difference > 0) - (difference < 0) == sign, change
    eager = run_json(*words[:-4], "--engine", "vllm:0.21.0", "--max-model-len", 8192, "--enforce-eager")[1]
    graphs = run_json(*words[:-4], "--engine", "vllm:0.21.0", "--max-model-len", 8192)[1]
    assert eager["num_blocks"] > graphs["num_blocks"]


def test_hybrids_say_which_number_counts(tmp_path: Path) -> None:
    _, out, _ = run(write(tmp_path, GEMMA3_27B), "--gpu", "H100", "--engine", "vllm:0.19.0", "-tp", 1)
    assert "7 groups" in out
    assert "concurrency and the longest request count" in " ".join(out.split())


def test_compare(config: Path, tmp_path: Path) -> None:
    other = write(tmp_path, GPT_OSS_20B, "other.json")
    code, out, _ = run("--compare", f"{config},{other}", "--gpu", "H100", "--engine", "vllm:0.19.0")
    assert code == 0
    assert "decode ceiling" in out
    _, found = run_json(config, "--compare", "4x1,2x2", "--gpu", "L40S")
    sizes = [(each["settings"]["tensor_parallel_size"], each["settings"]["pipeline_parallel_size"])
             for each in found["compare"]]  # fmt: skip
    assert sizes == [(4, 1), (2, 2)]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ((), "MODEL is missing"),
        (("--gpu", "Voodoo2"), "not in the table"),
        (("--gpu", "H1000"), "near it: H100"),
        (("--gpu", "H100", "--block-size", "7"), "8, 16, 32"),
        (("--engine", "orca"), "aphro, vllm"),
        (("--engine", "vllm:sometime"), "release"),
        (("--gpu-memory", "lots"), "GiB"),
        (("--gpu", "H100", "-q", "zip"), "allowed"),
        (("--gpu", "H100", "-gmu", "1.5"), "up to 1"),
        (("--gpu", "H100", "--kv-cache-dtype", "int3"), "allowed"),
        (("--gpu", "H100", "--compare", "a"), "two models"),
        (("--engine", "vllm:0.19.0", "--device", "cpu"), "--gpu"),
    ],
)
def test_refusals(words: tuple[str, ...], hint: str, config: Path) -> None:
    code, out, err = run(*([config] if words else []), *words)
    assert code == 2
    assert out == ""
    assert "error:" in err
    assert hint in err


def test_what_is_no_model(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nothing.gguf"), "nothing.json"):  # and not looked for on the Hub
        code, _, err = run(name, "--gpu", "H100")
        assert code == 3
        assert "no model at" in err
    assert run(write(tmp_path, {"model_type": "llama"}), "--gpu", "H100")[0] == 3


def test_what_may_not_start_comes_with_what_makes_it_safe(config: Path) -> None:
    words = (config, "-tp", 1, "--max-model-len", 24000)
    code, found = run_json(*words, "--gpu-memory", 23.5)
    assert (code, found["verdict"]) == (0, "may_not_start")
    assert "within the estimate's" in found["reason"]
    for way in found["remedies"]:
        assert run_json(*words, "--gpu-memory", 23.5, *way["flags"].split())[1]["verdict"] == "fits"
    code, found = run_json(*words, "--gpu-memory", 23.2)
    assert (code, found["verdict"]) == (5, "does_not_fit")
    assert "it may start" in found["reason"]


def test_layers_that_do_not_add_up_are_not_a_matter_of_tp(config: Path) -> None:
    code, _, err = run(config, "--gpu", "H100", "--pp-layers", "1,2")
    assert code == 4
    assert "add up to 32" in err.partition("try:")[2]


def test_text_fits_the_page(config: Path) -> None:
    _, out, _ = run(config, "--gpu", "H100", "-tp", 2, "-pp", 2)
    assert "# GPU blocks: " in out
    assert "KV cache size: " in out
    assert "\x1b" not in out
    assert out.count(" <") == 1


def test_answers_without_torch_or_network(config: Path) -> None:
    """A bare config needs the estimate's own room and nothing that is slow to import."""
    program = (
        "import sys\n"
        "from aphro_cli.main import app\n"
        f"try: app(['estimate', {str(config)!r}, '--gpu', 'H100', '--json'])\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'rich', 'anyio'} & set(sys.modules)\n"
        "print(sorted(slow), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert json.loads(done.stdout)["fits"]


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * 2**30), ("24", 24 * 2**30), ("81559MiB", 81559 * 2**20), ("24 GB", 24 * 10**9)]
)
def test_memory_sizes(text: str, size: int) -> None:
    assert parse_memory(text) == size


def test_memory_of_nothing() -> None:
    with pytest.raises(UsageError):
        parse_memory("0")


@pytest.mark.parametrize(
    ("text", "plan"), [("4x2", (4, 2)), ("tp4", (4, 1)), ("tp4pp2", (4, 2)), ("owner/model", None), ("./4x2", None)]
)
def test_plans_as_typed(text: str, plan: tuple[int, int] | None) -> None:
    assert parse_plan(text) == plan


def test_this_hosts_gpus(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest card counts, and memory that other processes hold is not promised."""
    gib = 2**30
    cards = [host.GpuMemory("NVIDIA L4", 22 * gib, 22 * gib), host.GpuMemory("NVIDIA L4", 22 * gib, 20 * gib)]
    monkeypatch.setattr(host, "gpu_memory", lambda: cards)
    plans = run_json(config, "--max-model-len", 4096)[1]["plans"]
    assert {plan["tp"] * plan["pp"] for plan in plans} == {1, 2}
    found = run_json(config, "--max-model-len", 4096, "-tp", 1)[1]
    assert found["settings"]["device_name"] == "L4"
    cards[1] = cards[0]
    free = run_json(config, "--max-model-len", 4096, "-tp", 1)[1]
    assert free["per_rank"][0]["overhead_bytes"] == found["per_rank"][0]["overhead_bytes"] - 2 * gib


def test_a_card_that_nobody_knows(config: Path) -> None:
    code, found = run_json(config, "--gpu", "Voodoo2", "--gpu-memory", "33GiB", "--max-model-len", 4096)
    assert (code, found["settings"]["device_name"]) == (0, None)
    assert any("Voodoo2" in note for note in found["assumed"])


def nodes_of(*gpus: list[tuple[int, int]], free_gib: int = 100) -> Status:
    """A status of nodes with GPUs of (total, free) GiB, the last one of which has left."""
    rows = []
    for number, cards in enumerate(gpus):
        node = Node(
            id=str(number), name=f"n{number}", role="worker", address=f"10.0.0.{number}", interface="eth0",
            devices=len(cards) or 4, resource="GPU" if cards else "CPU", device_names=["NVIDIA L4"] if cards else [],
            versions={}, started_at=0.0,
        )  # fmt: skip
        memory = Memory(free_gib * 2**30, [free * 2**30 for _, free in cards], [total * 2**30 for total, _ in cards])
        state = "in" if number < len(gpus) - 1 else "silent"
        rows.append(NodeRow(node=node, state=state, age_seconds=0.0, memory=memory))
    return Status(rows, [], [])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, Status]:
    answers: dict[str, Status] = {}
    monkeypatch.setattr("aphro_core.cluster.asking.membership", lambda: None)
    monkeypatch.setattr("aphro_core.cluster.asking.read_status", lambda here: answers["now"])
    return answers


def test_the_joined_clusters_devices(config: Path, cluster: dict[str, Status]) -> None:
    cluster["now"] = nodes_of([(22, 22)] * 4, [(22, 20), (21, 21)], [(80, 80)])
    _, found = run_json(config, "--cluster", "--max-model-len", 4096)
    assert found["settings"]["device_bytes"] == 21 * 2**30
    assert max(plan["tp"] * plan["pp"] for plan in found["plans"]) == 6
    assert any("6 x NVIDIA L4 of 2 nodes of the cluster" in note for note in found["assumed"])
    assert any("across hosts" in plan["reason"] for plan in found["plans"] if plan["tp"] > 2)
    cluster["now"] = nodes_of([], [], [])
    _, found = run_json(config, "--cluster", "--max-model-len", 4096, "-tp", 2)
    assert (found["settings"]["device_kind"], found["settings"]["device_bytes"]) == ("cpu", 100 * 2**30)
    # eight slots on two nodes: two ranks share one of them, eight have four on each
    kv_bytes = {
        tp: run_json(config, "--cluster", "--max-model-len", 4096, "-tp", tp)[1]["per_rank"][0]["kv_bytes"]
        for tp in (1, 2, 4)
    }
    assert kv_bytes[1] < 50 * 2**30
    assert kv_bytes[2] < 25 * 2**30
    assert kv_bytes[4] < 12.5 * 2**30
    whole = run_json(config, "--cluster", "--max-model-len", 4096, "-tp", 4, "-pp", 2)[1]["per_rank"][0]
    assert 12 * 2**30 < whole["kv_bytes"] + whole["weights_bytes"] + whole["activation_bytes"] < 12.6 * 2**30


def test_a_cluster_is_not_a_card(config: Path) -> None:
    assert run(config, "--cluster", "--gpu", "H100")[0] == 2
    code, _, told = run(config, "--cluster")
    assert code != 0
    assert "cluster" in told


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize(
    "values", [LLAMA_8B, QWEN_72B, GEMMA3_27B, GPT_OSS_20B], ids=lambda values: values["model_type"]
)
def test_lines_fit_the_terminal(
    columns: int, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate_view, "_columns", lambda: min(columns, 120))
    monkeypatch.chdir(tmp_path)
    write(tmp_path, values)
    for words in (["--gpu", "4090"], ["--gpu", "H100", "--engine", "vllm:0.19.0", "-gmu", 0.95, "--max-gpus", 4]):
        _, out, _ = run("config.json", *words)
        assert [line for line in out.splitlines() if len(line) > columns and not line.startswith("try:")] == []
