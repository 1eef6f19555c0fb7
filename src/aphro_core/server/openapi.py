"""The OpenAPI document, made from the very types that bodies are checked against."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from aphro_core.server.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

_BODIES: Final[dict[str, type[msgspec.Struct]]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/tokenize": TokenizeBody,
    "/tokenize": TokenizeBody,
    "/v1/detokenize": DetokenizeBody,
    "/detokenize": DetokenizeBody,
}
_READ: Final = {
    "/v1/models": "the model that is served",
    "/v1/models/{model}": "the model that is served",
    "/livez": "whether the process runs",
    "/readyz": "whether requests are answered",
    "/health": "whether requests are answered",
    "/ping": "whether requests are answered",
    "/metrics": "Prometheus",
    "/version": "the version",
}
_REFUSALS: Final = ("400", "401", "404", "405", "408", "413", "415", "429", "431", "500", "503", "504")


def build_document(version: str) -> dict[str, Any]:
    """OpenAPI 3.1: every route, what its body may hold, and the answers it gives."""
    bodies = list(dict.fromkeys(_BODIES.values()))
    _, components = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {path: {"post": _post(kind)} for path, kind in _BODIES.items()}
    for path, summary in _READ.items():
        parameters = (
            [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}] if "{" in path else []
        )
        paths[path] = {"get": {"summary": summary, "parameters": parameters, "responses": _responses()}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "aphro", "version": version},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


_ERROR: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _post(kind: type[msgspec.Struct]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"requestBody": body, "responses": _responses()}


def _responses() -> dict[str, Any]:
    refusal = {
        "description": "refused",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    return {"200": {"description": "the answer"}, **dict.fromkeys(_REFUSALS, refusal)}
