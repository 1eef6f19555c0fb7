"""The application: routes, keys before everything, errors in one shape."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any, Final

import msgspec
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from aphro_core.config import ServerConfig
from aphro_core.errors import RequestError
from aphro_core.server.auth import Keys
from aphro_core.server.contract import Frontend
from aphro_core.server.cors import with_origins
from aphro_core.server.exchange import BodyReader, Exchange, check_head, check_target
from aphro_core.server.gate import Gate
from aphro_core.server.generate import CHAT, COMPLETION, Generate, Limits
from aphro_core.server.openai import check_model, template_kwargs, template_messages
from aphro_core.server.openapi import build_document
from aphro_core.server.prompts import PromptEncoder
from aphro_core.server.refusals import HttpError, answer_error
from aphro_core.server.schema import BodyParser, DetokenizeBody, TokenizeBody
from aphro_core.server.shares import Shares, share_of

_VERSION: Final = version("aphro")
_MAX_TEXTS: Final = 64  # to be tokenised or written out for their own sake, at one time


def build_app(frontend: Frontend, config: ServerConfig) -> App:
    """The ASGI application that serves ``frontend``. Raises UsageError for an empty API key."""
    return App(frontend, config)


class App:
    """Per request: origin, bounded head, key, route, answer; any error on that way becomes an OpenAI error body."""

    def __init__(self, frontend: Frontend, config: ServerConfig, *, reader: BodyReader | None = None) -> None:
        num_keys = len(set(config.api_keys))
        self.gate = Gate(config.max_queued_requests, num_keys)
        self._text_gate = Gate(min(config.max_queued_requests, _MAX_TEXTS), num_keys)
        self._limits = Limits(
            Shares(share_of(config.max_num_seqs, num_keys) if num_keys > 1 else None),
            config.queue_timeout_seconds,
            config.request_timeout_seconds,
        )
        self._frontend = frontend
        self._keys = Keys(config.api_keys)
        self._reader = reader or BodyReader()
        self._parser = BodyParser()
        self._encoder = PromptEncoder(frontend)
        self._created = int(time.time())
        self._router = Router(self._routes(), redirect_slashes=False)
        guarded = ExceptionMiddleware(self._guard, handlers={HTTPException: answer_error, Exception: answer_error})
        self._edge = with_origins(guarded, config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            exchange = Exchange(receive, send)
            scope["app"] = self  # the router then raises 404 and 405, so that they get our shape
            await self._edge(scope, exchange.receive, exchange.send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _lifespan(receive, send)

    async def _guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        check_head(scope)
        scope["aphro.salt"] = self._keys.admit(scope)
        check_target(scope["path"])
        await self._router(scope, receive, send)

    def _routes(self) -> list[Route]:
        parts = self._frontend, self.gate, self._limits, self._reader, self._parser, self._encoder
        return [
            Route("/v1/chat/completions", Generate(CHAT, *parts), methods=["POST"]),
            Route("/v1/completions", Generate(COMPLETION, *parts), methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._model),
            *[Route(path, self._tokenize, methods=["POST"]) for path in ("/v1/tokenize", "/tokenize")],
            *[Route(path, self._detokenize, methods=["POST"]) for path in ("/v1/detokenize", "/detokenize")],
            Route("/livez", self._live),
            Route("/readyz", self._ready),
            Route("/health", self._ready),
            Route("/ping", self._ready, methods=["GET", "POST"]),
            Route("/metrics", self._metrics),
            Route("/version", self._version),
            Route("/openapi.json", self._openapi),
        ]

    async def _models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        check_model(request.path_params["model"], self._frontend)
        return json_response(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._frontend.served_name,
            "object": "model",
            "created": self._created,
            "owned_by": "aphro",
            "max_model_len": self._frontend.max_model_len,
        }

    async def _tokenize(self, request: Request) -> Response:
        data = await self._reader.read(request.scope, request.receive)
        with self._text_gate.admit(request.scope["aphro.salt"]):
            return await self._tokens_of(self._parser.parse(data, TokenizeBody))

    async def _tokens_of(self, body: TokenizeBody) -> Response:
        check_model(body.model, self._frontend)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("allowed: either prompt or messages", field="prompt")
        if body.messages is not None:
            ids = await self._encoder.encode_chat(
                template_messages(body.messages), body.add_generation_prompt is not False, template_kwargs(body)
            )
        else:
            ids = await self._encoder.encode(body.prompt or "", body.add_special_tokens is not False, "prompt")
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": self._frontend.max_model_len, "tokens": ids}
        tokenizer = self._frontend.tokenizer
        if body.return_token_strs and tokenizer is not None:
            answer["token_strs"] = [tokenizer.token_text(token_id) for token_id in ids]
        return json_response(answer)

    async def _detokenize(self, request: Request) -> Response:
        data = await self._reader.read(request.scope, request.receive)
        with self._text_gate.admit(request.scope["aphro.salt"]):
            body = self._parser.parse(data, DetokenizeBody)
            check_model(body.model, self._frontend)
            return json_response({"prompt": await self._encoder.decode_text(body.tokens, "tokens")})

    async def _live(self, request: Request) -> Response:
        return json_response({"status": "alive"})

    async def _ready(self, request: Request) -> Response:
        """The phase and no more: these paths are open, and a stranger learns neither hosts nor causes."""
        health = self._frontend.health()
        if health.ready and not self.gate.is_closed:
            return json_response({"status": health.phase})
        phase = "draining" if health.ready else health.phase
        raise HttpError(
            503,
            f"not ready: {phase}",
            kind="service_unavailable",
            code=phase,
            headers={"Retry-After": "2"},
        )

    async def _metrics(self, request: Request) -> Response:
        metrics = self._frontend.metrics
        return Response(metrics.render(), headers={"content-type": metrics.content_type})

    async def _openapi(self, request: Request) -> Response:
        return json_response(build_document(_VERSION))

    async def _version(self, request: Request) -> Response:
        return json_response({"version": _VERSION})


def json_response(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


async def _lifespan(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})
