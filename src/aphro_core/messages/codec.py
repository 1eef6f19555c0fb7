"""Messages as msgpack, by type: a frame that does not match its union is refused, nothing is ever unpickled."""

from __future__ import annotations

from typing import Final, Generic, TypeVar

import msgspec

from aphro_core.messages.requests import FromEngine, ToEngine
from aphro_core.messages.steps import FromWorker, ToWorker
from aphro_core.messages.templates import FromRenderer, Render

Out = TypeVar("Out")
In = TypeVar("In")

MAX_FRAME_BYTES: Final = 256 * 2**20


class Codec(Generic[Out, In]):
    """One direction pair of a channel: what this side sends (``Out``) and what it accepts (``In``)."""

    def __init__(self, accepts: object) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[In] = msgspec.msgpack.Decoder(accepts)

    def encode(self, message: Out) -> bytes:
        """The message as a frame: four bytes of length, little end first, then msgpack."""
        body = self._encoder.encode(message)
        if len(body) > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {len(body)} bytes, allowed: up to {MAX_FRAME_BYTES}")
        return len(body).to_bytes(4, "little") + body

    def decode(self, body: bytes) -> In:
        """Raises :class:`msgspec.ValidationError` or :class:`msgspec.DecodeError` for anything else than ``In``."""
        return self._decoder.decode(body)


def engine_side_of_worker() -> Codec[ToWorker, FromWorker]:
    return Codec(FromWorker)


def worker_side() -> Codec[FromWorker, ToWorker]:
    return Codec(ToWorker)


def api_side_of_engine() -> Codec[ToEngine, FromEngine]:
    return Codec(FromEngine)


def engine_side_of_api() -> Codec[FromEngine, ToEngine]:
    return Codec(ToEngine)


def tokenizer_side_of_renderer() -> Codec[Render, FromRenderer]:
    return Codec(FromRenderer)


def renderer_side() -> Codec[FromRenderer, Render]:
    return Codec(Render)
