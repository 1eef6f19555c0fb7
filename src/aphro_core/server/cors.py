"""Pages of other origins: what a browser asks before it sends their requests, and what lets them read the answers."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from aphro_core.config import ServerConfig
from aphro_core.server.refusals import HttpError


def with_origins(app: ASGIApp, config: ServerConfig) -> ASGIApp:
    """``app`` for the origins of ``config``; where there are none, ``app`` itself.

    Around whatever makes errors into answers: pages are to read a 401 or a 429 too.
    """
    if not config.allowed_origins:
        return app
    # browsers take no `*` beside credentials: the origin is named, as older Starlettes do only beside a cookie
    names_any = config.allow_credentials and "*" in config.allowed_origins
    return CrossOrigin(
        app,
        allow_origins=() if names_any else config.allowed_origins,
        allow_origin_regex=".*" if names_any else None,
        allow_methods=config.allowed_methods,
        allow_headers=config.allowed_headers,
        allow_credentials=config.allow_credentials,
    )


class CrossOrigin(CORSMiddleware):
    """Starlette's, with refusals in our shape, and not in the way of requests without an ``Origin``."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A preflight is answered here: a browser sends it without the key, whatever the path."""
        if any(name == b"origin" for name, _ in scope["headers"]):
            await super().__call__(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        kept = {name: value for name, value in answer.headers.items() if not name.startswith("content-")}
        message = (
            f"{bytes(answer.body).decode()}, allowed: what the server was started with "
            "(--allowed-origins, --allowed-methods, --allowed-headers)"
        )
        refusal = HttpError(answer.status_code, message, code="cors_refused", headers=kept)
        return Response(refusal.body(), refusal.status, refusal.headers, media_type="application/json")
