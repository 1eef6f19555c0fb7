"""The two endpoints that generate: admitted, parsed, streamed or collected, and stopped when the client leaves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from aphro_core.errors import RequestError, first_cause
from aphro_core.server import sse
from aphro_core.server.answers import Answer, ChatAnswer, CompletionAnswer
from aphro_core.server.contract import Frontend, Tokenizer
from aphro_core.server.exchange import BodyReader, until_disconnect
from aphro_core.server.gate import Gate, shutting_down
from aphro_core.server.openai import Generation, chat_of, completion_of, spell
from aphro_core.server.outputs import open_outputs
from aphro_core.server.prompts import PromptEncoder
from aphro_core.server.refusals import refusal_of
from aphro_core.server.schema import BodyParser, ChatBody, CompletionBody, SamplingFields

Body = TypeVar("Body", bound=SamplingFields)


@dataclass(frozen=True)
class Dialect(Generic[Body]):
    """What is different between a completion and a chat."""

    body: type[Body]
    generation_of: Callable[[Body, Frontend, PromptEncoder, str], Awaitable[Generation]]
    answer: Callable[[Generation, str, Tokenizer | None], Answer]


COMPLETION = Dialect(CompletionBody, completion_of, CompletionAnswer)
CHAT = Dialect(ChatBody, chat_of, ChatAnswer)


class Generate:
    """An ASGI endpoint: one body in, one answer or one event stream out."""

    def __init__(
        self,
        dialect: Dialect[Any],
        frontend: Frontend,
        gate: Gate,
        reader: BodyReader,
        parser: BodyParser,
        encoder: PromptEncoder,
    ) -> None:
        self._dialect = dialect
        self._frontend = frontend
        self._gate = gate
        self._reader = reader
        self._parser = parser
        self._encoder = encoder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        data = await self._reader.read(scope, receive)
        stream = sse.EventStream(send)
        async with until_disconnect(receive):
            with self._gate.admit() as work:
                try:
                    response = None
                    with work:
                        response = await self._run(data, scope["aphro.salt"], stream)
                    if response is not None:
                        await response(scope, receive, send)
                    elif not stream.is_finished:
                        raise shutting_down()
                except Exception as error:
                    if not stream.is_open:
                        raise
                    await stream.fail(refusal_of(error))

    async def _run(self, data: bytes, salt: str, stream: sse.EventStream) -> Response | None:
        """The whole answer, or None when it went out through ``stream``."""
        self._frontend.check_admission()  # a refusal is quick: before anything is parsed or tokenised
        body = self._parser.parse(data, self._dialect.body)
        generation = await self._dialect.generation_of(body, self._frontend, self._encoder, salt)
        answer = self._dialect.answer(generation, self._frontend.served_name, self._frontend.tokenizer)
        try:
            if not generation.stream:
                return await self._collect(generation, answer)
            await self._stream(generation, answer, stream)
            return None
        except Exception as error:
            cause = first_cause(error)
            raise (spell(cause, generation.spelled) if isinstance(cause, RequestError) else cause) from None

    async def _stream(self, generation: Generation, answer: Answer, stream: sse.EventStream) -> None:
        async with open_outputs(self._frontend, generation.requests) as outputs, anyio.create_task_group() as tasks:
            await stream.start([(b"x-request-id", generation.id.encode())])
            tasks.start_soon(stream.keep_open)
            while gains := await outputs.take():
                await stream.write(b"".join([sse.event(answer.chunk(prompt, delta)) for prompt, delta in gains]))
            tasks.cancel_scope.cancel()
        usage = sse.event(answer.usage_chunk()) if generation.include_usage else b""
        await stream.finish(usage + sse.DONE)

    async def _collect(self, generation: Generation, answer: Answer) -> Response:
        async with open_outputs(self._frontend, generation.requests) as outputs:
            while gains := await outputs.take():
                for prompt, delta in gains:
                    answer.add(prompt, delta)
        return Response(answer.whole(), headers={"x-request-id": generation.id}, media_type="application/json")
