from __future__ import annotations

import json
import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest

from sparsespec.evaluation.datasets import DatasetError, open_dataset
from sparsespec.formats import encode_rle

CROWD = np.zeros((6, 8), bool)
CROWD[4:, 2:] = True
SQUARE = [1.0, 1.0, 4.0, 1.0, 4.0, 3.0, 1.0, 3.0]
FAR = [6.0, 0.0, 8.0, 0.0, 8.0, 2.0, 6.0, 2.0]


def annotations(runs: Any) -> dict[str, Any]:
    return {
        "info": {"description": "tiny"},
        "licenses": [],
        "images": [
            {"id": 9, "file_name": "000000000009.jpg", "width": 8, "height": 6},
            {"id": 4, "file_name": "000000000004.jpg", "width": 8, "height": 6},
            {"id": 5, "file_name": "000000000005.jpg", "width": 8, "height": 6},
            {"id": 6, "file_name": "000000000006.jpg", "width": 8, "height": 6},
        ],
        "annotations": [
            {
                "id": 70,
                "image_id": 9,
                "category_id": 1,
                "iscrowd": 0,
                "segmentation": [SQUARE, FAR],
                "bbox": [1, 1, 7, 2],
            },
            {"id": 71, "image_id": 4, "category_id": 1, "iscrowd": 0, "segmentation": [SQUARE]},
            {"id": 900100, "image_id": 9, "category_id": 1, "iscrowd": 1, "segmentation": runs(CROWD)},
            {"id": 72, "image_id": 4, "category_id": 2, "segmentation": encode_rle(CROWD)},
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}],
    }


@pytest.fixture
def data(runs: Any) -> dict[str, Any]:
    return annotations(runs)


@pytest.fixture
def root(make: Any, data: Any) -> Any:
    make.json("coco/annotations/instances_val2017.json", data)
    make.json(
        "coco/annotations/instances_train2017.json",
        {"images": [{"id": 1, "file_name": "1.jpg", "width": 8, "height": 6}], "annotations": []},
    )
    make.photo("coco/train2017/1.jpg")
    for number in (4, 5, 9):
        make.photo(f"coco/val2017/00000000000{number}.jpg")
    make.photo("coco/val2017/extra.jpg")
    return make.root / "coco"


def rewrite(make: Any, data: Any) -> None:
    make.json("coco/annotations/instances_val2017.json", data)


def test_polygons_crowds_and_images_with_nothing(root: Any) -> None:
    dataset = open_dataset("coco", root)
    assert dataset.name == "COCO val2017"
    assert [example.name for example in dataset] == ["000000000004", "000000000005", "000000000009"]
    assert (dataset.without_truth, dataset.without_image) == (("extra",), ("000000000006",))
    two, nothing, crowded = (example.load() for example in dataset)
    square = np.zeros((6, 8), bool)
    square[1:3, 1:4] = True
    far = np.zeros((6, 8), bool)
    far[:2, 6:] = True
    np.testing.assert_array_equal(two.masks, [square, CROWD])
    assert (len(nothing), nothing.shape) == (0, (6, 8))
    np.testing.assert_array_equal(crowded.masks, [square | far, CROWD])
    assert crowded.crowd.tolist() == [False, True]
    assert len(crowded) == 1


def test_the_other_split(root: Any) -> None:
    dataset = open_dataset("coco", root, split="train2017")
    assert [example.name for example in dataset] == ["1"]
    assert dataset.without_truth == ()


def test_a_file_of_annotations_with_its_images(root: Any) -> None:
    file = root / "annotations/instances_val2017.json"
    dataset = open_dataset("coco", file, images=root / "val2017")
    assert (dataset.name, len(dataset)) == ("val2017", 3)
    with pytest.raises(DatasetError, match="give the folder of its images too"):
        open_dataset("coco", file)
    with pytest.raises(DatasetError, match="leave out the split 'val2017'"):
        open_dataset("coco", file, images=root / "val2017", split="val2017")


def test_examples_can_be_sent_to_other_processes(root: Any) -> None:
    example = pickle.loads(pickle.dumps(open_dataset("coco", root).examples[2]))
    assert len(example.load()) == 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_masks_equal_those_of_pycocotools(root: Any) -> None:
    pytest.importorskip("pycocotools", reason="pycocotools judges our masks")
    from pycocotools.coco import COCO

    truth = COCO(root / "annotations/instances_val2017.json")
    for example in open_dataset("coco", root):
        theirs = [truth.annToMask(row) for row in truth.imgToAnns[int(example.name)]]
        np.testing.assert_array_equal(example.load().masks, np.reshape(theirs, (-1, 6, 8)))


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [6, 8], "counts": [1, 2]}, "counts cover 3 pixels"),
        ({"size": [6, 8], "counts": "~~"}, "have the character '~'"),
        ({"size": [8, 6], "counts": [48]}, "the mask is 6 x 8 pixels, and the image is described as 8 x 6"),
        ([[1, 2, 3]], "a polygon has 3 numbers"),
        ([1, 2, 3, 4, 5, 6], "a polygon is not a list of numbers but 1"),
        ([], "neither runs nor polygons"),
    ],
)
def test_a_mask_that_does_not_decode(root: Any, make: Any, data: Any, segmentation: Any, message: str) -> None:
    data["annotations"][1]["segmentation"] = segmentation
    rewrite(make, data)
    dataset = open_dataset("coco", root)
    with pytest.raises(DatasetError, match=rf"annotation 71 of '.*instances_val2017\.json': .*{message}"):
        dataset.examples[0].load()
    assert len(dataset.examples[2].load()) == 1


def test_sizes_that_differ_are_named(root: Any, make: Any) -> None:
    make.photo("coco/val2017/000000000009.jpg", (80, 60))
    with pytest.raises(DatasetError, match=r"image 9 of '.*' is 8 x 6 pixels, and the image '.*9\.jpg' is 80 x 60"):
        open_dataset("coco", root).examples[2].load()


NAMES_OUT = [
    "../secret.jpg", "/etc/passwd", "a/../../b.jpg", "C:\\x.jpg", "C:/x.jpg", "..\\x.jpg", "\\\\host\\x.jpg",
    "//host/x.jpg",
    "a\x00.jpg", ".", "..", " ", "", None, 7, ["a.jpg"], {"a": 1},
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES_OUT)
def test_names_that_leave_the_folder(root: Any, make: Any, data: Any, name: Any) -> None:
    data["images"][1]["file_name"] = name
    rewrite(make, data)
    with pytest.raises(DatasetError, match=r"image 4 of '.*' names (the file .* refused|no file, but)"):
        open_dataset("coco", root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["images"].append(d["images"][0]), "two entries of 'images' with the id 9"),
        (lambda d: d["images"].append({**d["images"][0], "id": 77}), "lists the image '000000000009.jpg' twice"),
        (lambda d: d["annotations"].append(d["annotations"][0]), "two entries of 'annotations' with the id 70"),
        (lambda d: d["annotations"][0].update(image_id=1), "annotation 70 of .* belongs to image_id 1, which"),
        (lambda d: d["annotations"][0].update(image_id="9"), "annotation 70 of .* has image_id '9'"),
        (lambda d: d["annotations"][0].update(iscrowd=3), "annotation 70 of .* has iscrowd 3"),
        (lambda d: d["annotations"][0].pop("id"), "an entry of 'annotations' in .* has id None"),
        (lambda d: d["images"][0].update(height=0), "image 9 of .* has height 0"),
        (lambda d: d["images"][0].pop("width"), "image 9 of .* has width None"),
        (lambda d: d.pop("images"), "no list of objects 'images'; it has 'info'"),
        (lambda d: d.update(images=[1]), "no list of objects 'images'"),
    ],
)
def test_entries_that_contradict_each_other(root: Any, make: Any, data: Any, change: Any, message: str) -> None:
    change(data)
    rewrite(make, data)
    with pytest.raises(DatasetError, match=message):
        open_dataset("coco", root)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 1, "image_id": 9, "caption": "a dog"}], "holds captions; of COCO give the file instances_"),
        ([{"image_id": 9, "file_name": "9.png", "segments_info": []}], "holds panoptic annotations"),
        ([{"id": 1, "image_id": 9, "keypoints": [0, 0, 0], "bbox": [0, 0, 1, 1]}], "holds keypoints without masks"),
        ([{"id": 1, "image_id": 9, "bbox": [0, 0, 1, 1]}], "holds boxes without masks"),
        (None, "truth was never published: use val2017 or train2017"),
    ],
)
def test_json_of_another_kind(root: Any, make: Any, data: Any, rows: Any, message: str) -> None:
    rewrite(make, {**data, "annotations": rows})
    with pytest.raises(DatasetError, match=message):
        open_dataset("coco", root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"image_id": 9, "category_id": 1, "score": 0.5, "segmentation": []}]', "as detectors write their results"),
        ('{"videos": [], "annotations": []}', "holds annotations of videos"),
        ('"text"', "holds no annotations but a str"),
        ("", "is not JSON, or cut short"),
        ("PK\x03\x04", "is not JSON, or cut short"),
        ("[" * 100_000, "nested too deeply|is not JSON, or cut short"),
    ],
)
def test_files_that_are_something_else(root: Any, content: str, message: str) -> None:
    (root / "annotations/instances_val2017.json").write_text(content)
    with pytest.raises(DatasetError, match=message):
        open_dataset("coco", root)


def test_images_may_be_links(root: Any, make: Any, tmp_path: Any) -> None:
    make.photo("elsewhere.jpg")
    image = root / "val2017" / "000000000009.jpg"
    image.unlink()
    try:
        image.symlink_to(tmp_path / "elsewhere.jpg")
    except OSError:
        pytest.skip("this system does not let us make symbolic links")
    assert len(open_dataset("coco", root)) == 3
    image.unlink()
    image.symlink_to("000000000004.jpg")
    assert len(open_dataset("coco", root)) == 3
    # The folder itself may be one.
    (root / "val2017").rename(tmp_path / "moved")
    (root / "val2017").symlink_to(tmp_path / "moved")
    assert len(open_dataset("coco", root)) == 3


def test_more_instances_than_fit_into_memory_are_refused_first(root: Any, make: Any, data: Any) -> None:
    data["images"][0].update(width=60_000, height=60_000)
    data["annotations"].append({**data["annotations"][0], "id": 73})
    rewrite(make, data)
    make.photo("coco/val2017/000000000009.jpg", (60_000, 8))
    example = open_dataset("coco", root).examples[2]
    with pytest.raises(DatasetError, match="the sizes differ"):
        example.load()
    with pytest.raises(DatasetError, match=r"has 3 instances of 60000 x 60000 pixels, which no memory holds"):
        example.load.truth.load()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [10**9, 10**9], "counts": "0"},
        {"size": [10**9, 10**9], "counts": [0, 10**18]},
        {"size": [6, 8], "counts": [0, 10**18]},
        {"size": [6, 8], "counts": [10**30]},
        {"size": [6, 8], "counts": "ooooooooooooooooooo1"},
        {"size": [6, 8], "counts": {"a": 1}},
        [[0, 0, 1e300, 0, 1e300, 1e300]],
        [[0, 0] * 3, [float("inf")] * 6],
        [[10**400] * 6],
        [[[[1, 2]]]],
        7,
    ],
)
def test_masks_that_would_take_all_memory(root: Any, make: Any, data: Any, segmentation: Any) -> None:
    data["annotations"][0]["segmentation"] = segmentation
    rewrite(make, data)
    example = open_dataset("coco", root).examples[2]
    tracemalloc.start()
    try:
        with pytest.raises(DatasetError, match=r"annotation 70 of '.*instances_val2017\.json': "):
            example.load()
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_number_with_too_many_digits(root: Any) -> None:
    (root / "annotations/instances_val2017.json").write_text('{"images": [{"id": ' + "9" * 100_000 + "}]}")
    with pytest.raises(DatasetError, match=r"instances_val2017\.json' is not JSON, or cut short \(Exceeds the limit"):
        open_dataset("coco", root)


def test_a_file_cut_short(root: Any, data: Any) -> None:
    text = json.dumps(data)
    (root / "annotations/instances_val2017.json").write_text(text[: len(text) // 2])
    with pytest.raises(DatasetError, match=r"instances_val2017\.json' is not JSON, or cut short .*download it again"):
        open_dataset("coco", root)


def test_errors_say_what_belongs_where(root: Any, make: Any) -> None:
    with pytest.raises(DatasetError, match=r"split 'val' are missing: .*instances_val\.json'; .* train2017, val2017"):
        open_dataset("coco", root, split="val")
    with pytest.raises(DatasetError, match="test images was never published: use val2017"):
        open_dataset("coco", root, split="test2017")
    with pytest.raises(DatasetError, match=r"it looks as if you meant '.*/coco'"):
        open_dataset("coco", root / "val2017")
    with pytest.raises(DatasetError, match=r"none of the images that .*such as '1\.jpg', is in '.*/val2017'"):
        open_dataset("coco", root, split="train2017", images=root / "val2017")
    (root / "val2017").rename(root / "elsewhere")
    make.text("coco/val2017.zip", "")
    with pytest.raises(DatasetError, match=r"belong in '.*/coco/val2017' \(of val2017\.zip\).*unpack val2017\.zip"):
        open_dataset("coco", root)
    (root / "val2017").mkdir()
    with pytest.raises(DatasetError, match=r"'.*/val2017' has no image in it; '.*/val2017' is empty"):
        open_dataset("coco", root)
    for file in (root / "annotations").iterdir():
        file.rename(file.with_name(file.name.replace("instances", "captions")))
    with pytest.raises(DatasetError, match=r"annotations/instances_val2017\.json .*annotations' holds captions_train"):
        open_dataset("coco", root)


def test_splits_of_other_names(make: Any, data: Any) -> None:
    make.json("own/instances_spring.json", data)
    make.photo("own/images/spring/000000000009.jpg")
    dataset = open_dataset("coco", make.root / "own")
    assert (dataset.name, len(dataset)) == ("COCO spring", 1)
    assert len(dataset.without_image) == 3
    make.json("own/instances_autumn.json", data)
    with pytest.raises(DatasetError, match="has the splits autumn, spring; say which"):
        open_dataset("coco", make.root / "own")


def test_a_size_that_no_memory_holds_is_refused_first(root: Any, make: Any, data: Any) -> None:
    data["images"][0].update(width=10**9, height=10**9)
    rewrite(make, data)
    with pytest.raises(DatasetError, match=r"is 1000000000 x 1000000000 pixels, and the image .* is 8 x 6"):
        open_dataset("coco", root).examples[2].load()
