"""Hostile chat templates and payloads: nothing runs, nothing hangs, memory stays bounded, the next chat is served."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aphro_core.spawn import ForkServer, open_fork_server
from aphro_core.templates.render import TemplateRefusedError, render_here
from aphro_core.templates.renderer import ChildRenderer
from tests.e2e.server_process import descendants_of, is_running

HELLO = [{"role": "user", "content": "hello"}]
PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    with open_fork_server(dict(os.environ)) as server:
        yield server


@pytest.fixture(scope="module")
def renderer(fork_server: ForkServer) -> Iterator[ChildRenderer]:
    renderer = ChildRenderer(fork_server)
    renderer.render(PLAIN, HELLO, True, {})
    yield renderer
    renderer.close()


def children_of(server: ForkServer) -> list[int]:
    return [pid for pid in descendants_of(server.pid) if is_running(pid)]


def own_memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**10 }}",
        "{{ ('a' * 10**6).center(10**10) }}",
        "{% for i in range(10**5) %}{% for j in range(10**5) %}{{ i }}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{{ range(99999) | map('string') | join(',' * 100000) }}",
        "{{ 9**(9**9) }}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_bomb_is_refused_in_two_seconds_and_the_next_chat_is_served(renderer: ChildRenderer, template: str) -> None:
    before, began = own_memory(), time.monotonic()
    with pytest.raises(TemplateRefusedError):
        renderer.render(template, HELLO, True, {})
    assert time.monotonic() - began < 3.0
    assert own_memory() - before < 64 * 2**20
    assert renderer.render(PLAIN, HELLO, True, {}) == "hello"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ raise_exception('no') }}",
        "{% for %}",
    ],
)
def test_an_escape_is_refused(renderer: ChildRenderer, template: str) -> None:
    with pytest.raises(TemplateRefusedError):
        renderer.render(template, HELLO, True, {})


@pytest.mark.parametrize("payload", ["{{ 7 * 7 }}", "{% raw %}", "{{ ''.__class__ }}", "{#", "\0", "\ud7ff"])
def test_what_a_client_writes_is_text(renderer: ChildRenderer, payload: str) -> None:
    assert renderer.render(PLAIN, [{"role": "user", "content": payload}], True, {"x": payload}) == payload


def test_it_writes_what_the_library_writes(renderer: ChildRenderer) -> None:
    template = "{{ bos }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}{{ x | tojson }}"
    variables: dict[str, Any] = {"bos": "<s>", "x": {"ü": [1, None, 2.5, "é"]}}
    assert renderer.render(template, HELLO, False, variables) == render_here(template, HELLO, False, variables)


def test_a_slow_chat_leaves_room_for_another(renderer: ChildRenderer) -> None:
    refused = []

    def render_slowly() -> None:
        try:
            renderer.render("{{ 9**(9**9) }}", HELLO, True, {})
        except TemplateRefusedError as error:
            refused.append(error)

    slow = threading.Thread(target=render_slowly)
    renderer.render(PLAIN, HELLO, True, {})
    slow.start()
    began = time.monotonic()
    assert renderer.render(PLAIN, HELLO, True, {}) == "hello"
    assert time.monotonic() - began < 1.9, "it did not wait for the slow one"
    slow.join()
    assert refused[0].is_over_limit


def test_a_fork_server_that_died_does_not_matter() -> None:
    with open_fork_server(dict(os.environ)) as server:
        renderer = ChildRenderer(server)
        assert renderer.render(PLAIN, HELLO, True, {}) == "hello"
        os.kill(server.pid, signal.SIGKILL)
        time.sleep(0.1)
        assert renderer.render(PLAIN, HELLO, True, {}) == "hello"
        renderer.close()


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1])
def test_a_number_that_does_not_fit_is_refused_and_costs_no_process(
    renderer: ChildRenderer, fork_server: ForkServer, number: int
) -> None:
    for _ in range(5):
        with pytest.raises(TemplateRefusedError, match="64 bits"):
            renderer.render(PLAIN, HELLO, True, {"x": [number]})
    assert renderer.render(PLAIN, HELLO, True, {}) == "hello"
    assert len(children_of(fork_server)) <= 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_child_that_somebody_else_ends_is_no_fault_of_the_chat(
    renderer: ChildRenderer, fork_server: ForkServer, number: signal.Signals
) -> None:
    slow = "{% for i in range(10**5) %}{% for j in range(4) %}{% endfor %}{% endfor %}" + PLAIN
    renderer.render(PLAIN, HELLO, True, {})
    timer = threading.Timer(0.02, lambda: [os.kill(pid, number) for pid in children_of(fork_server)])
    timer.start()
    assert renderer.render(slow, HELLO, True, {}) == "hello"
    timer.join()
