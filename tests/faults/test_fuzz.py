"""Bodies drawn from the OpenAPI document, valid and not, against a server: no answer is a fault of ours.

``FUZZ_EXAMPLES=2000`` draws more of them for each route.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from aphro_core.server.openapi import build_document
from tests.core.server.fake_frontend import FakeFrontend
from tests.core.server.loopback import Loopback, loopback

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "12"))
SCHEMA = schemathesis.openapi.from_dict(build_document("0"))
OPERATIONS = [operation.ok() for operation in SCHEMA.get_all_operations()]


@pytest.fixture(scope="module")
def served() -> Iterator[Loopback]:
    with loopback(FakeFrontend(answer="yes")) as server:
        yield server


def test_the_document_is_served_and_names_every_route(served: Loopback) -> None:
    document = served.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    for path, operations in document["paths"].items():
        for method in operations:
            status = served.request(method.upper(), path.replace("{model}", "x")).status_code
            assert status not in (405, 501), path
            assert status != 404 or "model" in path, path


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_no_body_is_a_fault_of_ours(
    served: Loopback, operation: schemathesis.APIOperation, mode: GenerationMode
) -> None:
    if operation.method.upper() == "GET" and mode is GenerationMode.NEGATIVE:
        return  # nothing to get wrong

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        request = case.as_transport_kwargs(base_url=served.url)
        request.pop("cookies", None)
        answer = httpx.request(
            request["method"],
            request["url"],
            json=request.get("json"),
            headers={"content-type": "application/json"} if "json" in request else {},
            timeout=10,
        )
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert error["message"]
            assert "Traceback" not in answer.text
            assert "/src/" not in answer.text

    check()
