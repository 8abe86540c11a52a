from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from sparsespec.models import get_model, list_models
from sparsespec.models.store import Store
from tests.models.hub_server import HubServer

Invoke = Callable[..., Result]
WEIGHTS = b"published weights"


def test_list_names_every_model(invoke: Invoke, home: Path) -> None:
    result = invoke("models", "list")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert len(lines) == len(list_models())
    for line, model in zip(lines, list_models(), strict=True):
        assert line.startswith(model.name)
        assert model.precision in line
        assert model.description in line
        assert model.licence.split()[0] in line
        assert f"{model.size_bytes / 1e6:.1f} MB" in line
        assert ("embedded" if model.embedded else "not installed") in line
    assert not home.exists()


def test_info_by_name_and_alias(invoke: Invoke) -> None:
    model = get_model("default")
    result = invoke("models", "info", model.name)
    assert result.exit_code == 0
    assert model.sha256 is not None
    for value in (model.name, model.licence, model.source, model.sha256, str(model.size_bytes)):
        assert value in result.output
    assert "from another file than those of 'dinov2-vits14'" in result.output
    assert invoke("models", "info", "default").output == result.output


def test_info_says_what_is_pinned(invoke: Invoke, home: Path) -> None:
    said = invoke("models", "info", "dinov2_vitb14").output
    for fact in (
        "f9e44c814b77203eaa57a6bdbbd535f21ede1415, pinned",
        "346345912 bytes, SHA-256 d73036b56966966d07975d696bde331762f37297e2f095de8cea0040c3aa0841, pinned",
        "no; 'sparsespec models pull dinov2-vitb14'",
    ):
        assert fact in said
    said = invoke("models", "info", "dino-vits16-int8").output
    assert "main; the commit of the first pull is kept" in said
    assert "SHA-256 of the first pull is kept" in said
    assert "precision" in said
    assert "int8" in said


def test_unknown_model(invoke: Invoke) -> None:
    for command in (["info"], ["pull"], ["verify"], ["path"], ["remove"]):
        result = invoke("models", *command, "dino-vits61")
        assert result.exit_code == 2
        assert "unknown model 'dino-vits61'; did you mean 'dino-vits16'?" in result.stderr
        assert "'default'" in result.stderr


def test_from_pull_to_remove(
    invoke: Invoke,
    server: HubServer,
    builds: list[dict[str, Any]],
    home: Path,
) -> None:
    commit = server.publish("Xenova/dino-vits16", {"onnx/model.onnx": WEIGHTS})
    pulled = invoke("models", "pull", "DINO_vits16", "--precision", "int8")
    path = home / "models/dino-vits16-int8.onnx"
    assert (pulled.exit_code, pulled.stdout) == (0, f"{path}\n")
    # What takes its time is said where it doesn't disturb.
    assert "sparsespec: downloading onnx/model.onnx of Xenova/dino-vits16" in pulled.stderr
    assert f"sparsespec: building {path}" in pulled.stderr
    assert path.is_file()
    again = invoke("models", "pull", "dino-vits16-int8", "--offline")
    assert (again.exit_code, again.output) == (0, f"{path}\n")

    assert "installed: int8" in invoke("models", "list").output
    said = invoke("models", "info", "dino-vits16-int8").output
    content = path.read_bytes()
    for fact in (commit, hashlib.sha256(WEIGHTS).hexdigest(), hashlib.sha256(content).hexdigest(), str(path)):
        assert fact in said
    assert invoke("models", "path").output == f"{home}\n"
    assert invoke("models", "path", "dino-vits16-int8").output == f"{path}\n"

    good = invoke("models", "verify")
    assert good.exit_code == 0
    assert [line.split()[0] for line in good.output.splitlines()] == ["dinov2-vits14-int8", "dino-vits16-int8"]
    assert all(line.endswith(": as recorded") for line in good.output.splitlines())
    assert invoke("models", "verify", "dino-vits8").output == "dino-vits8: not installed\n"
    path.write_bytes(content[:-1] + b"x")
    bad = invoke("models", "verify")
    assert bad.exit_code == 1
    assert "'sparsespec models pull dino-vits16-int8 --force'" in bad.output
    assert invoke("models", "verify", "default").exit_code == 0
    assert invoke("models", "pull", "dino-vits16-int8", "--force").exit_code == 0
    assert invoke("models", "verify").exit_code == 0

    assert invoke("models", "remove", "dino-vits16-int8").output == f"{path}\n"
    assert set(Store().read_record()["sources"]) == {"Xenova/dino-vits16@main/onnx/model.onnx"}
    again = invoke("models", "remove", "dino-vits16-int8", "--forget")
    assert (again.stdout, again.exit_code) == ("", 0)
    assert "isn't installed" in again.stderr
    assert Store().read_record()["sources"] == {}
    assert invoke("models", "remove", "default").exit_code == 2


def test_pull_from_a_file(
    invoke: Invoke,
    server: HubServer,
    builds: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(WEIGHTS)
    result = invoke("models", "pull", "dino-vitb8", "--from", file)
    assert result.exit_code == 1
    # The stand-in for the build knows one width only: what comes out is compared with the registry.
    assert "isn't the network of model 'dino-vitb8'" in result.stderr
    assert invoke("models", "pull", "dino-vits8", "--from", file).exit_code == 0
    assert invoke("models", "pull", "dinov2-vitb14", "--from", file).exit_code == 1
    assert invoke("models", "pull", "dino-vits16", "--from", tmp_path / "absent").exit_code == 2
    assert server.requests == []


@pytest.mark.parametrize("options", [["--offline"], []])
def test_pull_without_network(
    invoke: Invoke,
    server: HubServer,
    home: Path,
    options: list[str],
) -> None:
    server.close()
    result = invoke("models", "pull", "dino-vits16", *options)
    assert result.exit_code == 1
    for fact in (
        f"{server.url}/Xenova/dino-vits16/resolve/main/onnx/model.onnx",
        repr(str(home / "downloads/Xenova--dino-vits16/main/onnx/model.onnx")),
        "'sparsespec models pull dino-vits16 --offline'",
        "'sparsespec models pull dino-vits16 --from FILE'",
    ):
        assert fact in result.stderr


def test_pull_from_a_mirror(
    invoke: Invoke,
    server: HubServer,
    builds: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.publish("Xenova/dino-vits16", {"onnx/model.onnx": WEIGHTS})
    monkeypatch.delenv("HF_ENDPOINT")
    assert invoke("models", "pull", "dino-vits16", "--endpoint", server.url).exit_code == 0
    wrong = invoke("models", "pull", "dino-vits8", "--endpoint", "mirror")
    assert wrong.exit_code == 2
    assert "endpoint must be an address" in wrong.stderr


def test_run_pulls_on_first_use(
    invoke: Invoke,
    server: HubServer,
    builds: list[dict[str, Any]],
    home: Path,
    tmp_path: Path,
    zoo: Path,
) -> None:
    # The stand-in for the build writes a file without weights: what is said about it comes after the pull.
    server.publish("Xenova/dino-vits16", {"onnx/model.onnx": WEIGHTS})
    result = invoke(
        "run", "--input", zoo / "good" / "plain.jpg", "--output", tmp_path / "out", "--model", "dino_vits16"
    )
    assert result.exit_code == 2
    assert "sparsespec: model dino-vits16 isn't in" in result.stderr
    assert "cannot use the model 'dino_vits16'" in result.stderr
    assert (home / "models/dino-vits16-float32.onnx").is_file()
    # Without network it says what to do.
    server.close()
    result = invoke("run", "--input", zoo / "good", "--output", tmp_path / "out", "--model", "dino_vits8")
    assert result.exit_code == 2
    assert "models pull dino-vits8 --offline" in result.stderr


@pytest.mark.needs("onnx")
def test_a_store_that_cannot_be_used(invoke: Invoke, home: Path) -> None:
    home.parent.mkdir(exist_ok=True)
    home.write_text("a file stands in the way")
    assert invoke("models", "list").exit_code == 0
    assert invoke("models", "info", "default").exit_code == 0
    result = invoke("models", "pull", "dino-vits16")
    assert result.exit_code == 1
    assert "SPARSESPEC_HOME" in result.stderr


@pytest.mark.needs("onnx")
def test_a_damaged_record(invoke: Invoke, home: Path) -> None:
    home.mkdir()
    (home / "models.lock").write_text("{")
    for command in (["verify"], ["info", "dino-vits16"], ["pull", "dino-vits16"]):
        result = invoke("models", *command)
        assert result.exit_code == 1
        assert "is damaged" in result.stderr
    assert invoke("models", "list").exit_code == 0


def test_the_library_itself_prints_nothing() -> None:
    code = "import logging, sparsespec.models, sparsespec.models.pull as p; print(p._LOG.getEffectiveLevel())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (f"{logging.WARNING}\n", "")
