"""The fields of OpenAI's request bodies that are taken, and the way from bytes to them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, TypeVar

import msgspec

from aphro_core.errors import RequestError
from aphro_core.server.unsupported import IGNORED, REFUSED

_LOG: Final = logging.getLogger(__name__)

Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
TokenIds = list[Int]


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class SamplingFields(msgspec.Struct, kw_only=True):
    """What a completion and a chat share. ``None`` is "not given"; the ranges are those of SamplingParams."""

    model: str | None = None
    n: Int | None = None
    max_tokens: Int | None = None
    min_tokens: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: str | None = None
    best_of: Int | None = None


class CompletionBody(SamplingFields, kw_only=True):
    prompt: str | list[str | Int | TokenIds]
    add_special_tokens: bool | None = None
    echo: bool | None = None
    logprobs: Int | None = None


class ContentPart(msgspec.Struct):
    type: str
    text: str | None = None


class Message(msgspec.Struct):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Any = None
    function_call: Any = None


class ChatBody(SamplingFields, kw_only=True):
    messages: list[Message]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    model: str | None = None
    tokens: TokenIds


_MAX_NAMES_LOGGED: Final = 100

_FIELDS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
# of fields whose entries take long, by far more than what is allowed of them takes
_MAX_BYTES: Final = {"chat_template_kwargs": 2**16, "logit_bias": 2**17, "stop": 2**18, "stop_token_ids": 2**17}
# of a whole body, its texts included: each may be a value, and a value takes a hundred times as long as its byte
_MAX_COUNTS: Final = {b",": 2**20, b":": 2**18, b"[": 2**17, b"{": 2**17}
_COUNTED_BYTES: Final = 2**20
_MAX_FIELDS: Final = 1000
_MAX_NOTHING_BYTES: Final = 256  # of a value that asks for nothing
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"  # that some shells put before a file
_WHOLE_NUMBERS: Final = frozenset(
    {"best_of", "logprobs", "max_completion_tokens", "max_tokens", "min_tokens", "n", "seed", "top_k", "top_logprobs"}
)
_WHOLE: Final = re.compile(rb"(-?\d{1,19})\.0{1,19}")

Body = TypeVar("Body", bound=msgspec.Struct)


class BodyParser:
    """Bytes of JSON to a typed body. An unknown field is named in the log, once, at debug level."""

    def __init__(self) -> None:
        self._unknown: set[str] = set()
        self._decoders: dict[type[msgspec.Struct], msgspec.json.Decoder[Any]] = {}

    def parse(self, data: bytes, kind: type[Body]) -> Body:
        """Raises RequestError: malformed, of a wrong type, or asking for what is not supported.

        Nobody else is served meanwhile, so each value is made once, and none of those that nothing is done with.
        """
        data = data.removeprefix(_BYTE_ORDER_MARK)
        _check_counts(data)
        try:
            fields = _FIELDS.decode(data)
            if len(fields) > _MAX_FIELDS:
                raise RequestError(f"the body has {len(fields)} fields, allowed: up to {_MAX_FIELDS}")
            for name, most in _MAX_BYTES.items():
                if name in fields and len(memoryview(fields[name])) > most:
                    raise RequestError(f"{name} takes more than {most} bytes, allowed: fewer entries", field=name)
            plain = _plain(fields, kind)
            body: Body = self._decoder(kind).decode(msgspec.json.encode(fields | plain) if plain else data)
        except msgspec.ValidationError as error:
            raise _explain(error) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RequestError(f"the body is not JSON: {error}") from None
        except RecursionError:
            raise RequestError("the body is nested too deeply") from None
        for name in fields.keys() - set(kind.__struct_fields__) - IGNORED:
            if name not in REFUSED:
                self._note_unknown(name)
            elif not _asks_for_nothing(fields[name], REFUSED[name]):
                raise RequestError(f"{name} is not supported by this server, leave it out", field=name)
        return body

    def _decoder(self, kind: type[Body]) -> msgspec.json.Decoder[Any]:
        if kind not in self._decoders:
            self._decoders[kind] = msgspec.json.Decoder(kind)
        return self._decoders[kind]

    def _note_unknown(self, name: str) -> None:
        if name not in self._unknown and len(self._unknown) < _MAX_NAMES_LOGGED:
            self._unknown.add(name)
            _LOG.debug("ignoring the unknown field %.80r", name)


def _plain(fields: Mapping[str, msgspec.Raw], kind: type[msgspec.Struct]) -> dict[str, msgspec.Raw]:
    """What clients without integers write, ``40.0``, as integers; and a chat's ``logprobs: false`` in a completion."""
    plain = {}
    for name in _WHOLE_NUMBERS & fields.keys():
        value = bytes(memoryview(fields[name])[:64])
        if whole := _WHOLE.fullmatch(value):
            plain[name] = msgspec.Raw(whole[1])
        elif value == b"false" and name == "logprobs" and kind is CompletionBody:
            plain[name] = msgspec.Raw(b"null")
    return plain


def _check_counts(data: bytes) -> None:
    """Raises RequestError for more values than a body needs, before any is made."""
    found = dict.fromkeys(_MAX_COUNTS, 0)
    for start in range(0, len(data), _COUNTED_BYTES):
        piece = data[start : start + _COUNTED_BYTES]
        for sign, most in _MAX_COUNTS.items():
            found[sign] += piece.count(sign)
            if found[sign] > most:
                raise RequestError(
                    f"the body has more than {most} {sign.decode()!r}, allowed: fewer values (send several requests)"
                )


def _asks_for_nothing(value: msgspec.Raw, nothing: tuple[object, ...]) -> bool:
    return len(memoryview(value)) <= _MAX_NOTHING_BYTES and msgspec.json.decode(value) in nothing


def _explain(error: msgspec.ValidationError) -> RequestError:
    """``Expected `float`, got `str` - at `$.temperature``` -> ``temperature: expected float, got str``."""
    text, _, path = str(error).replace("`", "").partition(" - at $")
    field = path.removeprefix("[...]").removeprefix(".")
    if text.startswith("Object missing required field "):
        name = text.removeprefix("Object missing required field ")
        field = f"{field}.{name}" if field else name
        return RequestError(f"{field} is missing", field=field)
    text = text[0].lower() + text[1:].replace(" | ", " or ")
    return RequestError(f"{field or 'the body'}: {text}", field=field or None)
