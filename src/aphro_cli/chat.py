"""``aphro chat``: talk to a running server, in a dialogue or with one question from a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from aphro_cli import server_options as srv
from aphro_cli.console import Console, has_style, open_console, printable, run_reported
from aphro_core.errors import UsageError

if TYPE_CHECKING:
    from aphro_cli.chat_loop import Ask
    from aphro_core.client.answers import Piece
    from aphro_core.client.connection import Connection
    from aphro_core.client.conversation import Message, Sampling

EXAMPLES: Final = """\b
Examples:
  aphro chat                                    talk to the server on this host
  aphro chat node1:8000 --system "Be brief."
  echo "What is paged attention?" | aphro chat  one question from standard input, the answer on standard output
  aphro chat -p "Summarise this:" < notes.txt   the prompt, then what comes from the pipe
  aphro chat -p Hello --json | jq -r .content

\b
Ctrl-C stops an answer, Ctrl-D or /exit ends, /help lists the commands.
"""
_HISTORY_LINES: Final = 1000

Prompt = Annotated[
    str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Ask this one question, print the answer, end.")
]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system prompt.")]
Temperature = Annotated[float | None, typer.Option("--temperature", min=0, help="0: the likeliest token each time.")]
TopP = Annotated[float | None, typer.Option("--top-p", min=0, max=1, help="Share of likely tokens to draw from.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Longest answer.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="The same question gets the same answer.")]


def chat(
    url: srv.Url = srv.DEFAULT_URL,
    prompt: Prompt = None,
    model: srv.ModelName = None,
    system: System = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    api_key: srv.ApiKey = None,
    timeout: srv.Timeout = 120.0,
    as_json: srv.Json = False,
) -> None:
    """Chat with the model of a running server."""
    console = open_console("info", term=os.environ.get("TERM", ""))

    def work() -> int:
        from aphro_core.client.address import parse_base_url
        from aphro_core.client.answers import choose_model
        from aphro_core.client.connection import Connection
        from aphro_core.client.conversation import Conversation, Sampling

        question = _read_question(prompt)
        if question is None and as_json:
            raise UsageError("--json prints the answer to one question", hint="aphro chat -p QUESTION --json")
        sampling = Sampling(temperature, top_p, max_tokens, seed)
        with Connection(parse_base_url(url), api_key=srv.first_key(api_key), timeout=timeout) as connection:
            name = choose_model(model, [] if model else connection.models())
            ask, conversation = _asking(connection, name, sampling), Conversation(system)
            if question is not None:
                conversation.ask(question)
                return _answer_once(ask, conversation.messages, name, as_json)
            _talk(ask, conversation, f"{name} at {connection.base_url}", console)
        return 0

    raise typer.Exit(run_reported(console, work))


def _asking(connection: Connection, model: str, sampling: Sampling) -> Ask:
    from aphro_core.client.conversation import chat_body

    def ask(messages: Sequence[Message]) -> Iterator[Piece]:
        return connection.stream("/v1/chat/completions", chat_body(model, messages, sampling))

    return ask


def _read_question(prompt: str | None) -> str | None:
    """The one question, if it is one: ``--prompt``, what a pipe brings, or the first and then the second."""
    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().strip()
    parts = [part for part in (prompt, piped) if part]
    if not parts and (prompt is not None or sys.stdin is None or not sys.stdin.isatty()):
        raise UsageError("there is no question: standard input is empty", hint="aphro chat -p QUESTION")
    return "\n\n".join(parts) if parts else None


def _answer_once(ask: Ask, messages: Sequence[Message], model: str, as_json: bool) -> int:
    """The answer alone on stdout. Ctrl-C ends with 130, so that a script does not take a part for the whole."""
    from aphro_cli.chat_loop import read_answer

    makes_safe: Callable[[str], str] = printable if sys.stdout.isatty() else str

    def write(text: str, is_thinking: bool) -> None:
        if not (as_json or is_thinking):
            typer.echo(makes_safe(text), nl=False)

    answer = read_answer(ask(messages), write)
    if as_json:
        usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        content = {"model": model, "content": answer.text, "finish_reason": answer.finish_reason, "usage": usage}
        seconds = {"first_token_seconds": answer.first_seconds, "seconds": answer.seconds}
        typer.echo(json.dumps({**content, **seconds}))
    elif not answer.text.endswith("\n"):
        typer.echo()
    if answer.is_stopped:
        raise KeyboardInterrupt
    return 0


def _talk(ask: Ask, conversation: object, where: str, console: Console) -> None:
    from aphro_cli.chat_loop import ChatLoop
    from aphro_core.client.conversation import Conversation

    assert isinstance(conversation, Conversation)
    console.line(f"{printable(where)}; /help lists the commands, Ctrl-C stops an answer")
    with _line_editing(_history_file()):
        ChatLoop(ask, conversation, input, sys.stdout, has_style=has_style(sys.stdout)).run()


def _history_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "aphro" / "chat_history"


@contextlib.contextmanager
def _line_editing(history: Path) -> Iterator[None]:
    """Arrow keys and the questions of earlier chats, kept where nobody else can read them."""
    try:
        import readline
    except ImportError:  # this Python was built without it: lines can be typed all the same
        yield
        return
    readline.set_auto_history(True)
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    try:
        yield
    finally:
        readline.set_history_length(_HISTORY_LINES)
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            history.touch(mode=0o600)
            readline.write_history_file(history)
