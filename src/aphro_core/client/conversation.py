"""A conversation as the server is sent it, and the body of a request for its next answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]


@dataclass
class Conversation:
    """Messages in turn, behind an optional system prompt."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.turns]

    @property
    def num_exchanges(self) -> int:
        return sum(turn["role"] == "user" for turn in self.turns)

    def ask(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """What came, in part or whole. Nothing at all takes the question back: two in a row confuse templates."""
        if text:
            self.turns.append({"role": "assistant", "content": text})
        else:
            self.undo()

    def undo(self) -> bool:
        """Forget the last question and what follows it. False if there is none."""
        asked = [at for at, turn in enumerate(self.turns) if turn["role"] == "user"]
        if asked:
            del self.turns[asked[-1] :]
        return bool(asked)

    def clear(self) -> None:
        self.turns.clear()

    def render_markdown(self) -> str:
        return "\n".join(f"## {message['role']}\n\n{message['content']}\n" for message in self.messages)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; None leaves it to the server."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None


def chat_body(model: str, messages: Sequence[Message], sampling: Sampling) -> dict[str, Any]:
    """The body of a streamed ``/v1/chat/completions``."""
    wanted = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed,
    }
    set_ones = {name: value for name, value in wanted.items() if value is not None}
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": model, "messages": list(messages), **usage, **set_ones}
