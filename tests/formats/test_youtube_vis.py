from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from sparsespec.formats import decode_rle, instance_annotations
from sparsespec.formats.youtube_vis import YouTubeVisWriter, video_ids, videos_path


def frame(*lefts: int, scores: list[float]) -> list[dict]:
    labels = np.zeros((12, 30), int)
    for label, left in enumerate(lefts, start=1):
        labels[2:10, left : left + 6] = label
    return instance_annotations(labels, scores)


def write(path: Path, ids: dict[str, int] | None = None) -> None:
    writer = YouTubeVisWriter(path, ids=ids)
    assert writer.add("one", "0.jpg", 30, 12, frame(2, 20, scores=[0.5, 0.9])) == [1, 2]
    assert writer.add("one", "1.jpg", 0, 0, []) == []
    assert writer.add("one", "2.jpg", 30, 12, frame(4, scores=[0.7])) == [1]
    assert writer.add("empty", "0.jpg", 30, 12, []) == []
    assert writer.add("a/two", "0.jpg", 30, 12, frame(2, scores=[0.1])) == [1]
    writer.close()


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "vis.json"
    write(path)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["vis.json", "vis.videos.json"]
    entries = json.loads(path.read_bytes())
    assert [(e["video_id"], e["category_id"], e["score"]) for e in entries] == [(1, 1, 0.6), (1, 1, 0.9), (3, 1, 0.1)]
    masks = [[mask and decode_rle(mask) for mask in entry["segmentations"]] for entry in entries]
    assert [[mask is not None for mask in track] for track in masks] == [[1, 0, 1], [1, 0, 0], [1]]
    for track, place, left in ((0, 0, 2), (0, 2, 4), (1, 0, 20), (2, 0, 2)):
        expected = np.zeros((12, 30))
        expected[2:10, left : left + 6] = 1
        np.testing.assert_array_equal(masks[track][place], expected)
    videos = json.loads(videos_path(path).read_bytes())
    assert videos["categories"] == [{"id": 1, "name": "object", "supercategory": "object"}]
    size = {"width": 30, "height": 12}
    assert videos["videos"] == [
        {"id": 1, "name": "one", "file_names": ["one/0.jpg", "one/1.jpg", "one/2.jpg"], "length": 3, **size},
        {"id": 2, "name": "empty", "file_names": ["empty/0.jpg"], "length": 1, **size},
        {"id": 3, "name": "a/two", "file_names": ["a/two/0.jpg"], "length": 1, **size},
    ]
    # The list can be read as that of a data set.
    assert video_ids(videos_path(path)) == {"one": 1, "empty": 2, "a/two": 3}


def test_same_bytes_again(tmp_path: Path) -> None:
    write(tmp_path / "a.json")
    write(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert videos_path(tmp_path / "a.json").read_bytes() == videos_path(tmp_path / "b.json").read_bytes()


def test_numbers_of_a_data_set(tmp_path: Path) -> None:
    write(tmp_path / "x.json", {"two": 70, "one": 7, "other": 9})
    videos = json.loads(videos_path(tmp_path / "x.json").read_bytes())["videos"]
    assert [video["id"] for video in videos] == [7, 71, 70]
    assert [e["video_id"] for e in json.loads((tmp_path / "x.json").read_bytes())] == [7, 7, 70]


def test_two_folders_of_the_same_name_get_different_numbers(tmp_path: Path) -> None:
    writer = YouTubeVisWriter(tmp_path / "x.json", ids={"clip": 5})
    for name in ("a/clip", "b/clip", "clip"):
        writer.add(name, "0.jpg", 30, 12, [])
    writer.close()
    videos = json.loads(videos_path(tmp_path / "x.json").read_bytes())["videos"]
    assert [video["id"] for video in videos] == [5, 6, 7]


def test_no_videos(tmp_path: Path) -> None:
    YouTubeVisWriter(tmp_path / "x.json").close()
    assert json.loads((tmp_path / "x.json").read_bytes()) == []
    assert json.loads(videos_path(tmp_path / "x.json").read_bytes())["videos"] == []


def test_a_video_that_comes_back(tmp_path: Path) -> None:
    writer = YouTubeVisWriter(tmp_path / "x.json")
    writer.add("a", "0", 1, 1, [])
    writer.add("b", "0", 1, 1, [])
    with pytest.raises(ValueError, match="'a' do not follow one another"):
        writer.add("a", "1", 1, 1, [])
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_names_of_every_kind(tmp_path: Path) -> None:
    writer = YouTubeVisWriter(tmp_path / "x.json")
    names = ['q"uo\\te', "new\nline", "日本", "x\udcff"]
    for name in names:
        writer.add(name, "0.jpg", 1, 1, [])
    writer.close()
    assert [video["name"] for video in json.loads(videos_path(tmp_path / "x.json").read_bytes())["videos"]] == names


def test_discarded(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("as it was")
    writer = YouTubeVisWriter(tmp_path / "x.json")
    writer.add("a", "0", 30, 12, frame(2, scores=[1.0]))
    writer.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert (tmp_path / "x.json").read_text() == "as it was"


def listed(*names: str, number: object = 1) -> dict:
    return {"id": number, "file_names": list(names)}


def test_list_of_a_data_set(tmp_path: Path) -> None:
    path = tmp_path / "valid.json"
    videos = [listed("b/0.jpg", "b/1.jpg", number=4), listed("a/x/0.jpg", number=0)]
    path.write_text(json.dumps({"info": {}, "videos": videos, "annotations": None}))
    assert video_ids(path) == {"b": 4, "a/x": 0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe\xfd", "is not JSON"),
        (b'{"videos": [', "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b'{"videos": [{"id": ' + b"9" * 5000 + b"}]}", "is not JSON"),
        (b"[]", "no list of videos"),
        (b'{"videos": {}}', "no list of videos"),
        (b'{"videos": []}', "no list of videos"),
        (b'{"videos": [1]}', "video 0 of the list: it is no object"),
        ({"videos": [{"id": 1}]}, "no file_names"),
        ({"videos": [listed()]}, "no file_names"),
        ({"videos": [{"id": 1, "file_names": [1]}]}, "no file_names"),
        ({"videos": [listed("a/0", number="1")]}, "its id is no whole number"),
        ({"videos": [listed("a/0", number=True)]}, "its id is no whole number"),
        ({"videos": [listed("a/0", number=-1)]}, "its id is no whole number"),
        ({"videos": [listed("a/0", number=2**53)]}, "its id is no whole number"),
        ({"videos": [listed("a/0"), listed("b/0")]}, "video 1 of the list: .* another"),
        ({"videos": [listed("a/0"), listed("a/1", number=2)]}, "video 1 of the list: .* another"),
        ({"videos": [listed("a/0", "b/0")]}, "several folders, 'a' and 'b'"),
        *(
            ({"videos": [listed(name)]}, "not given as folder/file")
            for name in ("/etc/passwd", "../a/0", "a/../../0", "0.jpg", "a\\b/0", "C:/a/0", "a\0/0", "a\n/0", "")
        ),
    ],
)
def test_lists_that_are_refused(tmp_path: Path, content: bytes | dict, message: str) -> None:
    path = tmp_path / "valid.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError, match=message) as refused:
        video_ids(path)
    assert "valid.json" in str(refused.value)


def test_lists_that_are_no_files(tmp_path: Path) -> None:
    path = tmp_path / "valid.json"
    path.write_text(json.dumps({"videos": [listed("a/0")]}))
    with pytest.raises(ValueError, match="more than 20 bytes"):
        video_ids(path, max_bytes=20)
    with pytest.raises(OSError, match="nosuch"):
        video_ids(tmp_path / "nosuch")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="no regular file"):
            video_ids(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"irectory|denied"):
        video_ids(tmp_path)
