from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from sparsespec.models import get_model, read_trunk_metadata
from sparsespec.models.graph import write_graph
from tests.tiny_vit import random_vit

pytest.importorskip("onnx", reason="building a model needs the extra 'build'")

Invoke = Callable[..., Result]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a model.onnx"
    vit = random_vit(prefix=5, blocks=12)
    model = write_graph(vit, name="tiny", source="somewhere.onnx", source_sha256="ab" * 32)
    path.write_bytes(model.SerializeToString())
    return path


def test_build_says_what_it_found_and_made(source: Path, tmp_path: Path, invoke: Invoke) -> None:
    output = tmp_path / "out put.onnx"
    result = invoke("models", "build", source, "-o", output, "--precision", "int8", "--blocks", "-1,8")
    assert result.exit_code == 0, result.output
    facts = dict(line.split("  ", 1) for line in result.output.splitlines())
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    assert facts["source"] == "somewhere.onnx"
    assert facts["network"] == "12 blocks, 16 channels, 2 heads, gelu of 24, class token and 4 registers"
    assert facts["patches"] == "4 x 4 pixels"
    assert facts["positions"] == "learnt for 3 x 3 patches; for other sizes bicubic"
    assert facts["colours"] == "mean 0.485, 0.456, 0.406, standard deviation 0.229, 0.224, 0.225"
    assert facts["compared"].startswith("with nothing")
    assert facts["name"] == "tiny-int8"
    assert facts["features"] == "queries, keys and values of blocks 8, 11"
    assert facts["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert shlex.split(facts["next"]) == ["sparsespec", "run", "--input", "PHOTOS", "--model", str(output)]
    assert read_trunk_metadata(output).output_blocks == (8, 11)


def test_options(source: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--heads", "2", "--position-rule", "offset", "--mean", "0.5,0.25,0", "--std", "1,2,4", "--name", "mine"]
    result = invoke("models", "build", source, "--output", "out.onnx", *options)
    assert result.exit_code == 0, result.output
    assert "offset 0.1" in result.output
    assert result.output.rstrip().endswith("--model ./out.onnx")
    metadata = read_trunk_metadata(tmp_path / "out.onnx")
    assert (metadata.rule.offset, metadata.rule.antialias) == (0.1, False)
    assert (metadata.mean.tolist(), metadata.std.tolist()) == ([0.5, 0.25, 0], [1, 2, 4])
    assert metadata.name == "mine"
    again = invoke("models", "build", source, "-o", "out.onnx", "--position-rule", "antialias")
    assert "bicubic, antialiased" in again.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--precision", "int4"], "'int4' is not one of 'float32', 'float16', 'int8'"),
        (["--blocks", "a"], "'a' isn't numbers such as 8,11"),
        (["--blocks", "12"], "there is no block 12: this network has blocks 0 to 11"),
        (["--mean", "0.5"], "'0.5' isn't three numbers such as"),
        (["--std", "0,0,0"], "std must be three numbers from 1e-06"),
        (["--heads", "0"], "0 is not in the range"),
        (["--position-rule", "bilinear"], "'bilinear' is not one of"),
    ],
)
def test_wrong_usage(options: list[str], words: str, source: Path, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("models", "build", source, "-o", tmp_path / "out.onnx", *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "out.onnx").exists()


def test_failures_are_one_line(source: Path, tmp_path: Path, invoke: Invoke) -> None:
    cases = [
        (["no-such", "-o", tmp_path / "out.onnx"], "'no-such' is neither a file nor a name"),
        ([source, "-o", tmp_path], "is a folder; name a file in it"),
        ([source, "-o", tmp_path / "nowhere" / "out.onnx"], "there is no folder"),
        ([source, "-o", source], "is the file the model is built from"),
        ([source, "-o", tmp_path / "out.onnx", "--heads", "3"], "was made with 2 attention heads, not with 3"),
        ([get_model("default").path, "-o", tmp_path / "out.onnx"], "was built in int8"),
    ]
    for arguments, words in cases:
        result = invoke("models", "build", *arguments)
        assert result.exit_code == 1
        assert words in result.stderr
        assert result.stderr.startswith("Error: ")
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out.onnx").exists()


def test_output_must_be_named(source: Path, invoke: Invoke) -> None:
    result = invoke("models", "build", source)
    assert result.exit_code == 2
    assert "--output" in result.stderr


def test_build_is_among_the_commands(invoke: Invoke) -> None:
    assert "build" in invoke("models", "--help").output


def test_fixed_ranges(source: Path, tmp_path: Path, invoke: Invoke) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(photo)
    output = tmp_path / "out.onnx"
    result = invoke("models", "build", source, "-o", output, "--precision", "int8-static", "--calibrate", photo)
    assert result.exit_code == 0, result.output
    assert "MB, int8-static" in result.output
    assert read_trunk_metadata(output).precision == "int8-static"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--precision", "int8-static"], 2, "needs photographs to take its ranges from: --calibrate"),
        (["--calibrate", "photos"], 2, "--calibrate is for --precision int8-static"),
        (["--precision", "int8-static", "--calibrate", "nowhere"], 1, "'nowhere' isn't there"),
    ],
)
def test_photographs_for_fixed_ranges(
    source: Path, tmp_path: Path, invoke: Invoke, options: list[str], code: int, words: str
) -> None:
    result = invoke("models", "build", source, "-o", tmp_path / "out.onnx", *options)
    assert result.exit_code == code
    assert words in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out.onnx").exists()
