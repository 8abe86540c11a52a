from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsespec.evaluation.datasets import DatasetError, open_dataset

SHAPE = np.zeros((6, 8), bool)
SHAPE[2:5, 3:7] = True
PAIR = np.zeros((6, 8), np.uint8)
PAIR[:2, :2] = 1
PAIR[4:, 4:] = 2


def line(sequence: str, frame: int) -> str:
    name = f"480p/{sequence}/{frame:05d}"
    return f"/JPEGImages/{name}.jpg /Annotations/{name}.png "


@pytest.fixture
def of2016(make: Any) -> Any:
    for sequence in ("bear", "car-turn"):
        for frame in range(3):
            make.photo(f"DAVIS/JPEGImages/480p/{sequence}/{frame:05d}.jpg")
            make.labels(f"DAVIS/Annotations/480p/{sequence}/{frame:05d}.png", SHAPE.astype(np.uint8) * 255)
    make.text("DAVIS/ImageSets/480p/val.txt", *(line("car-turn", frame) for frame in range(3)))
    make.text("DAVIS/ImageSets/480p/train.txt", *(line("bear", frame) for frame in range(3)))
    return make.root / "DAVIS"


@pytest.fixture
def of2017(make: Any) -> Any:
    for sequence in ("bear", "dogs-jump", "gold-fish"):
        for frame in range(2):
            make.photo(f"DAVIS/JPEGImages/480p/{sequence}/{frame:05d}.jpg")
            make.palette(f"DAVIS/Annotations/480p/{sequence}/{frame:05d}.png", PAIR)
    make.text("DAVIS/ImageSets/2017/val.txt", "dogs-jump", "gold-fish")
    make.text("DAVIS/ImageSets/2017/train.txt", "bear")
    make.text("DAVIS/ImageSets/2016/val.txt", "bear")
    return make.root / "DAVIS"


def test_one_object_in_each_frame_of_2016(of2016: Any, make: Any) -> None:
    dataset = open_dataset("davis2016", of2016)
    assert dataset.name == "DAVIS 2016 val"
    assert [example.name for example in dataset] == ["car-turn/00000", "car-turn/00001", "car-turn/00002"]
    assert (dataset.without_truth, dataset.without_image) == ((), ())
    np.testing.assert_array_equal(dataset.examples[0].load().masks, [SHAPE])
    assert open_dataset("davis2016", make.root, split="train").examples[0].name == "bear/00000"


def test_masks_of_2016_saved_in_other_ways(of2016: Any, make: Any) -> None:
    path = "DAVIS/Annotations/480p/car-turn/00000.png"
    for values in (SHAPE, SHAPE.astype(np.uint8), np.dstack([SHAPE.astype(np.uint8) * 255] * 3)):
        make.labels(path, values)
        np.testing.assert_array_equal(open_dataset("davis2016", of2016).examples[0].load().masks, [SHAPE])
    make.labels(path, np.zeros((6, 8), np.uint8))
    assert len(open_dataset("davis2016", of2016).examples[0].load()) == 0


def test_several_objects_are_none_of_2016(of2016: Any, make: Any) -> None:
    make.palette("DAVIS/Annotations/480p/car-turn/00000.png", PAIR + (PAIR > 0))
    with pytest.raises(DatasetError, match=r"00000\.png' has the values 2, 3.*their kind is davis2017"):
        open_dataset("davis2016", of2016).examples[0].load()


def test_what_lacks_its_other_half_in_2016(of2016: Any) -> None:
    (of2016 / "Annotations/480p/car-turn/00001.png").unlink()
    (of2016 / "JPEGImages/480p/car-turn/00002.jpg").unlink()
    dataset = open_dataset("davis2016", of2016)
    assert [example.name for example in dataset] == ["car-turn/00000"]
    assert (dataset.without_truth, dataset.without_image) == (("car-turn/00001",), ("car-turn/00002",))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["car-turn"], "line 1 of .* is 'car-turn', and should be '/JPEGImages/480p/<name>.jpg /Annotations/480p/"),
        ([line("bear", 0), "/JPEGImages/480p/bear/00001.jpg"], "line 2 of .* and should be"),
        (["/JPEGImages/1080p/bear/0.jpg /Annotations/1080p/bear/0.png"], "line 1 of .* and should be"),
        (["/JPEGImages/480p/../../x.jpg /Annotations/480p/bear/0.png"], "line 1 of .*refused"),
        ([line("bear", 0), line("bear", 0)], "lines 1 and 2 of .* are the same"),
        ([line("bear", 0), line("bear", 0).replace("480p/bear/00000.png", "480p/x.png")], "frame 'bear/00000' twice"),
        ([line("cow", 0)], r"none of the images that .*val\.txt' describes, such as 'cow/00000'"),
    ],
)
def test_lists_of_2016(of2016: Any, make: Any, lines: Any, message: str) -> None:
    make.text("DAVIS/ImageSets/480p/val.txt", *lines)
    with pytest.raises(DatasetError, match=message):
        open_dataset("davis2016", of2016)


def test_each_object_of_2017(of2017: Any, make: Any) -> None:
    void = PAIR.copy()
    void[0] = 255
    make.palette("DAVIS/Annotations/480p/gold-fish/00001.png", void)
    (of2017 / "Annotations/480p/gold-fish/00000.png").unlink()
    make.palette("DAVIS/Annotations/480p/gold-fish/00007.png", PAIR)
    dataset = open_dataset("davis2017", make.root)
    assert dataset.name == "DAVIS 2017 val"
    assert [example.name for example in dataset] == ["dogs-jump/00000", "dogs-jump/00001", "gold-fish/00001"]
    assert (dataset.without_truth, dataset.without_image) == (("gold-fish/00000",), ("gold-fish/00007",))
    np.testing.assert_array_equal(dataset.examples[0].load().masks, [PAIR == 1, PAIR == 2])
    truth = dataset.examples[2].load()
    np.testing.assert_array_equal(truth.masks, [void == 1, void == 2])
    np.testing.assert_array_equal(truth.void, void == 255)
    assert [e.name for e in open_dataset("davis2017", of2017, split="train")] == ["bear/00000", "bear/00001"]


def test_masks_of_the_download_without_prompts(of2017: Any) -> None:
    (of2017 / "Annotations").rename(of2017 / "Annotations_unsupervised")
    assert len(open_dataset("davis2017", of2017)) == 4


def test_sequences_that_are_missing(of2017: Any, make: Any) -> None:
    make.text("DAVIS/ImageSets/2017/val.txt", "dogs-jump", "cows")
    with pytest.raises(DatasetError, match=r"lists 'cows', of which there is neither a frame nor a mask \(1 of 2"):
        open_dataset("davis2017", of2017)


def test_one_year_for_the_other(of2016: Any) -> None:
    with pytest.raises(DatasetError, match="that is DAVIS 2016: its kind is davis2016"):
        open_dataset("davis2017", of2016)


def test_the_other_year_for_the_one(of2017: Any) -> None:
    with pytest.raises(DatasetError, match="that is DAVIS 2017: its kind is davis2017"):
        open_dataset("davis2016", of2017)


@pytest.mark.parametrize("kind", ["davis2016", "davis2017"])
def test_errors_say_what_belongs_where(of2016: Any, of2017: Any, make: Any, kind: str) -> None:
    with pytest.raises(DatasetError, match=r"split 'test' is missing: .* there are those of train, val"):
        open_dataset(kind, of2016, split="test")
    with pytest.raises(DatasetError, match=r"it looks as if you meant '.*/DAVIS'"):
        open_dataset(kind, of2016 / "JPEGImages")
    (of2016 / "JPEGImages").rename(make.root / "Frames")
    with pytest.raises(DatasetError, match=r"frames are missing: they belong in '.*/JPEGImages/480p'; .* holds Anno"):
        open_dataset(kind, of2016)
    assert len(open_dataset(kind, of2016, images=make.root / "Frames/480p")) > 2
    (of2016 / "Annotations").rename(make.root / "Masks")
    with pytest.raises(DatasetError, match=r"the masks of the frames: '.*/Annotations/480p' is not a folder"):
        open_dataset(kind, of2016, images=make.root / "Frames/480p")
