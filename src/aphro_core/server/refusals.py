"""Every way to say no: from an exception to a status and OpenAI's error body, with nothing of the host in it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final
from uuid import uuid4

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from aphro_core.errors import AphroError, OverloadedError, RequestError, RequestFailedError, first_cause

_LOG: Final = logging.getLogger(__name__)
_ENGINE_RETRY_SECONDS: Final = 5


class HttpError(Exception):
    """An answer that is an error. ``closes`` ends the connection: what follows on it cannot be trusted or is unread."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        closes: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        self.closes = closes

    def body(self) -> bytes:
        """``{"error": {...}}`` as OpenAI writes it."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


def refusal_of(  # noqa: PLR0911  a table of cases, each its own answer
    error: BaseException,
) -> HttpError:
    """What the client is told of ``error``. An error that nobody foresaw is logged here, under the id it is told."""
    match first_cause(error):
        case HttpError() as refusal:
            return refusal
        case RequestError() as wrong:
            return HttpError(400, wrong.message, param=wrong.field)
        case RequestFailedError() as failed:
            return HttpError(500, failed.message, kind="internal_error", code=failed.code)
        case OverloadedError() as overloaded:
            return _overloaded(overloaded)
        case AphroError():
            return HttpError(
                503,
                "the engine is not running, and this request cannot be finished; see /readyz",
                kind="service_unavailable",
                code="engine_dead",
                headers={"Retry-After": str(_ENGINE_RETRY_SECONDS)},
            )
        case HTTPException() as raised:
            return _no_route(raised)
        case unforeseen:
            error_id = uuid4().hex[:12]
            _LOG.error("internal error %s", error_id, exc_info=unforeseen)
            message = f"internal error; the server's log has it under {error_id}"
            return HttpError(500, message, kind="internal_error", code="internal_error")


async def answer_error(request: Request, error: Exception) -> Response:
    """The error as a response, for Starlette."""
    refusal = refusal_of(error)
    headers = refusal.headers
    if refusal.closes and request.scope["http_version"].startswith("1"):
        headers = {**headers, "Connection": "close"}
    return Response(refusal.body(), refusal.status, headers, media_type="application/json")


def _overloaded(error: OverloadedError) -> HttpError:
    headers = {"Retry-After": str(error.retry_after)}
    if error.draining:
        return HttpError(
            503, error.message, kind="service_unavailable", code="unavailable", headers=headers, closes=True
        )
    return HttpError(429, error.message, kind="rate_limit_error", code="queue_full", headers=headers)


def _no_route(raised: HTTPException) -> HttpError:
    headers = dict(raised.headers or {})
    if raised.status_code == 405:
        return HttpError(
            405, f"method not allowed, allowed: {headers.get('Allow')}", code="bad_method", headers=headers
        )
    message = "there is nothing at this path, allowed: /v1/chat/completions, /v1/completions, /v1/models, and what GET"
    return HttpError(raised.status_code, f"{message} /openapi.json lists", code="not_found", headers=headers)
