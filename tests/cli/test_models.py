from __future__ import annotations

from collections.abc import Callable

from click.testing import Result

from sparsespec.models import list_models


def test_list_names_every_model(invoke: Callable[..., Result]) -> None:
    result = invoke("models", "list")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert len(lines) == len(list_models())
    for line, model in zip(lines, list_models(), strict=True):
        assert line.startswith(model.name)
        assert model.precision in line
        assert model.description in line


def test_info_by_name_and_alias(invoke: Callable[..., Result]) -> None:
    model = list_models()[0]
    result = invoke("models", "info", model.name)
    assert result.exit_code == 0
    for value in (model.name, model.licence, model.source, model.sha256, str(model.size_bytes)):
        assert value in result.output
    assert invoke("models", "info", "default").output == result.output


def test_unknown_model(invoke: Callable[..., Result]) -> None:
    result = invoke("models", "info", "vit-xxl")
    assert result.exit_code == 2
    assert "'vit-xxl'" in result.stderr
    assert "'default'" in result.stderr
