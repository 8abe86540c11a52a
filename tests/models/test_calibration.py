from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsespec.backbone import Backbone
from sparsespec.images import read_image, to_rgb_float
from sparsespec.models import read_trunk_metadata
from sparsespec.models.build import MOST_PICTURES, build_model, network_feed
from sparsespec.models.calibration import balanced, channel_extents
from sparsespec.models.expand import expanded
from sparsespec.models.graph import input_steps, write_graph
from sparsespec.models.vit import BuildError, Norm, Vit
from tests.reference.vit import forward
from tests.tiny_vit import random_vit

onnx = pytest.importorskip("onnx", reason="writing a graph needs the extra 'build'")

DESCRIBED = {"name": "tiny", "source": "nowhere", "source_sha256": "ab" * 32}


def uneven_vit(**options: Any) -> Vit:
    """A network with a channel that reaches thirty times as far as the others."""
    vit = random_vit(channels=32, **options)
    blocks = []
    for block in vit.blocks:
        weight = block.attention.norm.weight.copy()
        weight[3] *= 30
        norm = Norm(weight, block.attention.norm.bias, 1e-6)
        blocks.append(replace(block, attention=replace(block.attention, norm=norm)))
    return replace(vit, blocks=tuple(blocks))


def feeds_of(vit: Vit, count: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    made = []
    for _ in range(count):
        rows = rng.normal(size=(20, vit.embed_dim)).astype(np.float32)
        image = rng.normal(size=(1, 3, 4 * vit.patch_size, 5 * vit.patch_size)).astype(np.float32)
        made.append({"image": image, "positions": np.concatenate([vit.prefix, rows])[None]})
    return made


def run(model: Any, feed: dict[str, np.ndarray], *more: str, plain: bool = False) -> dict[str, np.ndarray]:
    import onnxruntime

    names = [output.name for output in model.graph.output]
    for name in more:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
        names.append(name)
    options = onnxruntime.SessionOptions()
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, feed), strict=True))


def cosines(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return (found * expected).sum(-1) / (np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1))


def static(vit: Vit, feeds: list[dict[str, np.ndarray]], blocks: tuple[int, ...] = (-1,)) -> Any:
    even, ranges = balanced(vit, channel_extents(vit, feeds, blocks=blocks), blocks=blocks)
    return write_graph(even, blocks=blocks, precision="int8-static", ranges=ranges, **DESCRIBED)


def test_extents_are_those_of_the_inputs() -> None:
    vit = random_vit(prefix=0, blocks=2)
    feeds = feeds_of(vit)
    found = channel_extents(vit, feeds)
    assert set(found) == {"block.0.qkv", "block.0.out", "block.0.fc1", "block.0.fc2", "block.1.qkv"}
    seen = []
    for feed in feeds:
        patches = np.einsum(
            "chpwq,dcpq->hwd", feed["image"][0].reshape(3, 4, 4, 5, 4), vit.patch.weight, dtype=np.float64
        )
        tokens = patches.reshape(20, -1) + vit.patch.bias + feed["positions"][0]
        norm = vit.blocks[0].attention.norm
        deviation = np.sqrt(tokens.var(-1, keepdims=True) + norm.epsilon)
        seen.append((tokens - tokens.mean(-1, keepdims=True)) / deviation * norm.weight + norm.bias)
    low, high = found["block.0.qkv"]
    np.testing.assert_allclose(low, np.concatenate(seen).min(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(high, np.concatenate(seen).max(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize(("prefix", "blocks"), [(0, (-1,)), (5, (0, 2))])
def test_evening_out_changes_nothing(activation: str, prefix: int, blocks: tuple[int, ...]) -> None:
    vit = uneven_vit(prefix=prefix, activation=activation)
    feeds = feeds_of(vit)
    even, ranges = balanced(vit, channel_extents(vit, feeds, blocks=blocks), blocks=blocks)
    args = feeds[0]["image"][0], feeds[0]["positions"][0, prefix:]
    for block in blocks:
        for found, expected in zip(forward(even, *args)[block], forward(vit, *args)[block], strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    # The ranges are those of the new network.
    for layer, (low, high) in channel_extents(even, feeds, blocks=blocks).items():
        assert ranges[layer] == pytest.approx((low.min(), high.max()), rel=1e-3, abs=1e-4)


def test_channels_reach_less_far_apart() -> None:
    vit = uneven_vit()
    before = channel_extents(vit, feeds_of(vit))
    _, ranges = balanced(vit, before)
    low, high = before["block.1.qkv"]
    assert ranges["block.1.qkv"][1] - ranges["block.1.qkv"][0] < (high.max() - low.min()) / 3


def test_channels_that_are_silent() -> None:
    vit = random_vit()
    extents = channel_extents(vit, feeds_of(vit))
    silent = {layer: (low * 0, high * 0) for layer, (low, high) in extents.items()}
    even, ranges = balanced(vit, silent)
    np.testing.assert_array_equal(even.blocks[0].attention.query.weight, vit.blocks[0].attention.query.weight)
    assert set(ranges.values()) == {(0.0, 0.0)}
    extents["block.0.qkv"][0][2] = extents["block.0.qkv"][1][2] = 0
    even, _ = balanced(vit, extents)
    assert np.isfinite(even.blocks[0].attention.norm.weight).all()
    assert np.isfinite(even.blocks[0].attention.query.weight).all()


@pytest.mark.parametrize(
    ("low", "high", "step", "zero"),
    [(0, 255, 1, 0), (-255, 0, 1, 255), (-1, 1.55, 0.01, 100), (2, 51, 0.2, 0), (-51, -2, 0.2, 255), (0, 0, 1, 0)],
)
def test_steps(low: float, high: float, step: float, zero: int) -> None:
    found = input_steps(low, high)
    assert (found[0].dtype, found[1].dtype) == (np.float32, np.uint8)
    assert float(found[0]) == pytest.approx(step, rel=1e-6)
    assert int(found[1]) == zero


@pytest.mark.parametrize("plain", [True, False])
def test_arithmetic_is_that_of_integers(plain: bool) -> None:
    vit = uneven_vit()
    feeds = feeds_of(vit)
    model = static(vit, feeds)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    # Three times as far as calibrated, so that some inputs lie beyond the ends.
    feed = {"image": 3 * feeds[0]["image"], "positions": feeds[0]["positions"]}
    for layer, tensor in (("qkv", "norm1"), ("out", "mixed"), ("fc1", "norm2"), ("fc2", "gelu")):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        found = run(copy, feed, f"block.1.{tensor}", f"block.1.{layer}", plain=plain)
        at = f"block.1.{layer}.weight"
        step, zero = weights[f"{at}.input_scale"], int(weights[f"{at}.input_zero"])
        integers = np.clip(np.rint(found[f"block.1.{tensor}"][0] / step) + zero, 0, 255).astype(np.int64) - zero
        counted = integers @ weights[f"{at}_quantized"].astype(np.int64)
        expected = counted * (float(step) * weights[f"{at}_scale"]) + weights[f"block.1.{layer}.bias"]
        np.testing.assert_allclose(found[f"block.1.{layer}"][0], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize(("prefix", "blocks"), [(0, (-1,)), (5, (0, 2))])
def test_keys_are_near(activation: str, prefix: int, blocks: tuple[int, ...]) -> None:
    vit = uneven_vit(prefix=prefix, activation=activation)
    feeds = feeds_of(vit)
    model = static(vit, feeds, blocks)
    onnx.checker.check_model(model, full_check=True)
    assert not [t.name for t in model.graph.initializer if t.data_type == 1 and len(t.dims) == 2]
    found = run(model, feeds[1])
    expected = forward(vit, feeds[1]["image"][0], feeds[1]["positions"][0, prefix:])
    for block, end in zip(blocks, ("",) if len(blocks) == 1 else (".0", ""), strict=True):
        for part, reference in zip(("queries", "keys", "values"), expected[block], strict=True):
            near = cosines(found[part + end][0], reference[prefix:])
            assert near.mean() > 0.998
            assert near.min() > 0.95


def test_evening_out_pays() -> None:
    vit = uneven_vit()
    feeds = feeds_of(vit)
    extents = channel_extents(vit, feeds)
    whole = {layer: (float(low.min()), float(high.max())) for layer, (low, high) in extents.items()}
    uneven = write_graph(vit, precision="int8-static", ranges=whole, **DESCRIBED)
    expected = forward(vit, feeds[0]["image"][0], feeds[0]["positions"][0, 1:])[-1][1][1:]
    before, after = (cosines(run(m, feeds[0])["keys"][0], expected).mean() for m in (uneven, static(vit, feeds)))
    assert 1 - after < (1 - before) / 2


def test_back_to_floats() -> None:
    vit = uneven_vit(prefix=5)
    feeds = feeds_of(vit)
    content = static(vit, feeds).SerializeToString()
    floats = onnx.load_from_string(expanded(content, "float32"))
    assert not {node.op_type for node in floats.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    expected = forward(vit, feeds[0]["image"][0], feeds[0]["positions"][0, 5:])[-1][1][5:]
    assert cosines(run(floats, feeds[0])["keys"][0], expected).min() > 0.999
    with pytest.raises(ValueError, match="precision must be one of float32, float16, int8, got 'int8-static'"):
        expanded(content, "int8-static")


@pytest.mark.parametrize(("precision", "ranges"), [("int8-static", None), ("int8", {}), ("float32", {})])
def test_ranges_that_are_missing_or_not_used(precision: str, ranges: Any) -> None:
    with pytest.raises(ValueError, match="ranges belong to the precision int8-static and to no other"):
        write_graph(random_vit(), precision=precision, ranges=ranges, **DESCRIBED)


# From photographs to a file


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "float32.onnx"
    path.write_bytes(write_graph(uneven_vit(patch=16), **DESCRIBED).SerializeToString())
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos" / "below"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (48, 64 + 8 * number, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder.parent


def test_model_from_photographs(source: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    assert build_model(source, output, precision="int8-static", calibrate=photos) == output
    metadata = read_trunk_metadata(output)
    assert (metadata.precision, metadata.name) == ("int8-static", "tiny-int8-static")
    image = to_rgb_float(read_image(photos / "below/1.png"))
    expected = Backbone(source, provider="cpu", threads=1).features(image).keys
    assert cosines(Backbone(output, provider="cpu", threads=1).features(image).keys, expected).mean() > 0.999
    again = build_model(source, tmp_path / "again.onnx", precision="int8-static", calibrate=str(photos))
    assert again.read_bytes() == output.read_bytes()
    with pytest.raises(BuildError, match="was built in int8-static, which has rounded its weights"):
        build_model(output, tmp_path / "more.onnx")


def test_openvino_runs_it(source: Path, photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO isn't installed: the extra 'openvino'")
    output = build_model(source, tmp_path / "out.onnx", precision="int8-static", calibrate=photos)
    image = to_rgb_float(read_image(photos / "below/1.png"))
    expected = Backbone(source, provider="cpu", threads=1).features(image).keys
    assert cosines(Backbone(output, provider="openvino", threads=1).features(image).keys, expected).mean() > 0.999


def test_the_network_gets_what_it_gets_when_it_is_used(source: Path, photos: Path) -> None:
    net = Backbone(source, provider="cpu", threads=1)
    image = to_rgb_float(read_image(photos / "below/1.png"))
    feed = network_feed(uneven_vit(patch=16), image)
    keys = run(onnx.load(source), feed)["keys"][0]
    np.testing.assert_allclose(keys, net.features(image).keys, rtol=1e-4, atol=1e-4)


def test_of_many_photographs_some(tmp_path: Path) -> None:
    from sparsespec.models.build import _pictures

    for number in range(100):
        (tmp_path / f"{number:03}.jpg").touch()
    (tmp_path / "notes.txt").touch()
    found = [int(path.stem) for path in _pictures(tmp_path)]
    assert len(found) == MOST_PICTURES
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (0, 99)
    assert _pictures(tmp_path / "005.jpg") == [tmp_path / "005.jpg"]


def test_photographs_that_are_not_there(source: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for place, words in (
        (tmp_path / "nowhere", "nowhere' isn't there: the precision int8-static needs photographs"),
        (empty, "empty' holds no image: the precision int8-static needs photographs"),
        (broken, "a picture to calibrate on can't be read: .*broken.png"),
    ):
        with pytest.raises(BuildError, match=words):
            build_model(source, output, precision="int8-static", calibrate=place)
    assert not output.exists()


def test_network_that_gives_no_numbers() -> None:
    vit = random_vit()
    feeds = feeds_of(vit, 1)
    feeds[0]["image"][0, 0, 0, 0] = np.nan
    with pytest.raises(BuildError, match="something else than finite numbers"):
        channel_extents(vit, feeds)
    with pytest.raises(BuildError, match="there is no picture to calibrate on"):
        channel_extents(vit, [])
