"""``aphro run`` as a process: it serves, says so to scripts, refuses clearly, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from aphro_core.errors import ExitCode
from tests.e2e.server_process import ServerProcess, command, descendants_of, is_running, running_server
from tests.tiny import write_tiny_checkpoint

IDS = list(range(5, 25))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    write_tiny_checkpoint(folder, "llama", max_position_embeddings=1024)
    return folder


SMALL = ("--skip-tokenizer-init", "--dtype", "float32", "--max-model-len", "1024", "--num-gpu-blocks-override", "512")


def complete(url: str, max_tokens: int = 16) -> list[int]:
    body = {"prompt": IDS, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == max_tokens
    return answer.json()["choices"][0]["logprobs"]["token_logprobs"]


def test_ready_record_and_capacity_lines(tmp_path: Path, tiny: Path) -> None:
    with running_server(tmp_path, tiny, *SMALL, "-tp", "2", "-pp", "2") as server:
        record, log = server.record, server.log.read_text()
        assert record["pid"] == server.process.pid
        assert [worker["rank"] for worker in record["workers"]] == [0, 1, 2, 3]
        assert all(is_running(worker["pid"]) for worker in record["workers"])
        assert record["num_blocks"] == 512
        assert record["tokens"] == 512 * 16
        assert "# CPU blocks: 512" in log
        assert "Maximum concurrency for 1,024 tokens per request: 8.00x" in log
        assert httpx.get(f"{server.url}/health").status_code == 200
        complete(server.url)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_and_leaves_nothing(tmp_path: Path, tiny: Path, number: signal.Signals) -> None:
    with running_server(tmp_path, tiny, *SMALL, "-tp", "2") as server:
        answers: list[int] = []
        thread = threading.Thread(target=lambda: answers.append(len(complete(server.url, 200))))
        thread.start()
        wait_until_running(server)
        server.process.send_signal(number)
        thread.join(60)
        assert answers == [200], "the open request was cut"
        assert server.process.wait(10) == 0, server.log.read_text()
        server.wait_all_gone(3)
        assert server.port_is_free()


def test_a_signal_while_a_model_loads_ends_the_start_and_says_where_it_was(tmp_path: Path, tiny: Path) -> None:
    hooks = Path(__file__).parents[1] / "faults" / "hooks"
    environment = os.environ | {"PYTHONPATH": f"{hooks}:{os.environ.get('PYTHONPATH', '')}", "FAULTS": "load=0:sleep60"}
    line = command(tiny, [*SMALL, "-tp", "2", "--port", "0"])
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(line, stdout=out, stderr=out, env=environment)
    try:
        deadline = time.monotonic() + 60
        while "rank 1: rendezvous" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        started = descendants_of(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == ExitCode.INTERRUPTED, log.read_text()
        time.sleep(0.5)
        assert not [pid for pid in started if is_running(pid)]
    finally:
        process.kill()
    words = log.read_text()
    assert "error: SIGINT before the server was up; interrupted: rank 1: rendezvous\n" in words
    assert "Traceback" not in words


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_api_process_that_dies_or_hangs_is_replaced(tmp_path: Path, tiny: Path, number: signal.Signals) -> None:
    with running_server(tmp_path, tiny, *SMALL, "-tp", "2") as server:
        expected = complete(server.url)
        os.kill(server.record["api_pid"], number)
        began = time.monotonic()
        # the keeper holds the socket: what comes meanwhile waits in the queue, and is not refused
        assert complete(server.url) == expected
        assert time.monotonic() - began < 5
        assert all(is_running(worker["pid"]) for worker in server.record["workers"]), "the engine goes on"
        assert metric(server, "num_requests_running") == 0
        server.descendants += descendants_of(server.process.pid)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0, server.log.read_text()
        server.wait_all_gone(3)
        assert server.port_is_free()


def test_sigkill_leaves_nothing_and_the_port_is_free(tmp_path: Path, tiny: Path) -> None:
    with running_server(tmp_path, tiny, *SMALL, "-tp", "2") as server:
        complete(server.url)
        os.kill(server.process.pid, signal.SIGKILL)
        server.wait_all_gone(3)
        assert server.port_is_free()


def test_an_engine_that_dies_too_often_ends_the_server(tmp_path: Path, tiny: Path) -> None:
    with running_server(tmp_path, tiny, *SMALL, "-tp", "2", "--max-recoveries", "0") as server:
        status: list[int] = []

        def ask() -> None:
            body = {"prompt": IDS, "max_tokens": 900, "ignore_eos": True}
            status.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until_running(server)
        pid = server.record["workers"][1]["pid"]
        os.kill(pid, signal.SIGKILL)
        thread.join(20)
        assert status == [503]
        assert server.process.wait(10) == ExitCode.RECOVERY
        assert (
            f"rank 1 on {socket.gethostname()} (pid {pid}) was killed by signal 9 (SIGKILL)" in server.log.read_text()
        )
        server.wait_all_gone(3)


def test_a_client_that_leaves_frees_its_blocks(tmp_path: Path, tiny: Path) -> None:
    with running_server(tmp_path, tiny, *SMALL) as server:
        body = {"prompt": IDS, "max_tokens": 900, "n": 16, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()  # kept: httpx closes the connection with its iterator
            while not next(lines).startswith("data:"):
                pass
            assert metric(server, "num_requests_running") == 16
        deadline = time.monotonic() + 2
        while metric(server, "num_requests_running") or metric(server, "kv_cache_usage_perc"):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_page_of_a_named_origin(tmp_path: Path, tiny: Path) -> None:
    """As a browser asks for it: the preflight, without the key, then the stream, and an error."""
    page = "http://localhost:3000"
    arguments = ("--api-key", "secret", "--allowed-origins", f'["{page}"]')
    with running_server(tmp_path, tiny, *SMALL, *arguments) as server:
        url = f"{server.url}/v1/completions"
        asked = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        preflight = httpx.options(url, headers={"Origin": page, **asked})
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, page)
        assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
        refused = httpx.options(url, headers={"Origin": "http://localhost:3001", **asked})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "cors_refused")
        body = {"prompt": IDS, "max_tokens": 8, "stream": True, "ignore_eos": True}
        headers = {"Origin": page, "Authorization": "Bearer secret"}
        stream = httpx.post(url, json=body, headers=headers, timeout=60)
        assert (stream.status_code, stream.headers["access-control-allow-origin"]) == (200, page)
        assert stream.text.endswith("data: [DONE]\n\n")
        anonymous = httpx.post(url, json=body, headers={"Origin": page})
        assert (anonymous.status_code, anonymous.headers["access-control-allow-origin"]) == (401, page)
        assert "access-control-allow-origin" not in httpx.post(url, json=body).headers


@pytest.mark.parametrize(
    ("arguments", "code", "names"),
    [
        (["-tp", "64"], ExitCode.PLACEMENT, "64"),
        (["-pp", "64"], ExitCode.PLACEMENT, "64"),
        (["--device", "cuda"], ExitCode.PLACEMENT, "cuda"),
        (["--max-model-len", "99999999"], ExitCode.USAGE, "99999999"),
        (["--num-gpu-blocks-override", "2"], ExitCode.MEMORY, "max seq len"),
        (["--host", "0.0.0.0"], ExitCode.USAGE, "api-key"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_a_refused_start_names_the_cause_and_the_next_step(
    tiny: Path, arguments: list[str], code: ExitCode, names: str
) -> None:
    line = command(tiny, ["--port", "0", "--skip-tokenizer-init", *arguments])
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert names in done.stderr
    assert "try: " in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_busy_port_is_refused_before_anything_loads(tiny: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            check=False, args=command(tiny, ["--port", port]), capture_output=True, text=True, timeout=60
        )
    assert done.returncode == ExitCode.ADDRESS
    assert port in done.stderr
    assert str(os.getpid()) in done.stderr


def test_smollm2_answers_the_official_client(tmp_path: Path, smollm2_gguf: Path) -> None:
    arguments = ("--served-model-name", "smollm2", "--max-model-len", "2048", "--dtype", "float32")
    with running_server(tmp_path, smollm2_gguf, *arguments) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        messages = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
        whole = client.chat.completions.create(model="smollm2", messages=messages, temperature=0, max_tokens=24)
        assert "Paris" in (whole.choices[0].message.content or "")
        chunks = list(
            client.chat.completions.create(
                model="smollm2",
                messages=messages,
                temperature=0,
                max_tokens=24,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def metric(server: ServerProcess, name: str) -> float:
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith(f"aphro:{name}{{"):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"no metric {name}")


def wait_until_running(server: ServerProcess) -> None:
    deadline = time.monotonic() + 20
    while metric(server, "num_requests_running") < 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
