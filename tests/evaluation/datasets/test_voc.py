from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsespec.evaluation.datasets import DatasetError, open_dataset

OBJECTS = np.zeros((6, 8), np.uint8)
OBJECTS[1:3, 1:4] = 1
OBJECTS[3:, 5:] = 2
RIMMED = OBJECTS.copy()
RIMMED[3, 5:] = 255


def write(make: Any, base: str) -> None:
    for name, values in (("000001", RIMMED), ("2007_000002", OBJECTS), ("000003", OBJECTS)):
        make.palette(f"{base}/SegmentationObject/{name}.png", values)
        make.palette(f"{base}/SegmentationClass/{name}.png", values)
    for name in ("000001", "2007_000002", "000003", "000004", "000005"):
        make.photo(f"{base}/JPEGImages/{name}.jpg")
    make.text(f"{base}/ImageSets/Segmentation/val.txt", "000001", "2007_000002", "")
    make.text(f"{base}/ImageSets/Segmentation/train.txt", "000003", "000004")
    make.text(f"{base}/ImageSets/Segmentation/test.txt", "000005")
    make.text(f"{base}/ImageSets/Main/val.txt", "000005")


@pytest.fixture
def root(make: Any) -> Any:
    write(make, "VOCdevkit/VOC2012")
    return make.root / "VOCdevkit/VOC2012"


def test_objects_and_void(root: Any) -> None:
    dataset = open_dataset("voc", root)
    assert dataset.name == "VOC2012 val"
    assert [example.name for example in dataset] == ["000001", "2007_000002"]
    assert (dataset.without_truth, dataset.without_image) == ((), ())
    rimmed, plain = (example.load() for example in dataset)
    np.testing.assert_array_equal(rimmed.masks, [RIMMED == 1, RIMMED == 2])
    np.testing.assert_array_equal(rimmed.void, RIMMED == 255)
    np.testing.assert_array_equal(plain.masks, [OBJECTS == 1, OBJECTS == 2])
    assert plain.void is None


def test_the_other_split_lists_what_lacks_its_other_half(root: Any, make: Any) -> None:
    make.palette("VOCdevkit/VOC2012/SegmentationObject/000006.png", OBJECTS)
    make.text("VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt", "000003", "000004", "000006", "000007")
    dataset = open_dataset("voc", root, split="train")
    assert [example.name for example in dataset] == ["000003"]
    assert dataset.without_truth == ("000004",)
    assert dataset.without_image == ("000006", "000007")


def test_the_folders_above_will_do(root: Any, make: Any) -> None:
    assert open_dataset("voc", make.root).name == "VOC2012 val"
    assert open_dataset("voc", make.root / "VOCdevkit").name == "VOC2012 val"
    write(make, "VOCdevkit/VOC2007")
    assert open_dataset("voc", make.root / "VOCdevkit/VOC2007").name == "VOC2007 val"
    for folder in (make.root, make.root / "VOCdevkit"):
        with pytest.raises(DatasetError, match="holds VOC2012 and VOC2007; give the folder of one of them"):
            open_dataset("voc", folder)


def test_images_elsewhere(root: Any) -> None:
    (root / "JPEGImages").rename(root.parent / "photos")
    with pytest.raises(DatasetError, match=r"images are missing: they belong in '.*VOC2012/JPEGImages'"):
        open_dataset("voc", root)
    assert len(open_dataset("voc", root, images=root.parent / "photos")) == 2
    with pytest.raises(DatasetError, match=r"the images: '.*/nowhere' is not a folder; '.*' holds VOC2012/, photos/"):
        open_dataset("voc", root, images=root.parent / "nowhere")


def test_masks_saved_with_colours(root: Any, make: Any) -> None:
    make.labels("VOCdevkit/VOC2012/SegmentationObject/000001.png", np.dstack([OBJECTS * 128, OBJECTS, OBJECTS]))
    with pytest.raises(DatasetError, match=r"000001\.png' is not a label image.*saved anew with colours"):
        open_dataset("voc", root).examples[0].load()


def test_sizes_that_differ_are_named(root: Any, make: Any) -> None:
    make.photo("VOCdevkit/VOC2012/JPEGImages/000001.jpg", (80, 60))
    with pytest.raises(DatasetError, match=r"000001\.png' is 8 x 6 pixels, and the image '.*1\.jpg' is 80 x 60"):
        open_dataset("voc", root).examples[0].load()


def test_errors_say_what_belongs_where(root: Any, make: Any) -> None:
    lists = root / "ImageSets/Segmentation"
    with pytest.raises(DatasetError, match=r"it looks as if you meant '.*/VOC2012'"):
        open_dataset("voc", root / "JPEGImages")
    with pytest.raises(
        DatasetError, match=r"split 'minival' is missing: .*minival\.txt'; there are those of test, train"
    ):
        open_dataset("voc", root, split="minival")
    with pytest.raises(DatasetError, match=r"none of the 1 images .*never published: use val"):
        open_dataset("voc", root, split="test")
    for lines, message in (
        (("000001", "000002", "000001"), "lines 1 and 3 of .* are the same: '000001'"),
        (("../../etc/passwd",), "line 1 of .*refused"),
        ((), "is empty"),
    ):
        make.text("VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", *lines)
        with pytest.raises(DatasetError, match=message):
            open_dataset("voc", root)
    (lists / "val.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DatasetError, match=r"cannot read the list '.*val\.txt'"):
        open_dataset("voc", root)
    for path in lists.iterdir():
        path.unlink()
    with pytest.raises(DatasetError, match=r"val\.txt'; '.*/Segmentation' is empty"):
        open_dataset("voc", root)
    (root / "SegmentationObject").rename(root / "SegmentationObjects")
    make.text("VOCdevkit/VOC2012/VOCtrainval_11-May-2012.tar", "")
    with pytest.raises(
        DatasetError, match=r"expected in '.*': SegmentationObject/.*unpack VOCtrainval_11-May-2012\.tar"
    ):
        open_dataset("voc", root)
