"""``aphro chat`` against a real server without a model: in a pipe, with a script, and on a terminal with Ctrl-C."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aphro_cli.chat_loop import COMMANDS, ChatLoop
from aphro_cli.main import app
from aphro_core.client.answers import Piece
from aphro_core.client.conversation import Conversation, Message
from aphro_core.errors import ExitCode, ServerError
from tests.core.server.fake_frontend import FakeFrontend
from tests.core.server.loopback import Loopback, loopback, wait_for


@pytest.fixture
def server() -> Iterator[Loopback]:
    with loopback() as running:
        yield running


def chat(*words: str, piped: str = "") -> Any:
    return CliRunner().invoke(app, ["chat", *words], input=piped, env={"APHRO_API_KEY": None})


def test_a_question_from_a_pipe(server: Loopback) -> None:
    result = chat(server.url, piped="What now?\n")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hello, wörld 🙂\n", "")
    prompt = bytes(token for token in server.frontend.requests[0].prompt_token_ids if token < 256).decode()
    assert prompt == "<user>What now?<assistant>"


def test_the_prompt_comes_before_the_pipe(server: Loopback) -> None:
    words = ("-p", "Sum up:", "--system", "Be brief.", "--temperature", "0", "--max-tokens", "5", "--seed", "3")
    result = chat(server.url, *words, "--json", piped="one two")
    answer = json.loads(result.stdout)
    assert (answer["content"], answer["finish_reason"], answer["model"]) == ("Hello", "length", "fake")
    assert answer["usage"]["completion_tokens"] == 5
    (request,) = server.frontend.requests
    prompt = bytes(token for token in request.prompt_token_ids if token < 256).decode()
    assert prompt == "<system>Be brief.<user>Sum up:\n\none two<assistant>"
    assert (request.sampling.temperature, request.sampling.seed) == (0.0, 3)


def test_what_is_refused(server: Loopback) -> None:
    nothing = chat(server.url)
    assert (nothing.exit_code, nothing.stdout) == (ExitCode.USAGE, "")
    assert "try: aphro chat -p QUESTION" in nothing.stderr
    unknown = chat(server.url, "-p", "x", "--model", "other")
    assert unknown.exit_code == ExitCode.SERVER
    assert "was answered 404" in unknown.stderr


def test_no_server() -> None:
    result = chat("127.0.0.1:1", "-p", "x")
    assert result.exit_code == ExitCode.SERVER
    assert "error: no server answers at http://127.0.0.1:1" in result.stderr
    assert "try: start one with `aphro run MODEL`" in result.stderr


def test_keys() -> None:
    with loopback(api_keys=("secret",)) as server:
        assert "try: set APHRO_API_KEY" in chat(server.url, "-p", "x").stderr
        assert chat(server.url, "-p", "x", "--api-key", "secret").exit_code == 0
        many = CliRunner().invoke(app, ["chat", server.url, "-p", "x"], env={"APHRO_API_KEY": "secret other"})
        assert many.exit_code == 0


def test_an_answer_that_breaks_off_is_no_success() -> None:
    with loopback(FakeFrontend(hold=3, dies=RuntimeError("boom"))) as server:
        result = chat(server.url, "-p", "x")
    assert result.exit_code == ExitCode.SERVER
    assert result.stdout.startswith("Hel")
    assert "error: the answer broke off" in result.stderr


# ---- the dialogue


def dialogue(
    *lines: object, answers: dict[str, Any] | None = None, has_style: bool = False
) -> tuple[str, Conversation]:
    """Types ``lines`` (an exception is raised instead), answers each question, and returns what was on the screen."""
    typed = iter(lines)
    conversation = Conversation()

    def read_line(prompt: str) -> str:
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return str(line)

    def ask(messages: Any) -> Iterator[Piece]:
        found = (answers or {}).get(messages[-1]["content"], "fine")
        for part in found if isinstance(found, list) else [found]:
            if isinstance(part, BaseException):
                raise part
            yield Piece(text=part)
        yield Piece(finish_reason="stop", prompt_tokens=1, completion_tokens=2)

    out = io.StringIO()
    ChatLoop(ask, conversation, read_line, out, has_style=has_style).run()
    return out.getvalue(), conversation


def test_history_is_sent_and_forgotten() -> None:
    _, conversation = dialogue("one", "two", "/undo", "/system Be brief.", "three")
    assert [message["content"] for message in conversation.messages] == ["Be brief.", "one", "fine", "three", "fine"]
    assert dialogue("one", "/clear")[1].messages == []


def test_lines_that_go_on() -> None:
    assert dialogue("one\\", "two")[1].turns[0] == {"role": "user", "content": "one\ntwo"}


def test_ctrl_c_keeps_what_has_come() -> None:
    screen, conversation = dialogue("long", "again", answers={"long": ["half", KeyboardInterrupt()]})
    assert "stopped" in screen
    kept: list[Message] = [{"role": "user", "content": "long"}, {"role": "assistant", "content": "half"}]
    assert conversation.turns[:2] == kept
    assert len(conversation.turns) == 4


def test_ctrl_c_at_the_prompt_does_not_end() -> None:
    screen, conversation = dialogue("half a question\\", KeyboardInterrupt(), "whole")
    assert "Ctrl-D or /exit ends" in screen
    assert conversation.turns[0]["content"] == "whole"


def test_a_refused_question_is_taken_back() -> None:
    answers = {"bad": [ServerError("too long", hint="/clear")]}
    screen, conversation = dialogue("bad", "good", answers=answers)
    assert "error: too long\ntry: /clear\n" in screen
    assert [turn["content"] for turn in conversation.turns] == ["good", "fine"]


def test_what_a_model_says_cannot_move_the_cursor() -> None:
    screen, conversation = dialogue("x", answers={"x": "\x1b[2Jgone"})
    assert "\x1b" not in screen
    assert conversation.turns[1]["content"] == "\x1b[2Jgone"
    assert "\x1b[2m(" in dialogue("x", has_style=True)[0]


def test_commands(tmp_path: Path) -> None:
    file = tmp_path / "talk.md"
    screen, _ = dialogue("one", f"/save {file}", "/save /none/talk.md", "/what", "/exit", "never asked")
    assert file.read_text() == "## user\n\none\n\n## assistant\n\nfine\n"
    assert "error: /none/talk.md cannot be written" in screen
    assert "/what is not a command" in screen
    assert all(name in screen for name in COMMANDS)
    assert "never" not in screen


class Terminal:
    """``aphro chat`` at the other end of a pseudo-terminal."""

    def __init__(self, *words: str, home: Path) -> None:
        self._fd, child = pty.openpty()
        environment = {**os.environ, "HOME": str(home), "XDG_STATE_HOME": "", "TERM": "xterm", "NO_COLOR": "1"}
        command = [sys.executable, "-m", "aphro_cli.main", "chat", *words]
        self.process = subprocess.Popen(
            command, stdin=child, stdout=child, stderr=child, env=environment, start_new_session=True
        )
        os.close(child)
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait(self, is_there: Callable[[str], bool]) -> None:
        start = time.monotonic()
        while not is_there(self.screen):
            assert time.monotonic() - start < 20, self.screen
            with contextlib.suppress(OSError):
                self.screen += os.read(self._fd, 65536).decode(errors="replace")

    def close(self) -> None:
        os.close(self._fd)
        self.process.kill()
        self.process.wait()


def test_on_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C stops the answer at the server too, the dialogue goes on, and only the owner can read the history."""
    with loopback(FakeFrontend(answer="endless " * 500, step_seconds=0.01)) as server:
        terminal = Terminal(server.url, home=tmp_path)
        try:
            terminal.wait(lambda screen: ">>> " in screen)
            terminal.type("go on\n")
            terminal.wait(lambda screen: screen.count("endless ") >= 2)
            terminal.process.send_signal(signal.SIGINT)
            terminal.wait(lambda screen: "stopped)" in screen and screen.rstrip().endswith(">>>"))
            wait_for(lambda: server.frontend.num_open == 0)
            assert len(server.frontend.aborted) == 1
            terminal.type("\x04")
            assert terminal.process.wait(10) == 0
        finally:
            terminal.close()
    assert "\x1b[2m" not in terminal.screen
    history = tmp_path / ".local" / "state" / "aphro" / "chat_history"
    assert history.read_text() == "go on\n"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
