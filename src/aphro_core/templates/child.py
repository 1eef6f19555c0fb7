"""The process that runs chat templates: bounded in memory, killed by its owner when it takes too long."""

from __future__ import annotations

import resource
import signal
import socket
from pathlib import Path
from typing import Final

from aphro_core.channel import BlockingChannel, ChannelClosedError
from aphro_core.messages import codec
from aphro_core.messages.templates import FromRenderer, Render, Rendered, RenderRefused
from aphro_core.templates.render import TemplateRefusedError, render_message

_MEMORY_BYTES: Final = 256 * 2**20  # beyond what the process has when it starts
_MAX_CHARS: Final = 16 * 2**20


def main(sock: socket.socket) -> int:
    """Answer the tokenizer at the other end of ``sock`` until it is gone. Returns the exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    channel: BlockingChannel[FromRenderer, Render] = BlockingChannel(sock, codec.renderer_side())
    _warm_up()
    _limit()
    try:
        while True:
            channel.send(_answer(channel.receive()))
    except ChannelClosedError:
        return 0


def _warm_up() -> None:
    """Import what rendering needs before memory is limited, not on the first client's time."""
    render_message(Render("{{ messages | length }}", [{"role": "user", "content": ""}], False, {}))


def _limit() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(asked: Render) -> FromRenderer:
    try:
        text = render_message(asked)
    except TemplateRefusedError as error:
        return RenderRefused(error.message[:1000], error.is_broken, error.is_over_limit, error.line)
    if len(text) > _MAX_CHARS:
        return RenderRefused(f"it writes {len(text)} characters, allowed: {_MAX_CHARS}", is_over_limit=True)
    try:
        text.encode()
    except UnicodeEncodeError:
        return RenderRefused("it writes half a surrogate pair")
    return Rendered(text)
