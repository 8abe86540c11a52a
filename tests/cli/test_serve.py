from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from click.testing import CliRunner, Result

from sparsespec.cli import main
from sparsespec.models import get_model

Invoke = Callable[..., Result]
needed = pytest.mark.needs("starlette", "uvicorn", "python_multipart")
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the command would have run."""
    calls: list[dict[str, Any]] = []

    def run(models: Any, sock: socket.socket, **options: Any) -> int:
        calls.append({"models": models, "address": sock.getsockname(), **options})
        sock.close()
        return 0

    monkeypatch.setattr("sparsespec.server.run.run", run)
    return calls


@needed
def test_defaults(invoke: Invoke, called: list[dict[str, Any]]) -> None:
    from sparsespec.server.limits import Limits

    assert invoke("serve", "--port", 0).exit_code == 0
    call = called[0]
    assert call["address"][0] == "127.0.0.1"
    assert list(call["models"]) == ["default"]
    assert call["limits"] == Limits()
    assert call["allowed_hosts"] == ("127.0.0.1", "localhost", "[::1]")
    assert (call["cors_origins"], call["root_path"], call["log_format"], call["workers"]) == ((), "", "json", None)


@needed
def test_options(invoke: Invoke, called: list[dict[str, Any]]) -> None:
    model = get_model("default").path
    result = invoke(
        "serve", "--host", "0.0.0.0", "--port", 0, "--model", "default", "--model", model, "--n-instances", 2,
        "--workers", 3,
        "--max-body", 300, "--max-pixels", "0.5", "--max-waiting", 0, "--time-limit", 5, "--wait-limit", 6,
        "--upload-limit", 7,
        "--memory-limit", 900, "--max-connections", 9, "--grace", 0, "--long-side", 1000, "--log-format", "json",
        "--root-path", "/masks", "--cors-origin", "https://a.example", "--seed", 4, "--provider", "cpu",
        "--max-instances", 70,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    call = called[0]
    limits = call["limits"]
    assert (limits.max_body, limits.max_held, limits.max_pixels) == (300_000_000, 300_000_000, 500_000)
    assert (limits.max_waiting, limits.time_limit, limits.wait_limit, limits.upload_limit) == (0, 5, 6, 7)
    assert (limits.memory_limit, limits.max_connections, limits.grace, limits.max_long_side) == (
        900_000_000,
        9,
        0,
        1000,
    )
    assert list(call["models"]) == ["default", "dinov2_vits14_int8"]
    options = call["models"]["default"].options
    assert (options["n_instances"], options["long_side"], options["rng"], options["provider"]) == (2, 1000, 4, "cpu")
    # Anybody may ask who can reach it.
    assert call["allowed_hosts"] == ()
    assert call["workers"] == 3
    assert limits.max_instances == 70


@needed
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "nonsense"], "cannot use the model 'nonsense'"),
        (["--model", "/nowhere/x.onnx"], "cannot use the model"),
        (["--model", "default", "--model", "default"], "two models are called 'default'"),
        (["--method", "paper"], "needs the number of objects"),
        (["--method", "paper", "--n-instances", 2, "--directions", "x.npz"], "uses no directions"),
        (["--root-path", "masks"], "must begin with a slash"),
        (["--max-body", 20, "--max-held", 10], "max_held must be at least max_body"),
        (["--max-body", 0], "not a number above 0"),
        (["--max-body", "1e305"], "1e305 is too large"),
        (["--port", 70000], "70000"),
        (["--provider", "nonsense"], "nonsense"),
    ],
)
def test_wrong_usage(invoke: Invoke, called: list[dict[str, Any]], arguments: list[object], says: str) -> None:
    result = invoke("serve", "--port", 0, *arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())
    assert called == []


@needed
def test_addresses_that_cannot_be_had(invoke: Invoke, called: list[dict[str, Any]], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = invoke("serve", "--port", taken.getsockname()[1])
    assert (result.exit_code, called) == (1, [])
    assert "is in use: end what uses it" in result.output
    (tmp_path / "file").write_text("")
    if os.name == "posix":
        result = invoke("serve", "--uds", tmp_path / "file")
        assert result.exit_code == 1
        assert "left alone" in result.output


def test_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    result = CliRunner().invoke(main, ["serve"])
    assert result.exit_code == 2
    assert "pip install 'sparsespec[serve]'" in result.output


@needed
def test_a_model_that_the_workers_cannot_open(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsespec.server.run import UnusableError

    def run(models: Any, sock: socket.socket, **options: Any) -> int:
        sock.close()
        raise UnusableError("ValueError: directions are of another network")

    monkeypatch.setattr("sparsespec.server.run.run", run)
    result = invoke("serve", "--port", 0)
    assert result.exit_code == 1
    assert "cannot use the model: ValueError: directions are of another network" in result.output


def test_the_document_has_every_option_and_its_default() -> None:
    text = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    shown = CliRunner().invoke(main, ["serve", "--help"]).output
    known = set(re.findall(r"--[a-z][a-z-]+", shown))
    others = {
        "--data-binary",
        "--rm",
        "--read-only",
        "--tmpfs",
        "--cap-drop",
        "--security-opt",
        "--memory",
        "--cpus",
        "--stop-timeout",
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - others <= known
    for row in re.findall(r"^\| `(--[a-z-]+)` \| ([\d.]+)", text, re.MULTILINE):
        option, default = row
        assert re.search(rf"{option} [^-]*?\[default:\s+{default}\]", " ".join(shown.split())), row


@needed
@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_server_with_the_default_model() -> None:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from sparsespec.cli import main; main()", "serve", "--port", "0",
         "--workers", "1", "--log-format", "json"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        url = json.loads(process.stderr.readline())["url"]
        assert json.loads(process.stderr.readline())["event"] == "ready"
        body = (EXAMPLES / "astronaut.jpg").read_bytes()
        with urlopen(Request(f"{url}/segment", body, {"Content-Type": "image/jpeg"}), timeout=60) as answer:
            document = json.load(answer)
        assert len(document["annotations"]) >= 1
        with urlopen(
            Request(f"{url}/segment?n_instances=2&layers=1&long_side=336", body, {"Content-Type": "image/jpeg"}),
            timeout=60,
        ) as answer:
            document = json.load(answer)
        assert len(document["annotations"]) == 2
        assert [layer["name"] for layer in document["layers"]] == ["foreground", "eigenvector 1"]
        with pytest.raises(HTTPError) as caught:
            urlopen(Request(f"{url}/segment", body[:5000], {"Content-Type": "image/jpeg"}), timeout=60)
        with caught.value as refused:
            assert refused.code == 422
            assert json.load(refused)["type"].endswith("unreadable")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
