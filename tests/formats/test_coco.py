from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from sparsespec.formats import CocoWriter, decode_rle, encode_rle, instance_annotations

mask_tools = pytest.importorskip("pycocotools.mask", reason="pycocotools judges our encoding")

# pycocotools' own arrays are from before NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

RNG = np.random.default_rng(11)


def gallery() -> dict[str, np.ndarray]:
    big = np.zeros((700, 900), bool)
    big[100:650, 200:800] = True
    spiral = np.zeros((41, 41), bool)
    for k in range(0, 20, 2):
        spiral[k, k : 41 - k] = spiral[k : 41 - k, 40 - k] = True
    return {
        "one pixel, on": np.ones((1, 1), bool),
        "one pixel, off": np.zeros((1, 1), bool),
        "empty": np.zeros((5, 7), bool),
        "full": np.ones((5, 7), bool),
        "first pixel": np.eye(1, 35, 0, dtype=bool).reshape(5, 7),
        "last pixel": np.eye(1, 35, 34, dtype=bool).reshape(5, 7),
        "row": np.ones((1, 50), bool),
        "column": np.ones((50, 1), bool),
        "noise": RNG.random((60, 40)) > 0.5,
        "sparse noise": RNG.random((200, 300)) > 0.995,
        "stripes": np.arange(400).reshape(20, 20) % 2 == 0,
        "rectangle": big,
        "spiral": spiral,
    }


@pytest.mark.parametrize("name", gallery())
def test_encoding_equals_pycocotools(name: str) -> None:
    mask = gallery()[name]
    ours = encode_rle(mask)
    theirs = mask_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert ours == {"size": list(theirs["size"]), "counts": theirs["counts"].decode("ascii")}


@pytest.mark.parametrize("name", gallery())
def test_decoding_both_ways(name: str) -> None:
    mask = gallery()[name]
    np.testing.assert_array_equal(mask_tools.decode(encode_rle(mask)), mask)
    theirs = mask_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    ours = decode_rle({"size": theirs["size"], "counts": theirs["counts"].decode("ascii")})
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, mask)


def test_long_runs_and_large_negative_differences() -> None:
    # Runs of very different lengths: several groups of five bits, of either sign.
    lengths = [3, 40_000, 1, 2, 100_000, 1, 5, 1_100_000, 31, 32, 15, 16, 1023, 1]
    flat = np.repeat(np.arange(len(lengths)) % 2, lengths)
    mask = flat.reshape((1, -1))
    theirs = mask_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert encode_rle(mask)["counts"] == theirs["counts"].decode("ascii")
    np.testing.assert_array_equal(decode_rle(encode_rle(mask)), mask)


def test_decoding_checks_the_size() -> None:
    rle = encode_rle(np.ones((4, 4)))
    with pytest.raises(ValueError, match=r"cover 16 pixels, size 5 x 4"):
        decode_rle({**rle, "size": [5, 4]})
    with pytest.raises(ValueError, match="two-dimensional"):
        encode_rle(np.ones(4))


def random_labels(shape: tuple[int, int], count: int) -> np.ndarray:
    coarse = RNG.integers(0, count + 1, (5, 6))
    rows = np.arange(shape[0]) * 5 // shape[0]
    columns = np.arange(shape[1]) * 6 // shape[1]
    labels = coarse[rows[:, None], columns]
    return np.unique(labels, return_inverse=True)[1].reshape(shape) if labels.min() == 0 else labels


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (5, 6), (300, 7)])
def test_annotations_agree_with_pycocotools(shape: tuple[int, int]) -> None:
    labels = random_labels(shape, 6)
    labels[RNG.random(shape) > 0.97] = 0
    count = labels.max()
    scores = np.linspace(0.9, 0.1, count)
    annotations = instance_annotations(labels, scores)
    assert [annotation["label"] for annotation in annotations] == list(range(1, count + 1))
    for annotation in annotations:
        mask = labels == annotation["label"]
        theirs = mask_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert annotation["segmentation"]["counts"] == theirs["counts"].decode("ascii")
        assert annotation["segmentation"]["size"] == list(shape)
        assert annotation["area"] == mask.sum()
        np.testing.assert_array_equal(annotation["bbox"], mask_tools.toBbox(theirs))
        assert annotation["score"] == pytest.approx(scores[annotation["label"] - 1], abs=1e-6)
        assert annotation["iscrowd"] == 0
        assert annotation["category_id"] == 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (33, 21), (8, 300)])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint8, np.int64])
@pytest.mark.parametrize("band", [1, 500, 10**7])
def test_annotations_by_bands(
    shape: tuple[int, int], dtype: type, band: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sparsespec._mapped._BAND_BYTES", band)
    monkeypatch.setattr("sparsespec.formats.coco._COUNTS_AT_ONCE", 7)
    noise = RNG.integers(0, 4, shape).astype(dtype)
    labels = np.memmap(tmp_path / "labels", dtype, "w+", shape=shape)
    labels[:] = noise
    annotations = {annotation["label"]: annotation for annotation in instance_annotations(labels, [0.9, 0.8, 0.7])}
    assert sorted(annotations) == sorted(set(np.unique(noise).tolist()) - {0})
    for label, annotation in annotations.items():
        mask = noise == label
        theirs = mask_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert annotation["segmentation"]["counts"] == theirs["counts"].decode("ascii")
        assert annotation["area"] == mask.sum()
        np.testing.assert_array_equal(annotation["bbox"], mask_tools.toBbox(theirs))
    np.testing.assert_array_equal(labels, noise)


def test_annotations_need_memory_for_outlines_only() -> None:
    labels = np.zeros((4000, 5000), np.uint16)
    labels[100:3900, 200:4800] = 1
    labels[1000:2000, 1000:2000] = 2
    tracemalloc.start()
    try:
        first, second = instance_annotations(labels, [0.9, 0.8])
        assert tracemalloc.get_traced_memory()[1] < 25e6  # the labels have 40 MB; a band has 16, its comparison 8
    finally:
        tracemalloc.stop()
    assert (first["area"], second["area"]) == (3800 * 4600 - 10**6, 10**6)


def test_annotations_of_extremes() -> None:
    assert instance_annotations(np.zeros((4, 4), int), []) == []
    assert instance_annotations(np.zeros((4, 4), int), [0.5]) == []  # a label without a pixel
    (whole,) = instance_annotations(np.ones((3, 2), np.int32), np.array([0.25], np.float32))
    assert whole["bbox"] == [0, 0, 2, 3]
    assert whole["area"] == 6
    assert whole["score"] == 0.25
    assert json.loads(json.dumps(whole)) == whole


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        (np.array([[0, 2]]), [0.5], r"0\.\.1, the number of scores; got 0\.\.2"),
        (np.array([[-1, 1]]), [0.5], "got -1"),
        (np.array([[0, 1]]), [np.nan], "finite"),
        (np.array([0, 1]), [0.5], "two-dimensional"),
        (np.array([[0.0, 1.0]]), [0.5], "whole numbers"),
    ],
)
def test_annotations_refuse(labels: np.ndarray, scores: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        instance_annotations(labels, scores)


def test_file_is_accepted_by_pycocotools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pycocotools.coco import COCO

    labels = {1: random_labels((30, 50), 3), 2: np.zeros((8, 8), int), 4: random_labels((64, 20), 5)}
    writer = CocoWriter(tmp_path / "instances.json", description="test", version="1.2")
    for image_id, image in labels.items():
        annotations = instance_annotations(image, np.linspace(0.8, 0.2, image.max()))
        writer.add(image_id, f"a/ü {image_id}.jpg", image.shape[1], image.shape[0], annotations)
    assert not (tmp_path / "instances.json").exists()
    writer.close()

    coco = COCO(str(tmp_path / "instances.json"))
    assert coco.getImgIds() == [1, 2, 4]
    assert coco.loadCats(coco.getCatIds()) == [{"id": 1, "name": "object", "supercategory": "object"}]
    assert coco.loadImgs(4)[0] == {"id": 4, "file_name": "a/ü 4.jpg", "width": 20, "height": 64}
    identifiers = coco.getAnnIds()
    assert identifiers == list(range(1, len(identifiers) + 1))
    for image_id, image in labels.items():
        painted = np.zeros_like(image)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image_id)):
            painted[coco.annToMask(annotation) == 1] = annotation["label"]
        np.testing.assert_array_equal(painted, image)

    # The annotations serve as detections too: evaluated against themselves, they are perfect.
    from pycocotools.cocoeval import COCOeval

    detections = coco.loadRes(json.loads((tmp_path / "instances.json").read_text())["annotations"])
    evaluation = COCOeval(coco, detections, "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)
    capsys.readouterr()


def test_empty_file_is_valid(tmp_path: Path) -> None:
    writer = CocoWriter(tmp_path / "i.json", description="test", version="1")
    writer.close()
    content = json.loads((tmp_path / "i.json").read_text())
    assert content["images"] == content["annotations"] == []
    assert content["categories"][0]["name"] == "object"


def test_discard_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "i.json").write_text("old")
    CocoWriter(tmp_path / "i.json", description="test", version="1").discard()
    assert (tmp_path / "i.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["i.json"]
