from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from sparsespec.backbone import Backbone, TokenFeatures
from sparsespec.directions import Directions
from sparsespec.models.graph import write_graph
from sparsespec.pipeline import Segmenter
from sparsespec.position_table import PositionRule
from tests.reference.vit import forward
from tests.tiny_vit import random_vit

pytest.importorskip("onnx", reason="writing a model needs the extra 'build'")

PARTS = ("queries", "keys", "values")
IMAGE = np.random.default_rng(0).random((21, 34, 3), np.float32)
"""Not a multiple of the patch, so that it is padded."""


def _write(path: Path, *, prefix: int = 1, rule: PositionRule | None = None, precision: str = "float32") -> Path:
    vit = random_vit(prefix=prefix, blocks=4, rule=rule)
    model = write_graph(vit, blocks=(1, 2), precision=precision, name="tiny", source="nowhere", source_sha256="ab" * 32)
    path.write_bytes(model.SerializeToString())
    return path


def _expected(found: TokenFeatures, *, prefix: int, rule: PositionRule | None, block: int) -> list[np.ndarray]:
    """Queries, keys and values of the image, padded by a mirror image, from the plain transformer."""
    vit = random_vit(prefix=prefix, blocks=4, rule=rule)
    height, width = (4 * side for side in found.grid)
    padded = np.pad(IMAGE, ((0, height - 21), (0, width - 34), (0, 0)), mode="symmetric")
    normalised = ((padded - vit.mean) / vit.std).transpose(2, 0, 1)
    return [part[prefix:] for part in forward(vit, normalised)[block]]


@pytest.mark.parametrize("rule", [PositionRule(), PositionRule(0.1), PositionRule(antialias=True)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_any_prefix_and_rule(prefix: int, rule: PositionRule, tmp_path: Path) -> None:
    net = Backbone(_write(tmp_path / "m.onnx", prefix=prefix, rule=rule), threads=1)
    found = net.features(IMAGE, scale=1)
    assert found.grid == (6, 9)
    for name, expected in zip(PARTS, _expected(found, prefix=prefix, rule=rule, block=2), strict=True):
        assert np.abs(getattr(found, name) - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("block", "number"), [(None, 2), (2, 2), (-2, 2), (1, 1), (-3, 1)])
def test_block_that_is_wanted(block: int | None, number: int, tmp_path: Path) -> None:
    net = Backbone(_write(tmp_path / "m.onnx"), threads=1, block=block)
    for one in (net, _copy(net)):
        found = one.features(IMAGE, scale=1)
        for name, expected in zip(PARTS, _expected(found, prefix=1, rule=None, block=number), strict=True):
            assert np.abs(getattr(found, name) - expected).max() < 1e-4 * np.abs(expected).max()


def _copy(net: Backbone) -> Backbone:
    copy: Backbone = pickle.loads(pickle.dumps(net))
    return copy


@pytest.mark.parametrize("block", [0, 3, -1, 4])
def test_block_that_the_file_does_not_give(block: int, tmp_path: Path) -> None:
    path = _write(tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=rf"'tiny' gives no features of block {block}: .* gives 1, 2;"):
        Backbone(path, block=block)


def test_features_of_another_block_are_others(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = write_graph(random_vit(blocks=3), blocks=(1, 2), name="tiny", source="nowhere", source_sha256="ab" * 32)
    path.write_bytes(model.SerializeToString())
    last, before = Backbone(path), Backbone(path, block=1)
    assert last.features_sha256 == last.source_sha256 == before.source_sha256
    assert before.features_sha256 != before.source_sha256
    assert Backbone(path, block=-2).features_sha256 == before.features_sha256 == _copy(before).features_sha256
    directions = Directions(
        np.ones(3 * last.channels, np.float32),
        0.0,
        np.ones((3 * last.channels, 2), np.float32),
        np.zeros(2, np.float32),
        last.features_sha256,
    )
    Segmenter(last, directions=directions)
    with pytest.raises(ValueError, match="directions"):
        Segmenter(before, directions=directions)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_other_precisions(precision: str, tmp_path: Path) -> None:
    net = Backbone(_write(tmp_path / "m.onnx", prefix=5, precision=precision), threads=1)
    found = net.features(IMAGE, scale=1)
    for name, expected in zip(PARTS, _expected(found, prefix=5, rule=None, block=2), strict=True):
        ours = getattr(found, name)
        assert ours.dtype == np.float32
        cosines = (ours * expected).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(expected, axis=1))
        assert cosines.min() > {"float16": 0.99999, "int8": 0.99}[precision]


@pytest.mark.parametrize("prefix", [0, 5])
def test_tiles_of_any_prefix(prefix: int, tmp_path: Path) -> None:
    path = _write(tmp_path / "m.onnx", prefix=prefix)
    tiled = Backbone(path, threads=1, max_tokens=30).features(IMAGE, scale=1)
    whole = Backbone(path, threads=1).features(IMAGE, scale=1)
    assert tiled.info["tiles"] > 1
    assert tiled.grid == whole.grid
    a, b = tiled.keys.ravel(), whole.keys.ravel()
    assert a @ b > 0.9 * np.linalg.norm(a) * np.linalg.norm(b)
