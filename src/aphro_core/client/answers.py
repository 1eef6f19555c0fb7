"""What a server's answers mean: chunks of a stream, usage, and refusals with the next step to try."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from aphro_core.errors import ServerError, UsageError

DONE: Final = b"[DONE]"
_HINTS: Final = {
    401: "set APHRO_API_KEY, or --api-key, to a key of that server",
    403: "set APHRO_API_KEY, or --api-key, to a key of that server that may do this",
    404: "check the address and --model: GET /v1/models lists what is served",
    429: "fewer requests at once, or try again in a moment",
    503: "wait until the server is ready: GET /readyz says what it does",
}


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event brings: text of the answer or of the thinking before it, its end, or the token counts."""

    text: str = ""
    thinking: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def parse_piece(data: bytes) -> Piece:
    """One event of ``/v1/chat/completions`` or ``/v1/completions``. Raises ServerError for an error event."""
    try:
        chunk = msgspec.json.decode(data, type=_Chunk)
    except msgspec.DecodeError as error:
        raise ServerError(
            f"the stream has an event that is no chunk of a completion: {_shorten(data)} ({error})",
            hint="check that the URL is that of an OpenAI-compatible server",
        ) from error
    if chunk.error is not None:
        raise ServerError(f"the answer broke off: {_message_of({'error': chunk.error}) or chunk.error}")
    choice = chunk.choices[0] if chunk.choices else _Choice()
    delta = choice.delta or _Delta()
    return Piece(
        text=delta.content or choice.text or "",
        thinking=delta.reasoning_content or delta.reasoning or "",
        finish_reason=choice.finish_reason,
        prompt_tokens=chunk.usage.prompt_tokens if chunk.usage else None,
        completion_tokens=chunk.usage.completion_tokens if chunk.usage else None,
    )


def parse_models(data: bytes) -> list[str]:
    """The ids of ``GET /v1/models``."""
    try:
        return [str(card["id"]) for card in msgspec.json.decode(data)["data"]]
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise ServerError(
            f"/v1/models answers {_shorten(data)}", hint="check that the URL is that of an OpenAI-compatible server"
        ) from error


def choose_model(wanted: str | None, served: list[str]) -> str:
    """``wanted``, or the only model of a server. Raises UsageError where there are none or several."""
    if wanted is not None:
        return wanted
    if len(served) == 1:
        return served[0]
    names = ", ".join(served[:8]) + (", ..." if len(served) > 8 else "")
    raise UsageError(f"the server has {len(served)} models: {names or 'none'}", hint="--model NAME")


def refusal(status: int, body: bytes, what: str) -> ServerError:
    """The error for an HTTP status other than 200: what the server says, and what to do about that status."""
    said = _shorten(body)
    with contextlib.suppress(msgspec.DecodeError):
        said = _message_of(msgspec.json.decode(body)) or said
    return ServerError(f"{what} was answered {status}: {said or 'nothing'}", hint=_HINTS.get(status))


def _message_of(decoded: Any) -> str | None:
    """The message of OpenAI's, vLLM's older or FastAPI's shape of an error."""
    if not isinstance(decoded, dict):
        return None
    inner = decoded.get("error", decoded)
    found = inner if isinstance(inner, str) else inner.get("message") if isinstance(inner, dict) else None
    return str(found or decoded.get("detail") or "") or None


def _shorten(data: bytes) -> str:
    text = " ".join(data.decode(errors="replace").split())
    return text if len(text) <= 200 else f"{text[:200]} ..."
