from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsespec.models import ModelFormatError, get_model, read_trunk_metadata
from sparsespec.models.expand import expanded
from sparsespec.models.graph import write_graph
from sparsespec.models.metadata import PRECISIONS, parse_trunk_metadata
from sparsespec.position_table import PositionRule, resize_positions
from tests.tiny_vit import random_vit

onnx = pytest.importorskip("onnx", reason="expanding a model needs the extra 'build'")

DEFAULT = get_model("default").path


def _written(precision: str, *, blocks: tuple[int, ...] = (-1,), **options: Any) -> bytes:
    vit = random_vit(rule=PositionRule(0.1), **options)
    model = write_graph(vit, blocks=blocks, precision=precision, name="tiny", source="nowhere", source_sha256="ab" * 32)
    return model.SerializeToString(deterministic=True)


def _run(content: bytes, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def _feeds(embed_dim: int, prefix: int, patch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, 3, 4 * patch, 5 * patch)).astype(np.float32)
    return {"image": image, "positions": rng.normal(size=(1, prefix + 20, embed_dim)).astype(np.float32)}


def _cosines(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    a, b = found.astype(float), expected.astype(float)
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize("biases", [True, False])
def test_every_precision_from_float32(activation: str, biases: bool) -> None:
    original = _written("float32", activation=activation, biases=biases, prefix=5)
    for precision in PRECISIONS:
        content = expanded(original, precision)
        built = _written(precision, activation=activation, biases=biases, prefix=5)
        assert content == built


@pytest.mark.parametrize("target", ["float32", "float16"])
@pytest.mark.parametrize("blocks", [(-1,), (0, 2)])
@pytest.mark.parametrize("prefix", [0, 5])
def test_8_bits_become_floats(prefix: int, blocks: tuple[int, ...], target: str) -> None:
    options: dict[str, Any] = {"prefix": prefix, "blocks": blocks}
    exact, rounded = _written("float32", **options), _written("int8", **options)
    content = expanded(rounded, target)
    kinds = {node.op_type for node in onnx.load_from_string(content).graph.node}
    assert not kinds & {"MatMulInteger", "DynamicQuantizeLinear"}
    feeds = _feeds(16, prefix, 4)
    for found, before, reference in zip(*(_run(c, feeds) for c in (content, rounded, exact)), strict=True):
        assert found.shape == reference.shape
        # The weights stay rounded, the inputs no longer are.
        assert _cosines(before, reference).mean() < _cosines(found, reference).mean() < 1


def test_half_precision_is_undone() -> None:
    half, exact = _written("float16"), _written("float32")
    content = expanded(half, "float32")
    assert "Cast" not in {node.op_type for node in onnx.load_from_string(content).graph.node}
    for found, reference in zip(*(_run(c, _feeds(16, 1, 4)) for c in (content, exact)), strict=True):
        assert np.abs(found - reference).max() < 2e-3 * np.abs(reference).max()


def test_description_is_kept_but_for_the_precision() -> None:
    source = _written("int8", prefix=5, blocks=(0, 1))
    props = [
        {p.key: p.value for p in onnx.load_from_string(content).metadata_props}
        for content in (source, expanded(source, "float16"))
    ]
    assert props[1] == {**props[0], "sparsespec.precision": "float16"}
    metadata = parse_trunk_metadata(props[1], where="m")
    assert (metadata.blocks, metadata.output_blocks) == (3, (0, 1))


def test_file_in_that_precision_comes_back_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(_written("int8"))
    assert expanded(path, "int8") == expanded(str(path), "int8") == path.read_bytes()
    assert expanded(path, "float32") == expanded(path.read_bytes(), "float32")


@pytest.mark.slow
def test_embedded_model_without_rounded_inputs(tmp_path: Path) -> None:
    # No float32 file to compare with here: the product with 8-bit inputs differs from this one by their rounding only.
    metadata = read_trunk_metadata(DEFAULT)
    y, x = np.mgrid[0:70, 0:98] / 70
    image = np.stack([np.sin(5 * x + k) * np.cos(4 * y - k) for k in range(3)])[None].astype(np.float32)
    table = resize_positions(metadata.positions, (5, 7), rule=metadata.rule).reshape(35, -1)
    feeds = {"image": image, "positions": np.concatenate([metadata.prefix, table])[None]}
    content = expanded(DEFAULT, "float32")
    assert len(content) > 3 * DEFAULT.stat().st_size
    for found, before in zip(_run(content, feeds), _run(DEFAULT.read_bytes(), feeds), strict=True):
        assert 0.998 < _cosines(found, before).mean() < 1


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match="precision must be one of float32, float16, int8, got 'bf16'"):
        expanded(b"", "bf16")


def test_files_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="'the model given' isn't an ONNX file"):
        expanded(_written("int8")[:1000], "float32")
    path = tmp_path / "other.onnx"
    model = onnx.load_from_string(_written("int8"))
    del model.metadata_props[:]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelFormatError, match=r"other\.onnx' is an ONNX file but not one for sparsespec"):
        expanded(path, "float32")
    with pytest.raises(FileNotFoundError):
        expanded(tmp_path / "absent.onnx", "float32")


@pytest.mark.parametrize(
    "name", ["block.0.qkv.weight_quantized", "block.1.qkv.weight_scale", "block.0.norm2.weight", "patch.weight"]
)
def test_weight_that_is_missing_or_of_another_shape(name: str) -> None:
    model = onnx.load_from_string(_written("int8"))
    (weight,) = (w for w in model.graph.initializer if w.name == name)
    weight.dims[0] //= 2
    weight.raw_data = weight.raw_data[: len(weight.raw_data) // 2]
    with pytest.raises(ModelFormatError, match=f"has a weight '{name}' of shape .* expected"):
        expanded(model.SerializeToString(), "float32")
    weight.name = "something.else"
    with pytest.raises(ModelFormatError, match="'the model given' is incomplete: its graph has no weight '"):
        expanded(model.SerializeToString(), "float32")


def test_weights_that_can_not_be_read() -> None:
    model = onnx.load_from_string(_written("float32"))
    matrix = next(t for t in model.graph.initializer if t.name == "block.0.qkv.weight")
    matrix.dims[0] = 2**40
    with pytest.raises(ModelFormatError, match=r"'the model given' is damaged: the weight 'block\.0\.qkv\.weight'"):
        expanded(model.SerializeToString(), "float16")
    # Content in memory has no folder: a name in it would be looked for wherever the program happens to run.
    matrix.dims[0] = 16
    matrix.data_location = matrix.EXTERNAL
    matrix.external_data.add(key="location", value="setup.cfg")
    with pytest.raises(ModelFormatError, match="lies in another file"):
        expanded(model.SerializeToString(), "float16")


def test_without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"sparsespec\[build\]"):
        expanded(DEFAULT, "float32")
