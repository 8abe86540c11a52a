from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsespec.batch.inputs import find_inputs
from sparsespec.batch.names import output_names
from sparsespec.evaluation.datasets import KINDS, DatasetError, open_dataset

VALUES = np.array([[0, 0, 3, 3], [0, 700, 700, 3], [0, 0, 0, 0]], np.uint16)


@pytest.fixture
def root(make: Any) -> Any:
    make.photo("set/images/a/x.jpg", (4, 3))
    make.photo("set/images/b.png", (4, 3))
    make.photo("set/images/c.jpg", (4, 3))
    make.labels("set/labels/a/x.png", VALUES)
    make.labels("set/labels/b.tif", np.zeros((3, 4), np.uint8))
    make.labels("set/labels/d.png", VALUES)
    return make.root / "set"


def test_images_and_truth_meet_by_name(root: Any) -> None:
    dataset = open_dataset("labels", root)
    assert dataset.name == "set"
    assert [example.name for example in dataset] == ["a/x", "b"]
    assert [example.image for example in dataset] == [root / "images/a/x.jpg", root / "images/b.png"]
    assert (dataset.without_truth, dataset.without_image) == (("c",), ("d",))
    truth = dataset.examples[0].load()
    np.testing.assert_array_equal(truth.masks, [VALUES == 3, VALUES == 700])
    assert truth.void is None
    empty = dataset.examples[1].load()
    assert (len(empty), empty.shape) == (0, (3, 4))


def test_label_images_alone_with_the_folder_of_the_images(root: Any, make: Any) -> None:
    (root / "images").rename(root / "photos")
    dataset = open_dataset("labels", root / "labels", images=root / "photos")
    assert dataset.name == "set"
    assert [example.name for example in dataset] == ["a/x", "b"]


def test_the_folder_of_labels_finds_its_images(root: Any) -> None:
    assert len(open_dataset("labels", root / "labels")) == 2


def test_names_are_those_of_a_run(root: Any, make: Any) -> None:
    # Two images of one stem keep their endings, as the masks of a run over them do.
    make.photo("set/images/b.jpg", (4, 3))
    make.labels("set/labels/b.jpg.png", VALUES)
    make.labels("set/labels/b.png.png", VALUES)
    dataset = open_dataset("labels", root)
    images = find_inputs(root / "images").images
    assert {e.name for e in dataset} | set(dataset.without_truth) == set(output_names(images))
    assert [example.name for example in dataset] == ["a/x", "b.jpg", "b.png"]
    assert dataset.without_image == ("b", "d")


def test_sizes_that_differ_are_named(root: Any, make: Any) -> None:
    make.photo("set/images/a/x.jpg", (40, 30))
    with pytest.raises(DatasetError, match=r"x\.png' is 4 x 3 pixels, and the image '.*x\.jpg' is 40 x 30"):
        open_dataset("labels", root).examples[0].load()


def test_the_size_of_an_image_is_that_of_the_upright_picture(root: Any, make: Any) -> None:
    make.photo("set/images/a/x.jpg", (3, 4), orientation=6)
    assert open_dataset("labels", root).examples[0].load().shape == (3, 4)
    make.photo("set/images/a/x.jpg", (4, 3), orientation=6)
    with pytest.raises(DatasetError, match=r"is 3 x 4, turned upright as its EXIF orientation says"):
        open_dataset("labels", root).examples[0].load()


def test_an_image_or_a_label_image_that_cannot_be_read(root: Any) -> None:
    (root / "labels/a/x.png").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match=r"cannot read the label image '.*x\.png'"):
        open_dataset("labels", root).examples[0].load()
    (root / "images/b.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read image '.*b\.png'"):
        open_dataset("labels", root).examples[1].load()


def test_colours_are_no_labels_but_grey_saved_as_colour_is(root: Any, make: Any) -> None:
    make.photo("set/labels/a/x.png", (4, 3))
    with pytest.raises(DatasetError, match=r"is not a label image.*shape \(3, 4, 3\).*saved anew with colours"):
        open_dataset("labels", root).examples[0].load()
    grey = (VALUES > 0).astype(np.uint8) * 7
    make.labels("set/labels/a/x.png", np.dstack([grey, grey, grey, np.full_like(grey, 255)]))
    np.testing.assert_array_equal(open_dataset("labels", root).examples[0].load().masks, [VALUES > 0])


def test_a_picture_of_many_values_is_not_taken_for_labels(root: Any, make: Any) -> None:
    make.photo("set/images/a/x.jpg", (300, 230))
    make.labels("set/labels/a/x.png", np.arange(230 * 300).reshape(230, 300).astype(np.uint16))
    with pytest.raises(DatasetError, match=r"has 65536 different values, too many to be instances"):
        open_dataset("labels", root).examples[0].load()


def test_two_label_images_of_one_name(root: Any, make: Any) -> None:
    make.labels("set/labels/a/x.tif", VALUES)
    with pytest.raises(DatasetError, match=r"one name: '.*x\.png' and '.*x\.tif'"):
        open_dataset("labels", root)


def test_no_common_name(make: Any) -> None:
    make.photo("set/images/x.jpg")
    make.labels("set/labels/y.png", VALUES)
    with pytest.raises(DatasetError, match=r"such as 'y', is in '.*images'; the images there are x"):
        open_dataset("labels", make.root / "set")


def test_errors_say_what_belongs_where(root: Any, make: Any) -> None:
    with pytest.raises(DatasetError, match=r"'.*/nowhere' does not exist; give the folder that holds images/"):
        open_dataset("labels", make.root / "nowhere")
    with pytest.raises(DatasetError, match=r"images' holds a/, b\.png, c\.jpg"):
        open_dataset("labels", root / "images")
    with pytest.raises(DatasetError, match=r"it looks as if you meant '.*/set'"):
        open_dataset("labels", make.root)
    make.text("set/labels.zip", "")
    with pytest.raises(DatasetError, match=r"is a file: unpack it, and give the folder"):
        open_dataset("labels", root / "labels.zip")
    with pytest.raises(DatasetError, match=r"no splits; leave out the split 'val'"):
        open_dataset("labels", root, split="val")
    for path in (root / "labels").rglob("*.*"):
        path.unlink()
    with pytest.raises(DatasetError, match=r"has no label image in it \(\.png \.tif \.tiff\)"):
        open_dataset("labels", root)
    (root / "labels/a").rmdir()
    (root / "labels").rmdir()
    with pytest.raises(DatasetError, match=r"holds images/, labels\.zip; unpack labels\.zip there first"):
        open_dataset("labels", root)


def test_unknown_kind() -> None:
    with pytest.raises(DatasetError, match=r"kind must be one of labels, coco, youtube-vis, .* not 'coco2017'"):
        open_dataset("coco2017", ".")
    assert len(KINDS) == 8
