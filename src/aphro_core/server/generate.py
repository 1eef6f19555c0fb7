"""The two endpoints that generate: admitted, parsed, streamed or collected, and stopped when the client leaves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from aphro_core.errors import OverloadedError, RequestError, first_cause
from aphro_core.server import sse
from aphro_core.server.answers import Answer, ChatAnswer, CompletionAnswer
from aphro_core.server.contract import Frontend, Tokenizer
from aphro_core.server.exchange import BodyReader, HeldBody, until_disconnect
from aphro_core.server.gate import Gate, shutting_down
from aphro_core.server.openai import Generation, chat_of, completion_of, spell
from aphro_core.server.outputs import Gain, Outputs, open_outputs
from aphro_core.server.prompts import PromptEncoder
from aphro_core.server.refusals import HttpError, refusal_of
from aphro_core.server.schema import BodyParser, ChatBody, CompletionBody, SamplingFields
from aphro_core.server.shares import Shares

Body = TypeVar("Body", bound=SamplingFields)


@dataclass(frozen=True)
class Dialect(Generic[Body]):
    """What is different between a completion and a chat."""

    body: type[Body]
    generation_of: Callable[[Body, Frontend, PromptEncoder, str], Awaitable[Generation]]
    answer: Callable[[Generation, str, Tokenizer | None], Answer]


COMPLETION = Dialect(CompletionBody, completion_of, CompletionAnswer)
CHAT = Dialect(ChatBody, chat_of, ChatAnswer)


@dataclass(frozen=True)
class Limits:
    """What an admitted request may take: places in the engine, seconds to its first token and to its last one."""

    shares: Shares
    queue_seconds: float
    request_seconds: float

    def waited(self) -> OverloadedError:
        message = f"the request has waited {self.queue_seconds:g} s for its first token"
        return OverloadedError(message, retry_after=5, draining=True)

    def late(self) -> HttpError:
        message = f"the answer was not finished within {self.request_seconds:g} s, which is this server's limit"
        return HttpError(504, message, kind="timeout_error", code="request_timeout")


class Generate:
    """An ASGI endpoint: one body in, one answer or one event stream out."""

    def __init__(
        self,
        dialect: Dialect[Any],
        frontend: Frontend,
        gate: Gate,
        limits: Limits,
        reader: BodyReader,
        parser: BodyParser,
        encoder: PromptEncoder,
    ) -> None:
        self._dialect = dialect
        self._frontend = frontend
        self._gate = gate
        self._limits = limits
        self._reader = reader
        self._parser = parser
        self._encoder = encoder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._reader.hold(scope, receive)
        stream = sse.EventStream(send)
        try:
            async with until_disconnect(receive):
                with self._gate.admit(scope["aphro.salt"]) as work:
                    try:
                        response = None
                        with work:
                            response = await self._run(body, scope["aphro.salt"], stream)
                        if response is not None:
                            await response(scope, receive, send)
                        elif not stream.is_finished:
                            raise shutting_down()
                    except Exception as error:
                        if not stream.is_open:
                            raise
                        await stream.fail(refusal_of(error))
        finally:
            body.drop()

    async def _generation_of(self, body: HeldBody, salt: str) -> Generation:
        parsed = self._parser.parse(body.data, self._dialect.body)
        generation = await self._dialect.generation_of(parsed, self._frontend, self._encoder, salt)
        body.drop()
        return generation

    async def _run(self, body: HeldBody, salt: str, stream: sse.EventStream) -> Response | None:
        """The whole answer, or None when it went out through ``stream``."""
        self._frontend.check_admission()  # a refusal is quick: before anything is parsed or tokenised
        generation = await self._generation_of(body, salt)
        answer = self._dialect.answer(generation, self._frontend.served_name, self._frontend.tokenizer)
        num_places = sum(request.sampling.n for request in generation.requests)
        try:
            with anyio.fail_after(self._limits.request_seconds):
                async with AsyncExitStack() as stack:
                    queue = anyio.CancelScope(deadline=anyio.current_time() + self._limits.queue_seconds)
                    with queue:
                        await stack.enter_async_context(self._limits.shares.turn(salt, num_places))
                    if queue.cancelled_caught:
                        raise self._limits.waited()
                    if not generation.stream:
                        return await self._collect(generation, answer, queue.deadline)
                    await self._stream(generation, answer, stream, queue.deadline)
                    return None
        except TimeoutError:
            raise self._limits.late() from None
        except Exception as error:
            cause = first_cause(error)
            raise (spell(cause, generation.spelled) if isinstance(cause, RequestError) else cause) from None

    async def _stream(self, generation: Generation, answer: Answer, stream: sse.EventStream, deadline: float) -> None:
        """``deadline``: of the first token."""
        async with open_outputs(self._frontend, generation.requests) as outputs, anyio.create_task_group() as tasks:
            await stream.start([(b"x-request-id", generation.id.encode())])
            tasks.start_soon(stream.keep_open)
            gains = await self._first(outputs, deadline)
            while gains:
                await stream.write(await _events(answer, gains))
                gains = await outputs.take()
            tasks.cancel_scope.cancel()
        usage = sse.event(answer.usage_chunk()) if generation.include_usage else b""
        await stream.finish(usage + sse.DONE)

    async def _collect(self, generation: Generation, answer: Answer, deadline: float) -> Response:
        async with open_outputs(self._frontend, generation.requests) as outputs:
            gains = await self._first(outputs, deadline)
            while gains:
                for prompt, delta in gains:
                    answer.add(prompt, delta)
                gains = await outputs.take()
        return Response(await answer.whole(), headers={"x-request-id": generation.id}, media_type="application/json")

    async def _first(self, outputs: Outputs, deadline: float) -> list[Gain]:
        """The first gains, or an OverloadedError when the request has waited too long for them."""
        with anyio.CancelScope(deadline=deadline):
            return await outputs.take()
        raise self._limits.waited()


async def _events(answer: Answer, gains: list[Gain]) -> bytes:
    chunks = [
        answer.chunk(prompt, delta) if delta.prompt_logprobs is None else await answer.long_chunk(prompt, delta)
        for prompt, delta in gains
    ]
    return b"".join(map(sse.event, chunks))
