from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from click.testing import Result

import sparsespec

PYTHON = [sys.executable, "-c", "import sys; from sparsespec.cli import main; main(prog_name='sparsespec')"]


def test_version(invoke: Callable[..., Result]) -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.output.strip() == f"sparsespec, version {sparsespec.__version__}"


def test_no_arguments_print_the_help(invoke: Callable[..., Result]) -> None:
    result = invoke()
    assert result.exit_code == 0
    assert result.output == invoke("--help").output
    for command in ("run", "fit", "eval", "models"):
        assert f"\n  {command} " in result.output


@pytest.mark.parametrize(
    "command", [("run",), ("fit",), ("eval",), ("models",), ("models", "list"), ("models", "info")], ids=" ".join
)
def test_every_command_explains_itself(invoke: Callable[..., Result], command: tuple[str, ...]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert len(result.output) > 120
    assert "\b" not in result.output


def test_unknown_command(invoke: Callable[..., Result]) -> None:
    result = invoke("frobnicate")
    assert result.exit_code == 2
    assert "No such command 'frobnicate'" in result.stderr


def test_answers_come_without_the_heavy_libraries() -> None:
    heavy = ["numpy", "scipy", "numba", "skimage", "onnxruntime", "PIL", "imageio", "pyamg"]
    code = (
        "import sys\nfrom sparsespec.cli import main\n"
        "try: main(['run', '--help'])\nexcept SystemExit: pass\n"
        f"print('loaded:', [name for name in {heavy!r} if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip().endswith("loaded: []")


@pytest.mark.skipif(os.name == "nt", reason="pipes break differently there")
def test_a_closed_pipe_gives_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        result = subprocess.run(
            [*PYTHON, "models", "list"], stdout=closed, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.stderr == ""
