from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsespec.evaluation.datasets import DatasetError, open_dataset
from sparsespec.formats import encode_rle

LEFT = np.zeros((6, 8), bool)
LEFT[:, :3] = True
RIGHT = np.zeros((6, 8), bool)
RIGHT[2:5, 5:] = True
TRIANGLE = [0.0, 0.0, 6.0, 0.0, 0.0, 6.0]


def videos(prefix: str, frame: str) -> list[dict[str, Any]]:
    names = [[f"{video}/{frame.format(k)}" for k in range(1, 1 + length)] for video, length in (("aa", 3), ("bb", 1))]
    return [
        {"id": 1, "width": 8, "height": 6, "length": 3, "file_names": [prefix + name for name in names[0]]},
        {"id": 2, "width": 8, "height": 6, "length": 1, "file_names": [prefix + name for name in names[1]]},
    ]


@pytest.fixture
def data(runs: Any) -> dict[str, Any]:
    """YouTube-VIS 2019: runs as lists, null where the instance isn't in the frame."""
    return {
        "info": {},
        "videos": videos("", "{:05d}.jpg"),
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [
            {
                "id": 30,
                "video_id": 1,
                "category_id": 1,
                "iscrowd": 0,
                "segmentations": [runs(LEFT), None, runs(np.zeros((6, 8), bool))],
                "bboxes": [[0, 0, 3, 6], None, None],
                "areas": [18, None, None],
            },
            {"id": 31, "video_id": 1, "iscrowd": 0, "segmentations": [runs(RIGHT), encode_rle(RIGHT), [TRIANGLE]]},
            {"id": 32, "video_id": 2, "iscrowd": 1, "segmentations": [runs(LEFT)]},
        ],
    }


@pytest.fixture
def root(make: Any, data: Any) -> Any:
    make.json("ytvis/train.json", data)
    make.json("ytvis/valid.json", {"info": {}, "videos": videos("", "{:05d}.jpg"), "categories": []})
    for name in ("aa/00001", "aa/00002", "aa/00003", "bb/00001", "bb/00005"):
        make.photo(f"ytvis/train/JPEGImages/{name}.jpg")
    make.photo("ytvis/valid/JPEGImages/aa/00001.jpg")
    return make.root / "ytvis"


def rewrite(make: Any, data: Any) -> None:
    make.json("ytvis/train.json", data)


def test_every_frame_is_an_image(root: Any) -> None:
    dataset = open_dataset("youtube-vis", root)
    assert dataset.name == "YouTube-VIS train"
    assert [example.name for example in dataset] == ["aa/00001", "aa/00002", "aa/00003", "bb/00001"]
    assert (dataset.without_truth, dataset.without_image) == (("bb/00005",), ())
    both, one, cut, crowd = (example.load() for example in dataset)
    np.testing.assert_array_equal(both.masks, [LEFT, RIGHT])
    np.testing.assert_array_equal(one.masks, [RIGHT])
    # The instance of the empty runs isn't in the frame.
    assert cut.masks.shape == (1, 6, 8)
    assert cut.masks[0, 0, :4].all()
    assert not cut.masks[0, 5, 5]
    np.testing.assert_array_equal(crowd.masks, [LEFT])
    assert crowd.crowd.tolist() == [True]


def test_a_frame_without_any_instance_is_a_truth(root: Any, make: Any, data: Any) -> None:
    data["annotations"][1]["segmentations"][1] = None
    rewrite(make, data)
    truth = open_dataset("youtube-vis", root).examples[1].load()
    assert (len(truth), truth.masks.shape) == (0, (0, 6, 8))


@pytest.mark.parametrize("place", ["annotations/train.json", "train/instances.json", "instances_train_sub.json"])
def test_other_places_of_the_annotations(root: Any, place: str) -> None:
    (root / place).parent.mkdir(exist_ok=True)
    (root / "train.json").rename(root / place)
    assert len(open_dataset("youtube-vis", root)) == 4


def test_ovis(make: Any) -> None:
    rle = encode_rle(LEFT)
    tracks = [
        {
            "id": 1,
            "video_id": 1,
            "category_id": 3,
            "iscrowd": 0,
            "segmentations": [rle, None, encode_rle(RIGHT)],
            "bboxes": [[0, 0, 3, 6], None, [5, 2, 3, 3]],
            "occlusion": ["no_occlusion", None, "severe_occlusion"],
        }
    ]
    make.json("ovis/annotations_train.json", {"videos": videos("", "img_{:07d}.jpg"), "annotations": tracks})
    make.json("ovis/annotations_valid.json", {"videos": videos("", "img_{:07d}.jpg"), "annotations": None})
    for name in ("aa/img_0000001", "aa/img_0000002", "aa/img_0000003", "bb/img_0000001"):
        make.photo(f"ovis/train/{name}.jpg")
    dataset = open_dataset("ovis", make.root / "ovis")
    assert dataset.name == "OVIS train"
    assert [example.name for example in dataset][::3] == ["aa/img_0000001", "bb/img_0000001"]
    assert [len(example.load()) for example in dataset] == [1, 0, 1, 0]
    np.testing.assert_array_equal(dataset.examples[2].load().masks, [RIGHT])
    with pytest.raises(DatasetError, match="test videos of OVIS was never published; use the split train"):
        open_dataset("ovis", make.root / "ovis", split="valid")


def test_splits_whose_truth_was_never_published(root: Any) -> None:
    with pytest.raises(DatasetError, match=r"valid\.json' lists videos and says nothing.*use the split train"):
        open_dataset("youtube-vis", root, split="valid")


def test_frames_that_are_missing(root: Any) -> None:
    frames = root / "train/JPEGImages"
    (frames / "aa/00002.jpg").unlink()
    dataset = open_dataset("youtube-vis", root)
    assert [example.name for example in dataset] == ["aa/00001", "aa/00003", "bb/00001"]
    assert dataset.without_image == ("aa/00002",)
    for path in (*frames.glob("aa/*"), *frames.glob("bb/00001*")):
        path.unlink()
    with pytest.raises(
        DatasetError, match=r"none of the images that .*train\.json' describes, such as 'aa/00001\.jpg'"
    ):
        open_dataset("youtube-vis", root)
    (frames / "bb/00005.jpg").unlink()
    with pytest.raises(DatasetError, match=r"JPEGImages' has no image in it"):
        open_dataset("youtube-vis", root)


def test_a_file_of_annotations_with_its_frames(root: Any) -> None:
    dataset = open_dataset("youtube-vis", root / "train.json", images=root / "train/JPEGImages")
    assert (dataset.name, len(dataset)) == ("YouTube-VIS train", 4)
    with pytest.raises(DatasetError, match="give the folder of its frames too"):
        open_dataset("youtube-vis", root / "train.json")
    with pytest.raises(DatasetError, match="leave out the split 'train'"):
        open_dataset("youtube-vis", root / "train.json", images=root / "train/JPEGImages", split="train")


def test_a_mask_that_does_not_decode_or_is_of_another_size(root: Any, make: Any, data: Any) -> None:
    data["annotations"][1]["segmentations"][1] = {"size": [6, 8], "counts": [5]}
    data["annotations"][2]["segmentations"][0] = {"size": [12, 16], "counts": [192]}
    rewrite(make, data)
    dataset = open_dataset("youtube-vis", root)
    with pytest.raises(DatasetError, match=r"annotation 31 of '.*train\.json', frame 1: counts cover 5 pixels"):
        dataset.examples[1].load()
    with pytest.raises(DatasetError, match=r"annotation 32 .* the mask is 16 x 12 pixels, and the image .* 8 x 6"):
        dataset.examples[3].load()
    assert len(dataset.examples[0].load()) == 2


def test_frames_of_another_size(root: Any, make: Any) -> None:
    make.photo("ytvis/train/JPEGImages/aa/00002.jpg", (16, 12))
    with pytest.raises(DatasetError, match=r"frame 1 of video 1 .* is 8 x 6 pixels, and the image '.*' is 16 x 12"):
        open_dataset("youtube-vis", root).examples[1].load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["videos"][0]["file_names"].pop(), "video 1 of .* has the length 3 and names 2 frames"),
        (lambda d: d["videos"][0].update(file_names=[]), "video 1 of .* has no list of file_names"),
        (lambda d: d["videos"][0]["file_names"].__setitem__(1, "../x.jpg"), r"video 1 .*'\.\./x\.jpg'.*refused"),
        (lambda d: d["videos"][1].update(file_names=["aa/00001.jpg"]), "lists the frame 'aa/00001.jpg' twice"),
        (lambda d: d["videos"][1].update(id=1), "two entries of 'videos' with the id 1"),
        (lambda d: d["videos"][1].update(width="8"), "video 2 of .* has width '8'"),
        (lambda d: d["annotations"][1].update(id=30), "two entries of 'annotations' with the id 30"),
        (lambda d: d["annotations"][1].update(video_id=7), "annotation 31 of .* belongs to video_id 7"),
        (
            lambda d: d["annotations"][1]["segmentations"].pop(),
            "annotation 31 .* has 2 segmentations, and video 1 .* 3",
        ),
        (lambda d: d["annotations"][1].pop("segmentations"), "annotation 31 .* has no list of segmentations"),
    ],
)
def test_entries_that_contradict_each_other(root: Any, make: Any, data: Any, change: Any, message: str) -> None:
    change(data)
    rewrite(make, data)
    with pytest.raises(DatasetError, match=message):
        open_dataset("youtube-vis", root)


@pytest.mark.parametrize("name", ["../a.jpg", "/a.jpg", "aa\\..\\..\\b.jpg", "C:a.jpg", "a\x00.jpg", "", None, 7, []])
def test_names_that_leave_the_folder(root: Any, make: Any, data: Any, name: Any) -> None:
    data["videos"][0]["file_names"][1] = name
    rewrite(make, data)
    with pytest.raises(DatasetError, match=r"video 1 of '.*train\.json' names (the file .* refused|no file, but)"):
        open_dataset("youtube-vis", root)


def test_frames_may_be_links(root: Any, make: Any, tmp_path: Any) -> None:
    make.photo("elsewhere.jpg")
    image = root / "train" / "JPEGImages" / "bb" / "00001.jpg"
    image.unlink()
    try:
        image.symlink_to(tmp_path / "elsewhere.jpg")
    except OSError:
        pytest.skip("this system does not let us make symbolic links")
    assert len(open_dataset("youtube-vis", root)) > 0


def test_json_of_another_kind(root: Any, make: Any) -> None:
    rewrite(make, {"images": [], "annotations": []})
    with pytest.raises(DatasetError, match="annotations of single images, and no videos: its kind is coco"):
        open_dataset("youtube-vis", root)
    rewrite(make, [{"video_id": 1, "score": 0.5, "category_id": 1, "segmentations": [None]}])
    with pytest.raises(DatasetError, match="as detectors write their results"):
        open_dataset("youtube-vis", root)
    rewrite(make, {"results": []})
    with pytest.raises(DatasetError, match="no list of objects 'videos'; it has 'results'"):
        open_dataset("youtube-vis", root)


def test_errors_say_what_belongs_where(root: Any, make: Any) -> None:
    with pytest.raises(DatasetError, match=r"it looks as if you meant '.*/ytvis'"):
        open_dataset("youtube-vis", root / "train" / "JPEGImages")
    with pytest.raises(DatasetError, match=r"the annotations test\.json and the frames in test/JPEGImages/; .*valid/"):
        open_dataset("youtube-vis", root, split="test")
    (root / "train").rename(root / "elsewhere")
    make.text("ytvis/train.tar.gz", "")
    with pytest.raises(
        DatasetError, match=r"belong in '.*/train/JPEGImages' \(of train\.zip\); .*unpack train\.tar\.gz"
    ):
        open_dataset("youtube-vis", root)
