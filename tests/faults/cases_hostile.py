"""Overload, hostile clients and damaged surroundings: answered early, freed at once, told in no log."""

from __future__ import annotations

import concurrent.futures
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from tests.faults.case import Case, Outcome
from tests.faults.cases_life import open_stream_without_reading
from tests.faults.lab import FAULTS, RAISE, SLOW, FaultyServer, Lab, complete
from tests.faults.load import Answer, Load, bodies, prompt_of, stream

ROOT = Path(__file__).parent.parent.parent
MIB = 2**20


def p22(lab: Lab) -> Outcome:
    outcome = Outcome()
    with lab.server("--max-queued-requests", "32") as server:
        complete(server.url, prompt_of(0))
        before = server.rss_bytes()
        found = _burst(server, 500, max_tokens=150)
        refused = [(answer, seconds) for answer, seconds in found if answer.status_code == 429]
        outcome.figures["served / refused"] = f"{len(found) - len(refused)} / {len(refused)}"
        outcome.check("all 200 or 429", {answer.status_code for answer, _ in found} <= {200, 429})
        outcome.check("at least 32 served", len(found) - len(refused) >= 32)
        outcome.check("Retry-After", all("retry-after" in answer.headers for answer, _ in refused))
        # of the server alone: the client's own threads share these two cores
        outcome.figures["slowest refusal"] = f"{max(seconds for _, seconds in refused):.2f} s"
        grown = (server.rss_bytes() - before) / MIB
        outcome.figures["memory"] = f"+{max(grown, 0):.0f} MiB"
        outcome.check("at most +64 MiB", grown <= 64)
    return outcome


def _burst(server: FaultyServer, num: int, max_tokens: int) -> list[tuple[httpx.Response, float]]:
    limits = httpx.Limits(max_connections=num)
    with httpx.Client(base_url=server.url, timeout=120, limits=limits) as client:

        def ask(index: int) -> tuple[httpx.Response, float]:
            body = {"prompt": prompt_of(index), "max_tokens": max_tokens, "ignore_eos": True}
            began = time.monotonic()
            answer = client.post("/v1/completions", json=body)
            return answer, time.monotonic() - began

        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            return list(pool.map(ask, range(num)))


def p23(lab: Lab) -> Outcome:
    outcome = Outcome()
    keys = ("--api-key", "flood", "--api-key", "other")
    with lab.server(*keys, "--max-num-seqs", "16", "--max-queued-requests", "64") as server:
        calm = [_first_token(server, n) for n in range(20)]
        with httpx.Client(base_url=server.url, timeout=120) as client:

            def flood(index: int) -> int:
                body = {"prompt": prompt_of(index), "max_tokens": 60, "ignore_eos": True}
                return client.post("/v1/completions", json=body, headers={"authorization": "Bearer flood"}).status_code

            with concurrent.futures.ThreadPoolExecutor(60) as pool:
                running = [pool.submit(flood, index) for index in range(400)]
                time.sleep(1.0)
                under = [_first_token(server, 50 + n) for n in range(20)]
                for future in running:
                    future.cancel()
        outcome.check("the other is never refused", all(status == 200 for status, _ in under))
        before, after = (sorted(seconds for _, seconds in times)[-2] for times in (calm, under))
        outcome.figures["first token, p95"] = f"{before * 1000:.0f} ms alone, {after * 1000:.0f} ms beside the flood"
        outcome.check(
            "at most 3 times, or 0.1 s on two cores that the flood's clients share", after <= max(3 * before, 0.1)
        )
    return outcome


def _first_token(server: FaultyServer, index: int) -> tuple[int, float]:
    body = {"prompt": prompt_of(index), "max_tokens": 1, "ignore_eos": True}
    began = time.monotonic()
    headers = {"authorization": "Bearer other"}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)
    return answer.status_code, time.monotonic() - began


def p12(lab: Lab) -> Outcome:
    """Without an end of its own: it ends at the context's length, or at the server's deadline."""
    outcome = Outcome()
    with lab.server("--request-timeout", "3", faults=FAULTS) as server:
        body = {"prompt": prompt_of(0), "ignore_eos": True, "max_tokens": 1024 - len(prompt_of(0))}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        if answer.status_code == 200:  # else this host is too slow for it in 3 s, which is an end, too
            outcome.check("ended by its length", answer.json()["choices"][0]["finish_reason"] == "length")
            outcome.figures["tokens"] = str(answer.json()["usage"]["total_tokens"])
        began = time.monotonic()
        late = complete(server.url, [*prompt_of(1), SLOW], 900)
        outcome.at_most("ended at its deadline of 3 s after", time.monotonic() - began, 4.0)
        outcome.check("504", late.status_code == 504)
        while server.metric("num_requests_running"):
            time.sleep(0.02)
        outcome.check("then others are served", complete(server.url, prompt_of(2)).status_code == 200)
    return outcome


_GRAMMARS = [
    "(" * 5000,
    "a" * 10**6,
    "((a+)+)+$",
    "root ::= root root",
    '{"$ref": "#"}',
    "(?P<x>" * 500,
    "\\d{1,1000000}",
]


def refused_fields(lab: Lab) -> Outcome:
    """Grammars, media by address and tensors: none of it is looked into."""
    outcome = Outcome()
    with lab.server() as server, socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.5)
        address = f"http://127.0.0.1:{trap.getsockname()[1]}/x"
        before, bodies_ = server.rss_bytes(), list[dict[str, Any]]()
        names = ("guided_regex", "guided_grammar", "guided_json", "structured_outputs", "response_format")
        bodies_ += [{"prompt": [5], name: grammar} for name in names for grammar in _GRAMMARS]
        bodies_ += [{"prompt": [5], "response_format": {"type": "json_schema", "n": n}} for n in range(1000)]
        bodies_ += [{"prompt": [5], "prompt_embeds": "gASVCwAAAAAAAACMBXB3bmVklC4="}]
        with httpx.Client(base_url=server.url, timeout=30) as client:
            slowest, statuses = 0.0, set()
            for body in bodies_:
                began = time.monotonic()
                statuses.add(client.post("/v1/completions", json=body).status_code)
                slowest = max(slowest, time.monotonic() - began)
            for part in ("image_url", "video_url", "input_audio", "file"):
                content = [{"type": part, part: {"url": address, "data": address}}]
                body = {"messages": [{"role": "user", "content": content}]}
                statuses.add(client.post("/v1/chat/completions", json=body).status_code)
        outcome.figures["bodies"] = str(len(bodies_) + 4)
        outcome.at_most("slowest refusal", slowest, 2.0)
        outcome.check("all 400", statuses == {400})
        try:
            trap.accept()
            outcome.check("nobody was connected to", holds=False)
        except TimeoutError:
            outcome.check("nobody was connected to", holds=True)
        outcome.check("at most +64 MiB", (server.rss_bytes() - before) / MIB <= 64)
        outcome.check("no restart", server.metric("engine_recoveries_total") == 0)
    return outcome


def error_bodies(lab: Lab) -> Outcome:
    """What a client is told of an error names nothing of this host; a name is never a path."""
    outcome = Outcome()
    names = ["../../../etc/passwd", "/etc/passwd", "..%2f..%2fetc%2fpasswd", "file:///etc/passwd", "a" * 5000, "\\x00"]
    with lab.server(faults=FAULTS) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        answers = [client.post("/v1/completions", json={"prompt": [5], "model": name}) for name in names]
        outcome.check("a model's name: 404 or 400", {answer.status_code for answer in answers} <= {400, 404})
        for name in names[:4]:
            answers.append(client.get(f"/v1/models/{name}"))
            answers.append(client.post("/v1/completions", json={"prompt": [5], "chat_template": name}))
        answers += [client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})]
        answers += [client.get("/none"), client.delete("/v1/models"), client.post("/v1/completions", json={})]
        answers.append(complete(server.url, [*prompt_of(1), RAISE]))  # an exception of the engine
        texts = [answer.text for answer in answers if answer.status_code >= 400]
        told = [str(lab.folder), str(ROOT), socket.gethostname(), "Traceback", ".py", "root:", str(server.process.pid)]
        leaks = sorted({word for word in told for text in texts if word in text and len(word) > 2})
        outcome.figures["error bodies"] = str(len(texts))
        outcome.figures["words of the host in them"] = str(len(leaks))
        outcome.check(f"nothing of the host, found {leaks}", not leaks)
        outcome.check(
            "each has a message",
            all(answer.json()["error"]["message"] for answer in answers if answer.status_code >= 400),
        )
    return outcome


def p60(lab: Lab) -> Outcome:
    """A /dev/shm of one page: nothing of ours needs it."""
    outcome = Outcome()
    with lab.server("-tp", "2", prefix=("unshare", "-m", "sh", "-c", _TINY_SHM, "sh")) as server:
        outcome.check("served", complete(server.url, prompt_of(1)).status_code == 200)
        server.kill("aphro-rank-1")
        outcome.check("served after a death", complete(server.url, prompt_of(1)).status_code == 200)
    return outcome


_TINY_SHM = 'mount -t tmpfs -o size=4k none /dev/shm && exec "$@"'


def p24(lab: Lab) -> Outcome:
    outcome = Outcome()
    with lab.server("--queue-timeout", "1", "--max-num-seqs", "1") as server, Load(server.url, bodies(1, 1000)) as load:
        load.wait_tokens(1)
        began = time.monotonic()
        answer = complete(server.url, prompt_of(3), 4)
        outcome.at_most("answered", time.monotonic() - began, 1.5)
        outcome.check("503 or, where the first was done by then, 200", answer.status_code in (503, 200))
    return outcome


def _held(server: FaultyServer, sent: bytes, drip: bytes, every: float) -> float:
    """Seconds until the server ends a connection that sends ``sent``, then ``drip`` again and again."""
    port = int(server.url.rsplit(":", 1)[1])
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(sent)
        sock.settimeout(every)
        while time.monotonic() - began < 90:
            try:
                if not sock.recv(4096):
                    break
            except TimeoutError:
                try:
                    sock.sendall(drip)
                except OSError:
                    break
            except OSError:
                break
    return time.monotonic() - began


def p25(lab: Lab) -> Outcome:
    outcome = Outcome()
    with lab.server() as server:
        seconds = _held(server, b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX: ", b"a", 0.5)
        outcome.at_most("a slow head ends", seconds, 10.5)
    return outcome


def p26(lab: Lab) -> Outcome:
    outcome = Outcome()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n{"
    )
    with lab.server() as server:
        outcome.at_most("a slow body ends", _held(server, head, b" ", 0.5), 33.0)
    return outcome


def p32(lab: Lab) -> Outcome:
    """500 clients that leave: before, in and after their prompt, streaming or not."""
    outcome = Outcome()
    with lab.server(faults=f"{SLOW}=sleep0.02") as server:
        for index in range(500):
            _leave(server, index)
        began = time.monotonic()
        while server.metric("num_requests_running") + server.metric("num_requests_waiting"):
            assert time.monotonic() - began < 10
            time.sleep(0.02)
        outcome.at_most("all freed after the last", time.monotonic() - began, 0.7)
        outcome.check("no block is held", server.metric("kv_cache_usage_perc") == 0)
        outcome.check("no restart", server.metric("engine_recoveries_total") == 0)
        outcome.check("still served", complete(server.url, prompt_of(1)).status_code == 200)
    return outcome


def _leave(server: FaultyServer, index: int) -> None:
    is_stream = index % 2
    body = b'{"prompt":[%s],"max_tokens":900,"n":%d,"stream":%s,"ignore_eos":true}' % (
        b",".join(b"%d" % token for token in prompt_of(index, 10 + index % 300)),
        1 + index % 3,
        b"true" if is_stream else b"false",
    )
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as sock:
        sent = head % len(body) + body
        sock.sendall(sent if index % 5 else sent[: len(sent) // 2])
        time.sleep((index % 7) * 0.002)
        if index % 3 == 0:  # a reset instead of a farewell
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


CANARY = "canary7f3a91"


def p42(lab: Lab) -> Outcome:
    """A word in every input, in ordinary and in broken requests; then it is looked for."""
    outcome = Outcome()
    key = f"key-{CANARY}"
    with lab.server("--api-key", key) as server:
        with httpx.Client(base_url=server.url, timeout=30, headers={"authorization": f"Bearer {key}"}) as client:
            inputs: list[dict[str, Any]] = [
                {"prompt": [5, 6], "max_tokens": 2, "user": CANARY, "cache_salt": CANARY},
                {"prompt": CANARY},
                {"prompt": [5], "stop": [CANARY]},
                {"prompt": [5], "temperature": CANARY},
                {"prompt": [5], CANARY: 1},
                {"prompt": [5], "metadata": {"a": CANARY}},
                {"prompt": [5], "logit_bias": {CANARY: 1}},
            ]
            for body in inputs:
                client.post("/v1/completions", json=body)
                client.post("/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": CANARY}]})
            client.post("/v1/completions", content=f'{{"prompt": "{CANARY}'.encode())
            client.get(f"/{CANARY}", headers={"x-a": CANARY})
            metrics = client.get("/metrics").text
        httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {CANARY}"})
        server.kill("aphro-engine")
        time.sleep(1.0)
        log = server.log.read_text()
        lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in server.all_processes()[1:]]
        outcome.check("not in the log", CANARY not in log)
        outcome.check("not in the metrics", CANARY not in metrics)
        outcome.figures["log"] = f"{len(log.splitlines())} lines"
        del lines
    return outcome


def p51(lab: Lab) -> Outcome:
    """Listening sockets of all processes: only the API's answers a stranger."""
    outcome = Outcome()
    with lab.server("-tp", "2") as server:
        ports = _listening(server.all_processes())
        api = int(server.url.rsplit(":", 1)[1])
        others = {port: address for port, address in ports.items() if port != api}
        outcome.figures["listening"] = f"the API port and {len(others)} of the ranks' mesh, on loopback"
        outcome.check("others on loopback alone", all(address == "0100007F" for address in others.values()))
        for port in others:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1) as sock:
                    sock.sendall(os.urandom(4096))
            except OSError:
                pass
        time.sleep(0.5)
        outcome.check("hostile bytes there change nothing", complete(server.url, prompt_of(2)).status_code == 200)
        outcome.check("no restart", server.metric("engine_recoveries_total") == 0)
    return outcome


def _listening(pids: list[int]) -> dict[int, str]:
    """Port -> address (hexadecimal, as the kernel writes it)."""
    inodes = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(entry))
            except OSError:
                continue
    found = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        columns = line.split()
        if columns[3] == "0A" and f"socket:[{columns[9]}]" in inodes:
            address, _, port = columns[1].partition(":")
            found[int(port, 16)] = address
    return found


def p59(lab: Lab) -> Outcome:
    """The log's disk is full: everything goes on, the text is lost."""
    outcome = Outcome()
    ready = lab.folder / "full.json"
    with open("/dev/full", "wb") as full:
        from tests.e2e.server_process import command
        from tests.faults.lab import SMALL

        line = command(lab.model, ["--port", "0", "--json-ready", str(ready), *SMALL, "-tp", "2"])
        process = subprocess.Popen(line, stdout=full, stderr=full)
    try:
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert process.poll() is None, "it did not start"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        import json

        url = json.loads(ready.read_text())["url"]
        outcome.check("served", complete(url, prompt_of(1)).status_code == 200)
        process.terminate()
        outcome.check("exit code 0", process.wait(10) == 0)
    finally:
        process.kill()
        process.wait(10)
    return outcome


def p61(lab: Lab) -> Outcome:
    """No file descriptors: connections wait, and are served when some are free again."""
    outcome = Outcome()
    with lab.server() as server:
        pid = server.pid_of("aphro-api")
        used = len(os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 20, used + 20))
        port = int(server.url.rsplit(":", 1)[1])
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
        time.sleep(0.5)
        for sock in held:
            sock.close()
        began = time.monotonic()
        outcome.check("served", complete(server.url, prompt_of(1)).status_code == 200)
        outcome.at_most("recovered", time.monotonic() - began, 2.0)
    return outcome


def p27(lab: Lab) -> Outcome:
    """A client that does not read its stream of many megabytes: cut off after 60 s, and others never notice."""
    outcome = Outcome()
    with lab.server("--num-gpu-blocks-override", "4096") as server:
        sock = open_stream_without_reading(server, num_choices=48)
        calm = [Answer() for _ in range(4)]
        for index, answer in enumerate(calm):
            stream(server.url, {"prompt": prompt_of(index), "max_tokens": 50}, answer)
        outcome.check("others are served", all(answer.is_done for answer in calm))
        before = server.rss_bytes()
        while server.metric("num_requests_running"):
            time.sleep(0.2)
        began = time.monotonic()  # all is computed, and what fits has been sent: from now on nothing moves
        while _is_open(sock) and time.monotonic() - began < 80:
            time.sleep(0.2)
        outcome.at_most("cut off after", time.monotonic() - began, 63.0)
        outcome.figures["memory"] = f"+{max(server.rss_bytes() - before, 0) / MIB:.0f} MiB"
        outcome.check("at most +128 MiB", server.rss_bytes() - before <= 128 * MIB)
        sock.close()
    return outcome


def _is_open(sock: socket.socket) -> bool:
    """Whether the server's end still is; the client's is not told of its end."""
    port = f":{sock.getsockname()[1]:04X}"
    return any(line.split()[2].endswith(port) for line in Path("/proc/net/tcp").read_text().splitlines()[1:])


def by_tests(*paths: str) -> Any:
    """A case whose proof is a part of the unit tests: it runs them."""

    def run(lab: Lab) -> Outcome:
        outcome = Outcome()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths],
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
            timeout=600,
        )
        summary = done.stdout.strip().splitlines()[-1]
        outcome.figures["tests"] = summary.split(" in ")[0]
        outcome.check(f"pytest {' '.join(paths)}", done.returncode == 0)
        return outcome

    return run


_SERVER = "tests/core/server"
CASES = [
    Case("P-12", "a request that never stops", p12),
    Case("P-22", "500 requests at once, a queue of 32", p22),
    Case("P-23", "one key floods", p23),
    Case("P-24", "a queue deadline of 1 s", p24),
    Case("P-25", "a head that comes byte by byte", p25),
    Case("P-26", "a body that comes byte by byte", p26),
    Case("P-27", "a client that does not read", p27),
    Case("P-28/29", "oversize and compressed bodies, header bombs", by_tests(f"{_SERVER}/test_http_errors.py")),
    Case("P-30", "smuggling forms, targets with two readings", by_tests(f"{_SERVER}/test_http1.py")),
    Case("P-31/40", "every route, ten ways around the key; key timing", by_tests(f"{_SERVER}/test_auth.py")),
    Case("P-32", "500 clients that leave, in all phases", p32),
    Case(
        "P-33/34/35",
        "schema fuzz, JSON bombs, parameter bombs",
        by_tests(f"{_SERVER}/test_openai_schema.py", "tests/faults/test_fuzz.py"),
    ),
    Case("P-36", "template bombs, escapes and payloads", by_tests("tests/core/templates")),
    Case("P-37/38/39", "hostile grammars, media by address, tensors", refused_fields),
    Case("P-43/44", "error bodies; names as paths", error_bodies),
    Case("P-49", "a flipped bit in a model file that has a digest", by_tests("tests/core/checkpoint/test_manifest.py")),
    Case("P-60", "a /dev/shm of one page", p60),
    Case("P-41", "prefix cache across keys", by_tests("tests/core/scheduler/test_prefix_cache.py")),
    Case("P-42", "a canary in every input", p42),
    Case("P-46/51", "listening sockets, and hostile bytes on them", p51),
    Case("P-47/48", "code in model files; malformed and truncated weights", by_tests("tests/core/checkpoint")),
    Case("P-59", "the log's disk is full", p59),
    Case("P-61", "no file descriptors", p61),
    Case("P-63", "simulated histories of scheduler, journal and epochs", by_tests("tests/faults/test_simulation.py")),
    Case(
        "P-64",
        "state machines of blocks and of the request table",
        by_tests(
            "tests/core/scheduler/test_scheduler_stateful.py", "tests/core/frontend/test_request_table_stateful.py"
        ),
    ),
]
