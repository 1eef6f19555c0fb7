"""Streams completions from a server over plain sockets, many at once: a process of bench/scenarios.py --http.

Standard input: one JSON line, ``{"host", "port", "model", "start", "requests": [[prompt ids, max_tokens], ...]}``; each
request has a connection of its own, opened before ``start`` (the clock of time.monotonic) and sent then. Standard
output: one JSON line, per request the times of its chunks, in seconds since ``start``. Nothing is parsed but lengths:
the client must not be what is measured.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time


async def stream(job: dict[str, object], prompt: list[int], max_tokens: int, start: float) -> list[float]:
    reader, writer = await asyncio.open_connection(job["host"], job["port"], limit=2**20)
    body = json.dumps(
        {"model": job["model"], "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        | {"stream": True}
    ).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    await asyncio.sleep(start - time.monotonic())
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    times: list[float] = []
    status = await reader.readline()
    assert b" 200 " in status, (status, await reader.read(2000))
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            break
        if line.startswith(b"data:"):
            times.append(time.monotonic() - start)
    writer.close()
    return times


async def main() -> None:
    job = json.loads(sys.stdin.readline())
    streams = (stream(job, prompt, max_tokens, job["start"]) for prompt, max_tokens in job["requests"])
    print(json.dumps(await asyncio.gather(*streams)))


if __name__ == "__main__":
    asyncio.run(main())
