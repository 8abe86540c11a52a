from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest

from sparsespec.evaluation import Dataset, Example, TrueInstances, evaluate, evaluate_folders
from sparsespec.formats.coco import CocoWriter, instance_annotations
from sparsespec.formats.labels import write_label_png

TRUTH = np.array([[1, 1, 0, 2, 2], [1, 1, 0, 2, 2]])
FOUND = np.array([[1, 1, 0, 0, 2], [1, 1, 0, 0, 0]])


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    folder = tmp_path / "truth"
    for name in ("a/x", "b", "empty"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_label_png(folder / f"{name}.png", TRUTH if name != "empty" else np.zeros_like(TRUTH))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The output of a run, in which the wrong instance of each image has the higher score."""
    folder = tmp_path / "run"
    masks = folder / "masks"
    (masks / "a").mkdir(parents=True)
    coco = CocoWriter(folder / "instances.json", description="", version="0")
    for image_id, name in enumerate(("a/x.jpg", "b.png", "empty.jpg"), start=1):
        labels = FOUND if "empty" not in name else np.zeros_like(FOUND)
        write_label_png((masks / name).with_suffix(".png"), labels)
        coco.add(image_id, name, 5, 2, instance_annotations(labels, [0.25, 0.75]))
    coco.close()
    return folder


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.needs("pycocotools")
def test_a_run_is_ranked_by_its_scores(run: Path, truth: Path) -> None:
    report = evaluate_folders(run, truth)
    assert list(report.images) == ["a/x", "b", "empty"]
    assert report.summary.mean_iou == pytest.approx((1 + 0.25) / 2)
    assert report.summary.ap_50 == pytest.approx(0.5 * 51 / 101)  # two wrong, two right: half of the recall at 1/2
    assert report.summary.false_on_empty == 0
    assert report.notes == []


@pytest.mark.needs("pycocotools")
def test_the_masks_alone_have_no_scores(run: Path, truth: Path) -> None:
    report = evaluate_folders(run / "masks", truth)
    assert report.summary.mean_iou == pytest.approx((1 + 0.25) / 2)
    # All equal, they rank in the order of their labels: right, wrong, right, wrong.
    assert report.summary.ap_50 == pytest.approx((26 * 1 + 25 * 2 / 3) / 101)
    assert "rank equal" in report.notes[0]
    (run / "instances.json").unlink()
    assert evaluate_folders(run, truth).notes == report.notes


def test_values_of_a_plain_folder_may_be_any(tmp_path: Path, truth: Path) -> None:
    (tmp_path / "plain").mkdir()
    iio.imwrite(tmp_path / "plain" / "b.tif", (FOUND * 30_000).astype(np.uint16))
    (tmp_path / "plain" / "instances.json").write_text("this is somebody's own file")
    report = evaluate_folders(tmp_path / "plain", truth)
    assert report.images["b"].matches_50 == 1
    assert report.without_prediction == ["a/x", "empty"]


def test_what_is_in_one_folder_only_is_listed(run: Path, truth: Path) -> None:
    (truth / "empty.png").rename(truth / "other.png")
    report = evaluate_folders(run, truth)
    assert (report.without_prediction, report.without_truth) == (["other"], ["empty"])
    assert list(report.images) == ["a/x", "b"]


def test_sizes_that_differ_name_both_files_and_sizes(run: Path, truth: Path) -> None:
    write_label_png(truth / "b.png", np.zeros((3, 4), int))
    prediction, true = re.escape(str(run / "masks" / "b.png")), re.escape(str(truth / "b.png"))
    with pytest.raises(ValueError, match=f"'{prediction}' is 5 x 2 and '{true}' is 4 x 3 pixels"):
        evaluate_folders(run, truth)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pred_dir .* is not a folder"):
        evaluate_folders(tmp_path / "none", tmp_path)
    with pytest.raises(ValueError, match="holds no label image"):
        evaluate_folders(tmp_path, tmp_path)
    (tmp_path / "p").mkdir()
    (tmp_path / "t").mkdir()
    iio.imwrite(tmp_path / "p" / "a.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"truth_dir .*t' holds no label image"):
        evaluate_folders(tmp_path / "p", tmp_path / "t")
    iio.imwrite(tmp_path / "t" / "b.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match="no image of pred_dir"):
        evaluate_folders(tmp_path / "p", tmp_path / "t")
    (tmp_path / "t" / "a.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"cannot read the label image .*a\.png"):
        evaluate_folders(tmp_path / "p", tmp_path / "t")
    iio.imwrite(tmp_path / "t" / "a.png", np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(ValueError, match="is not a label image"):
        evaluate_folders(tmp_path / "p", tmp_path / "t")
    iio.imwrite(tmp_path / "p" / "a.tif", np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match="two label images of one name"):
        evaluate_folders(tmp_path / "p", tmp_path / "t")


@pytest.mark.parametrize("content", ["", "{", '{"images": [', "\x00\xff", "no JSON at all", "[" * 200_000])
def test_instances_that_are_no_json(run: Path, truth: Path, content: str) -> None:
    (run / "instances.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"cannot read '.*instances\.json' as JSON"):
        evaluate_folders(run, truth)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.pop("images"), "'images' is missing"),
        (lambda c: c.pop("annotations"), "'annotations' is missing"),
        (lambda c: c.update(images=None), "not iterable"),
        (lambda c: c.update(images=["a/x.jpg"]), "string indices"),
        (lambda c: c["images"][0].pop("width"), "'width' is missing"),
        (lambda c: c["images"][0].update(file_name=7), "file_name 7"),
        (lambda c: c["images"][1].update(id=1), "image 1 is listed twice"),
        (lambda c: c["images"][1].update(file_name="a/x.jpg"), r"'a/x\.jpg' is listed twice"),
        (lambda c: c["annotations"][0].pop("score"), "'score' is missing"),
        (lambda c: c["annotations"][0].update(score=None), "float"),
        (lambda c: c["annotations"][0].update(score=float("nan")), "score nan"),
        (lambda c: c["annotations"][0].update(score="high"), "high"),
        (lambda c: c["images"][0].update(width=float("inf")), "infinity"),
        (lambda c: c["annotations"][0].update(label=0), "label 0"),
        (lambda c: c["annotations"][0].update(label=2**40), "label 1099511627776"),
        (lambda c: c["images"][0].update(file_name="../x.jpg"), "'../x.jpg' cannot have results"),
        (lambda c: c["images"][0].update(file_name="/x.jpg"), "its path is absolute"),
        (lambda c: c["images"][0].update(page=0), "page 0 of 'a/x.jpg'"),
        (lambda c: c["images"][0].update(page="1"), "page '1' of 'a/x.jpg'"),
        (lambda c: c["annotations"][0].update(label=2), "two instances of label 2"),
        (lambda c: c["annotations"][0].update(image_id=9), "image 9, which is not listed"),
    ],
)
def test_instances_of_the_wrong_kind(
    run: Path, truth: Path, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    edit(run / "instances.json", change)
    with pytest.raises(ValueError, match=rf"instances\.json' is not the instances\.json of a run.*{reason}"):
        evaluate_folders(run, truth)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"', '{"images": {}, "annotations": [3]}'])
def test_json_of_another_shape(run: Path, truth: Path, content: str) -> None:
    (run / "instances.json").write_text(content)
    with pytest.raises(ValueError, match=r"instances\.json' is not the instances\.json of a run"):
        evaluate_folders(run, truth)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c["images"].pop(2), r"lists no image for the mask '.*empty\.png'"),
        (lambda c: c["images"][1].update(width=6), r"says 6 x 2, and the mask '.*b\.png' is 5 x 2 pixels"),
        (lambda c: c["annotations"].pop(3), "instance 2 has 0 pixels in the one and 1 in the other"),
        (lambda c: c["annotations"][3].update(area=2), "instance 2 has 2 pixels in the one and 1 in the other"),
        (lambda c: c["annotations"][3].update(label=3), "instance 2 has 0 pixels in the one and 1 in the other"),
        (lambda c: c["annotations"][3].update(image_id=3), "instance 2 has"),
    ],
)
def test_instances_that_do_not_fit_the_masks(
    run: Path, truth: Path, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    edit(run / "instances.json", change)
    with pytest.raises(ValueError, match=rf"instances\.json.*{reason}"):
        evaluate_folders(run, truth)


def test_masks_that_keep_the_ending_of_their_image(run: Path, truth: Path) -> None:
    # What a run does where two images share a name.
    (run / "masks" / "b.png").rename(run / "masks" / "b.png.png")
    (truth / "b.png").rename(truth / "b.png.png")
    assert list(evaluate_folders(run, truth).images) == ["a/x", "b.png", "empty"]


def test_masks_of_pages_and_of_names_that_were_cleaned(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    coco = CocoWriter(folder / "instances.json", description="", version="0")
    masks = ["scan.tif/page-0001", "scan.tif/page-0002", "a%3Ab", "X.jpg", "x.jpg.2"]
    images = [("scan.tif", 1), ("scan.tif", 2), ("a:b.jpg", None), ("X.jpg", None), ("x.jpg", None)]
    for image_id, (mask, (image, page)) in enumerate(zip(masks, images, strict=True), start=1):
        labels = np.roll(FOUND, image_id, axis=1)
        (folder / "masks" / mask).parent.mkdir(parents=True, exist_ok=True)
        write_label_png(folder / "masks" / f"{mask}.png", labels)
        coco.add(image_id, image, 5, 2, instance_annotations(labels, [0.25, image_id / 16]), page=page)
    coco.close()
    report = evaluate_folders(folder, folder)
    assert sorted(report.images) == sorted(masks)
    assert report.summary.mean_iou == 1
    # True label images may be called like the images.
    truth = tmp_path / "truth"
    truth.mkdir()
    write_label_png(truth / ("a:b.png" if os.name != "nt" else "a%3Ab.png"), np.roll(FOUND, 3, axis=1))
    assert list(evaluate_folders(folder, truth).images) == ["a%3Ab"]


def dataset(tmp_path: Path, **instances: TrueInstances) -> Dataset:
    examples = [
        Example(name.replace("__", "/"), tmp_path / f"{name}.jpg", lambda true=true: true)
        for name, true in instances.items()
    ]
    return Dataset("a set", examples, without_truth=["unjudged"], without_image=["lost"])


@pytest.mark.needs("pycocotools")
def test_a_data_set(run: Path, tmp_path: Path) -> None:
    masks = np.stack([TRUTH > 0, TRUTH == 1])
    true = TrueInstances(masks, np.zeros(2, bool))
    report = evaluate(dataset(tmp_path, b=true, a__x=true, more=true), run)
    assert list(report.images) == ["b", "a/x"]
    assert report.summary.mean_iou == pytest.approx((1 + 1 / 8) / 2)
    assert report.notes == []
    assert report.without_prediction == ["more"]
    assert report.without_truth == ["empty", "unjudged"]
    assert report.without_image == ["lost"]


def test_truth_is_read_only_where_there_is_a_prediction(run: Path, tmp_path: Path) -> None:
    def unreadable() -> TrueInstances:
        raise AssertionError("not needed")

    true = TrueInstances.from_labels(TRUTH)
    examples = [Example("b", tmp_path / "b.jpg", lambda: true), Example("z", tmp_path / "z.jpg", unreadable)]
    assert list(evaluate(Dataset("two", examples), run).images) == ["b"]


def test_a_data_set_that_does_not_fit(run: Path, tmp_path: Path) -> None:
    other = TrueInstances.from_labels(np.zeros((3, 4), int))
    with pytest.raises(ValueError, match=r"masks.b\.png' is 5 x 2 and .*b\.jpg' is 4 x 3 pixels"):
        evaluate(dataset(tmp_path, b=other), run)
    with pytest.raises(ValueError, match="one of the 2 images of a set, such as 'y'; names are compared"):
        evaluate(dataset(tmp_path, z=other, y=other), run)
    with pytest.raises(ValueError, match="the 0 images of a set;"):
        evaluate(dataset(tmp_path), run)
