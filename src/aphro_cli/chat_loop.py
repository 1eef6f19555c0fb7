"""The dialogue of ``aphro chat``: lines in, answers out as they come, and a few commands."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from aphro_cli.console import printable
from aphro_core.client.answers import Piece
from aphro_core.client.conversation import Conversation, Message
from aphro_core.errors import ServerError

Ask = Callable[[Sequence[Message]], Iterator[Piece]]

COMMANDS: Final = {
    "/help": "these lines",
    "/clear": "forget the conversation, keep the system prompt",
    "/undo": "forget the last question and its answer",
    "/system": "[TEXT]  set the system prompt; without TEXT take it away",
    "/save": "FILE  write the conversation as Markdown",
    "/exit": "end (Ctrl-D too)",
}
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


@dataclass
class Answer:
    """What one answer came to. ``seconds`` run from the question sent; ``first`` to the first text."""

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    first_seconds: float | None = None
    seconds: float = 0.0
    is_stopped: bool = False

    def describe(self) -> str:
        """The line below an answer."""
        parts = [f"{self.completion_tokens} tokens"] if self.completion_tokens is not None else []
        if self.first_seconds is not None:
            parts.append(f"first after {self.first_seconds:.2f} s")
            rest = self.seconds - self.first_seconds
            if self.completion_tokens and self.completion_tokens > 1 and rest > 0:
                parts.append(f"{(self.completion_tokens - 1) / rest:.1f} tokens/s")
        if self.is_stopped:
            parts.append("stopped")
        elif self.finish_reason == "length":
            parts.append("cut at its longest: --max-tokens, or the model's length")
        return ", ".join(parts)


def read_answer(
    pieces: Iterator[Piece], write: Callable[[str, bool], None], clock: Callable[[], float] = time.monotonic
) -> Answer:
    """Hand text on as it comes (``write(text, is_thinking)``); Ctrl-C keeps what has come and ends the rest."""
    answer, started = Answer(), clock()
    try:
        for piece in pieces:
            if (piece.text or piece.thinking) and answer.first_seconds is None:
                answer.first_seconds = clock() - started
            if piece.thinking:
                write(piece.thinking, True)
            if piece.text:
                answer.text += piece.text
                write(piece.text, False)
            answer.finish_reason = piece.finish_reason or answer.finish_reason
            if piece.completion_tokens is not None:
                answer.prompt_tokens, answer.completion_tokens = piece.prompt_tokens, piece.completion_tokens
    except KeyboardInterrupt:
        answer.is_stopped = True
    answer.seconds = clock() - started
    return answer


class ChatLoop:
    """Reads questions until ``/exit`` or the end of input. A refused question is taken back."""

    def __init__(
        self, ask: Ask, conversation: Conversation, read_line: Callable[[str], str], out: IO[str], *, has_style: bool
    ) -> None:
        self._ask = ask
        self._conversation = conversation
        self._read_line = read_line
        self._out = out
        self._has_style = has_style

    def run(self) -> None:
        while (line := self._read_question()) is not None:
            if not line.strip():
                continue
            if line.startswith("/"):
                if self._obey(line) == "exit":
                    return
            else:
                self._answer(line)

    def _read_question(self) -> str | None:
        """One question; a backslash at a line's end goes on in the next. None at the end of input."""
        lines: list[str] = []
        while True:
            try:
                line = self._read_line("... " if lines else ">>> ")
            except EOFError:
                self._say("")
                return None
            except KeyboardInterrupt:
                self._say("\n(Ctrl-D or /exit ends)")
                lines = []
                continue
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _answer(self, question: str) -> None:
        self._conversation.ask(question)
        answer = Answer()
        try:
            answer = read_answer(self._ask(self._conversation.messages), self._write)
        except ServerError as error:
            self._say(f"\nerror: {printable(error.message)}")
            if error.hint:
                self._say(f"try: {printable(error.hint)}")
        self._conversation.answer(answer.text)
        if answer.seconds:
            self._say("\n" + self._dim(f"({answer.describe()})"))

    def _obey(self, line: str) -> str:
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        match command:
            case "/exit" | "/quit":
                return "exit"
            case "/clear":
                self._conversation.clear()
                self._say("(forgotten)")
            case "/undo":
                self._say("(forgotten)" if self._conversation.undo() else "(there is nothing to forget)")
            case "/system":
                self._conversation.system = rest or None
                self._say("(system prompt set)" if rest else "(no system prompt)")
            case "/save":
                self._save(rest)
            case _:
                known = "" if command == "/help" else f"{printable(command)} is not a command\n"
                self._say(known + "\n".join(f"  {name:9} {text}" for name, text in COMMANDS.items()))
        return command

    def _save(self, file: str) -> None:
        try:
            Path(file).expanduser().write_text(self._conversation.render_markdown())
        except OSError as error:
            self._say(f"error: {printable(file) or '/save without a FILE'} cannot be written: {error.strerror}")
        else:
            self._say(f"(written to {printable(file)})")

    def _write(self, text: str, is_thinking: bool) -> None:
        self._out.write(self._dim(printable(text)) if is_thinking else printable(text))
        self._out.flush()

    def _say(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()

    def _dim(self, text: str) -> str:
        return f"{_DIM}{text}{_PLAIN}" if self._has_style else text
