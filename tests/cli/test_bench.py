"""``aphro bench`` against a real server without a model, whose pace is known."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aphro_cli.bench import render_report
from aphro_cli.main import app
from aphro_core.client.bench_report import LATENCIES, Record, build_report
from aphro_core.errors import ExitCode, RequestError
from tests.core.server.fake_frontend import FakeFrontend
from tests.core.server.loopback import loopback, wait_for

ANSWER = "abcdefgh" * 4


def bench(*words: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, words)], env={"APHRO_API_KEY": None})


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_figures_are_those_of_the_server(endpoint: str, tmp_path: Path) -> None:
    """50 ms to the first token, 10 ms between tokens; the upper bounds leave room for a busy machine."""
    file = tmp_path / "bench.json"
    with loopback(FakeFrontend(answer=ANSWER, first_step_seconds=0.04, step_seconds=0.01)) as server:
        words = (server.url, "-n", 6, "-c", 3, "--input-length", "5-9", "--output-length", 8, "--endpoint", endpoint)
        result = bench(*words, "--json", "--save", file)
        requests = server.frontend.requests
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["completed"] == report["requests"] == 6
    assert (report["failed"], report["errors"], report["output_tokens"]) == (0, {}, 48)
    assert 0.05 <= report["time_to_first_token_seconds"]["p50"] < 5
    assert 0.003 <= report["inter_token_latency_seconds"]["mean"] < 1
    assert 0.003 <= report["time_per_output_token_seconds"]["p50"] < 1
    assert report["request_latency_seconds"]["p50"] >= 0.12
    assert report["output_tokens_per_second"] == pytest.approx(48 / report["duration_seconds"])
    assert report["settings"]["model"] == "fake"
    assert all(request.sampling.ignore_eos and request.sampling.max_tokens == 8 for request in requests)
    saved = json.loads(file.read_text())
    assert saved | {"records": None} == report | {"records": None}
    assert len(saved["records"]) == 6
    if endpoint == "completions":  # ids of the server's own vocabulary: lengths are exact
        lengths = [len(request.prompt_token_ids) for request in requests[1:]]
        assert sum(lengths) == report["prompt_tokens"]
        assert set(lengths) <= set(range(5, 10))
    assert len(requests) == 7  # one to warm up


def test_concurrency_and_arrivals() -> None:
    with loopback(FakeFrontend(answer="ab", first_step_seconds=0.05)) as server:
        words = (server.url, "-n", 4, "-c", 1, "--output-length", 2, "--warm-up", 0, "--json")
        one_by_one = json.loads(bench(*words).stdout)
        late = json.loads(bench(*words, "--rate", 1000).stdout)
    assert one_by_one["duration_seconds"] >= 0.2
    assert one_by_one["request_latency_seconds"]["mean"] < one_by_one["duration_seconds"] / 2
    assert late["request_latency_seconds"]["max"] >= 0.19  # the last one waited for the place since it arrived


def test_failures_are_counted_and_named() -> None:
    with loopback(FakeFrontend(refuses=RequestError("the prompt is odd", field="prompt"))) as server:
        result = bench(server.url, "-n", 3, "--warm-up", 0)
        assert bench(server.url, "-n", 3).exit_code == ExitCode.SERVER
    assert result.exit_code == ExitCode.SERVER
    assert "nothing was answered" in result.stdout
    assert re.search(r"3 failed: .*answered 400: .*the prompt is odd", result.stdout)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--rate", 0), "--rate is 0"),
        (("--rate", "nan"), "--rate is nan"),
        (("--input-length", "9-3"), "--input-length is '9-3'"),
        (("--save", "/none/here.json"), "--save"),
        (("http://a b",), "not the address"),
    ],
)
def test_what_is_refused(words: tuple[object, ...], text: str) -> None:
    result = bench(*words)
    assert result.exit_code == ExitCode.USAGE
    assert text in result.stderr
    assert result.stdout == ""


def test_no_server() -> None:
    assert bench("127.0.0.1:1").exit_code == ExitCode.SERVER


def test_the_table_fits_80_columns() -> None:
    records = [Record(n, 0.0, 1234.5, 12345.6, [123.4] * 3, 10**6, 10**6) for n in range(3)]
    settings = {"model": "m", "url": "http://127.0.0.1:2242", "endpoint": "chat", "concurrency": 4096, "rate": 99.5}
    settings |= {"input_length": "10000-20000", "output_length": "10000-20000"}
    lines = render_report(settings, build_report(records, 3, 0.1))
    assert max(map(len, lines)) <= 80
    assert all(any(line.startswith(f"  {title} ") for line in lines) for title in LATENCIES.values())


def test_ctrl_c_reports_what_is_done() -> None:
    with loopback(FakeFrontend(answer="ab", first_step_seconds=0.2)) as server:
        command = [
            sys.executable,
            "-m",
            "aphro_cli.main",
            "bench",
            server.url,
            "-n",
            "500",
            "-c",
            "1",
            "--warm-up",
            "0",
        ]
        environment = {**os.environ, "NO_COLOR": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        wait_for(lambda: len(server.frontend.requests) >= 3, seconds=20)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == ExitCode.INTERRUPTED, err
    assert re.search(r"^[2-9] answered in", out, re.MULTILINE)
    assert "Traceback" not in err
