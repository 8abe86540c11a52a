"""Requests that a fuzzer makes of the description, and answers that it holds against it."""

from __future__ import annotations

import pytest

from tests.server.serving import inline_app

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")


@pytest.mark.slow
def test_answers_to_anything_are_as_described() -> None:
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks as openapi_checks

    checks = [
        not_a_server_error,
        openapi_checks.status_code_conformance,
        openapi_checks.content_type_conformance,
        openapi_checks.response_schema_conformance,
    ]
    schema = schemathesis.openapi.from_asgi("/openapi.json", inline_app())
    seen: set[str] = set()
    for found in schema.get_all_operations():
        operation = found.ok()

        @hypothesis.settings(max_examples=20, deadline=None, database=None, derandomize=True)
        @hypothesis.given(case=operation.as_strategy())
        def fuzz(case: object) -> None:
            seen.add(case.path)  # type: ignore[attr-defined]
            case.call_and_validate(checks=checks)  # type: ignore[attr-defined]

        fuzz()
    assert seen >= {"/segment", "/healthz", "/readyz", "/metrics"}
