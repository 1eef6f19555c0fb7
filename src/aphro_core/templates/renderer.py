"""Chat templates run elsewhere: children of the fork server, a few at a time, each killed when it takes too long."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from aphro_core.channel import BlockingChannel, ChannelClosedError
from aphro_core.errors import EngineDeadError
from aphro_core.host import process_state
from aphro_core.messages import codec
from aphro_core.messages.templates import FromRenderer, Render, RenderRefused
from aphro_core.spawn import Child, ForkServer, Spawner
from aphro_core.templates.render import TemplateRefusedError

RENDER_SECONDS: Final = 2.0
_START_SECONDS: Final = 60.0  # for a child's imports
_TRIVIAL: Final = Render("{{ messages | length }}", [], False, {})
_REAP_SECONDS: Final = 0.5  # for the fork server to say how one ended
_MAX_CHILDREN: Final = 2  # a template that is slow for one client leaves the other child to the others


class ChildRenderer:
    """``render`` as in ``render_here``, with limits. It blocks, and may be called from several threads."""

    def __init__(self, fork_server: ForkServer) -> None:
        self._fork_server = fork_server
        self._free = threading.Semaphore(_MAX_CHILDREN)
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        self._link: Spawner | None = None

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """Raises TemplateRefusedError, also for what takes more than 2 s or 256 MiB."""
        asked = Render(template, [dict(message) for message in messages], add_generation_prompt, dict(variables))
        with self._free:
            answer = self._ask(asked)
        if isinstance(answer, RenderRefused):
            raise TemplateRefusedError(
                answer.message, is_broken=answer.is_broken, is_over_limit=answer.is_over_limit, line=answer.line
            )
        return answer.text

    def _ask(self, asked: Render) -> FromRenderer:
        """Once more where the child was killed or stopped by somebody else: that is not the template's fault."""
        for may_repeat in (True, False):
            process = self._take(may_be_idle=may_repeat)
            try:
                answer = process.ask(asked, RENDER_SECONDS)
            except ChannelClosedError:
                was_disturbed = process.was_disturbed()
                process.kill()
                if not (may_repeat and was_disturbed):
                    break
            except BaseException as error:
                process.kill()
                if isinstance(error, OverflowError):
                    raise TemplateRefusedError("a number among its variables has more than 64 bits") from None
                raise
            else:
                with self._lock:
                    self._idle.append(process)
                return answer
        raise TemplateRefusedError(
            f"it takes more than {RENDER_SECONDS:g} s, or more memory than it may have", is_over_limit=True
        )

    def close(self) -> None:
        """End every child."""
        with self._lock:
            for process in self._idle:
                process.kill()
            self._idle.clear()
            if self._link is not None:
                self._link.close()

    def _take(self, *, may_be_idle: bool) -> _Process:
        with self._lock:
            while self._idle and may_be_idle:  # else a fresh one: whoever stopped one may have stopped all
                process = self._idle.pop()
                if not process.has_ended:
                    return process
                process.kill()
            try:
                return self._start()
            except EngineDeadError:  # the fork server has died since: there is, or will be, another one
                self._link = None
                return self._start()

    def _start(self) -> _Process:
        if self._link is None:
            self._link = self._fork_server.open_link()
        process = _Process(self._link)
        process.ask(_TRIVIAL, _START_SECONDS)  # its imports are on nobody's time
        return process


class _Process:
    """One child. Raises ChannelClosedError once it is gone or late."""

    def __init__(self, link: Spawner) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._child: Child = link.fork("template", "aphro-template", theirs)
        self._sock = ours
        self._channel: BlockingChannel[Render, FromRenderer] = BlockingChannel(ours, codec.tokenizer_side_of_renderer())

    @property
    def has_ended(self) -> bool:
        return self._child.poll()

    def was_disturbed(self) -> bool:
        """Whether somebody stopped it or killed it: a template that wants too much does neither."""
        state = process_state(self._child.pid)
        if state is not None and state.state != "Z":
            return state.state == "T"
        deadline = time.monotonic() + _REAP_SECONDS
        while not self._child.poll() and time.monotonic() < deadline:
            time.sleep(0.005)
        return self._child.exit_code == -signal.SIGKILL

    def ask(self, asked: Render, seconds: float) -> FromRenderer:
        self._sock.settimeout(seconds)  # a timeout is an OSError, which the channel takes for its end
        self._channel.send(asked)
        return self._channel.receive()

    def kill(self) -> None:
        self._child.send_signal(signal.SIGKILL)
        self._child.close()
        self._channel.close()
