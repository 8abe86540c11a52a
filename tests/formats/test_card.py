from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsespec.formats import decode_rle, instance_annotations
from sparsespec.formats.card import CARD_SIDE, MASK_SIDE, card_photograph, card_script


def blobs(height: int, width: int) -> np.ndarray:
    labels = np.zeros((height, width), np.int32)
    labels[height // 8 : height // 2, width // 8 : width // 3] = 1
    labels[height // 2 :, width // 2 :] = 3
    labels[5, 5] = 4
    return labels


def card(labels: np.ndarray, *, name: str = "a/x", shown: np.ndarray | None = None, **options: Any) -> dict[str, Any]:
    annotations = instance_annotations(labels, np.linspace(0.9, 0.123456, 4))
    content = card_script(name, labels.shape[::-1], labels if shown is None else shown, annotations, **options)
    text = content.decode("ascii")
    found, value = json.loads(f"[{text.removeprefix('sparsespec.card(').removesuffix(');' + chr(10))}]")
    assert found == name
    return dict(value)


def layer_values(layer: dict[str, Any]) -> np.ndarray:
    low, high = layer["range"]
    steps = np.frombuffer(base64.b64decode(layer["data"]), np.uint8).reshape(layer["grid"])
    return low + steps * (high - low) / 255


def test_masks_of_a_small_photograph_are_exact() -> None:
    labels = blobs(40, 60)
    found = card(labels)
    assert (found["size"], found["maskSize"], found["layers"]) == ([60, 40], [40, 60], [])
    assert [entry["label"] for entry in found["instances"]] == [1, 3, 4]
    assert [entry["score"] for entry in found["instances"]] == [0.9, 0.3823, 0.1235]
    assert found["instances"][0]["box"] == [7, 5, 13, 15]
    assert found["instances"][0]["area"] == 13 * 15
    for entry in found["instances"]:
        mask = decode_rle({"size": found["maskSize"], "counts": entry["rle"]})
        np.testing.assert_array_equal(mask, labels == entry["label"])


@pytest.mark.parametrize("reduced", [False, True])
def test_masks_of_a_large_photograph_are_smaller(reduced: bool) -> None:
    labels = blobs(900, 1600)
    found = card(labels, shown=labels[::2, ::2] if reduced else labels)
    assert (found["size"], found["maskSize"]) == ([1600, 900], [360, MASK_SIDE])
    first, second, tiny = found["instances"]
    # Boxes and areas are those of the photograph.
    assert (first["box"], first["area"]) == ([200, 112, 333, 338], 333 * 338)
    for entry in (first, second):
        mask = decode_rle({"size": [360, 640], "counts": entry["rle"]})
        assert mask.sum() == pytest.approx(entry["area"] * (640 / 1600) ** 2, rel=0.02)
    assert tiny["area"] == 1
    assert not decode_rle({"size": [360, 640], "counts": tiny["rle"]}).any()


def test_nothing_found() -> None:
    assert card(np.zeros((30, 20), np.int32))["instances"] == []


def test_names_are_ascii_text() -> None:
    card(blobs(20, 20), name='grün/日本 "x" \\ </script>\u2028')


def test_layers_come_back_to_a_step() -> None:
    values = np.random.default_rng(0).normal(size=(24, 32)).astype(np.float32)
    (layer,) = card(blobs(30, 40), layers={"eigenvector 1": values}, extent=[23.5, 31.25])["layers"]
    assert (layer["name"], layer["grid"], layer["extent"]) == ("eigenvector 1", [24, 32], [23.5, 31.25])
    np.testing.assert_allclose(layer_values(layer), values, atol=0.51 * np.ptp(values) / 255 + 1e-4)


@pytest.mark.parametrize("shape", [(64, 48), (65, 48), (130, 300), (1000, 3)])
def test_large_grids_are_averaged(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(1).random(shape)
    (layer,) = card(blobs(30, 40), layers={"foreground": values}, extent=shape)["layers"]
    step = -(-max(shape) // 64)
    expected = [
        [values[top : top + step, left : left + step].mean() for left in range(0, shape[1], step)]
        for top in range(0, shape[0], step)
    ]
    assert max(layer["grid"]) <= 64
    np.testing.assert_allclose(layer_values(layer), expected, atol=0.51 / 255 + 1e-4)
    # The photograph ends where it did.
    np.testing.assert_allclose(np.array(layer["extent"]) * step, shape, atol=step * 1e-4)


def test_a_layer_of_one_value() -> None:
    (layer,) = card(blobs(30, 40), layers={"foreground": np.full((3, 4), 0.25)})["layers"]
    assert (layer["range"], layer["extent"]) == ([0.25, 0.25], [3, 4])
    assert not any(base64.b64decode(layer["data"]))


@pytest.mark.parametrize("extent", [None, 3, "no", [1], [1, 2, 3], [0, 4], [float("nan"), 1], ["a", "b"]])
def test_an_extent_that_is_none_is_the_whole_grid(extent: Any) -> None:
    (layer,) = card(blobs(30, 40), layers={"foreground": np.eye(4)}, extent=extent)["layers"]
    assert layer["extent"] == [4, 4]


@pytest.mark.parametrize(
    "values",
    [np.zeros(3), np.zeros((0, 3)), np.zeros((2, 2, 2)), [["a"]], np.array([[np.nan]]), None, np.array([[1j]])],
)
def test_what_is_no_layer_is_left_out(values: Any) -> None:
    found = card(blobs(30, 40), layers={"odd": values, "foreground": [[True, False]]})
    assert [layer["name"] for layer in found["layers"]] == ["foreground"]


@pytest.mark.parametrize("size", [(1000, 500), (30, 4000), (384, 200), (20, 10), (1, 1)])
def test_the_photograph_is_small_and_plain(size: tuple[int, int]) -> None:
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    photo = Image.fromarray(np.stack([across, down, 255 - across], axis=2).astype(np.uint8))
    content = card_photograph(photo)
    assert content == card_photograph(photo)
    with Image.open(io.BytesIO(content)) as found:
        assert found.format == "JPEG"
        shrink = min(1, CARD_SIDE / max(size))
        assert found.size == tuple(max(1, round(length * shrink)) for length in size)
        expected = np.asarray(photo.resize(found.size, Image.Resampling.BOX), float)
        # Colours are of two pixels each way.
        assert min(found.size) < 100 or np.abs(np.asarray(found.convert("RGB"), float) - expected).mean() < 6
