from __future__ import annotations

import random
import re
import unicodedata

import pytest

from sparsespec.batch import output_names
from sparsespec.batch.names import page_name, result_name, why_not_relative
from sparsespec.batch.outputs import mask_file, overlay_file, yolo_file
from sparsespec.formats.cutouts import cutout_path


def names(*images: str) -> dict[str, str]:
    return dict(zip(images, output_names(images), strict=True))


def test_plain_names_lose_their_ending() -> None:
    assert names("x.jpg", "a/x.jpg", "a/b.c.png") == {"x.jpg": "x", "a/x.jpg": "a/x", "a/b.c.png": "a/b.c"}


def test_equal_stems_keep_their_endings() -> None:
    assert names("a/x.jpg", "a/x.png", "b/x.jpg") == {"a/x.jpg": "a/x.jpg", "a/x.png": "a/x.png", "b/x.jpg": "b/x"}


def test_a_third_file_with_the_name_of_an_output() -> None:
    assert names("x.jpg", "x.jpg.png", "x.png") == {"x.jpg": "x.jpg", "x.jpg.png": "x.jpg.png", "x.png": "x.png"}
    assert names("x.jpg.png", "x.jpg.tif") == {"x.jpg.png": "x.jpg.png", "x.jpg.tif": "x.jpg.tif"}


def test_disks_that_ignore_case_and_composition() -> None:
    assert names("X.jpg", "x.png") == {"X.jpg": "X.jpg", "x.png": "x.png"}
    assert names("X.JPG", "x.jpg") == {"X.JPG": "X.JPG", "x.jpg": "x.jpg.2"}
    assert names("A/x.jpg", "a/x.jpg") == {"A/x.jpg": "A/x.jpg", "a/x.jpg": "a/x.jpg.2"}
    assert names("\u00fc.jpg", "u\u0308.png") == {"\u00fc.jpg": "\u00fc.jpg", "u\u0308.png": "u\u0308.png"}


def test_a_folder_with_the_name_of_an_output() -> None:
    assert names("x.jpg", "x.png/y.jpg") == {"x.jpg": "x.jpg", "x.png/y.jpg": "x.png/y"}
    assert names("x.tif", "x.jpg/y.jpg") == {"x.tif": "x.tif", "x.jpg/y.jpg": "x.jpg/y"}


def test_names_are_made_when_asked_for() -> None:
    found = output_names(["a/x.jpg", "a/x.png", "b.jpg"])
    assert len(found) == 3
    assert found[-1] == "b"
    assert found[:2] == ["a/x.jpg", "a/x.png"]
    with pytest.raises(IndexError):
        found[3]
    assert list(output_names([])) == []


@pytest.mark.parametrize(
    "stem",
    [
        "IMG_0001", "my photo (1)", "Tom & Jerry's", "a#1", "100%", "my%20photo", "m%C3%BCnchen", "a+b=c", "größe",
        "日本の写真", "عکس\u200cها", "👩\u200d🔬", "x~1", "$price;a,b", "[2024] {x}", "console", "nulla", "com10",
        "-rf", "e\u0301", "a.b..c", " leading", "=1+1",
    ],
)  # fmt: skip
def test_ordinary_names_stay_as_they_are(stem: str) -> None:
    assert names(f"{stem}/{stem}.jpg") == {f"{stem}/{stem}.jpg": f"{stem}/{stem}"}


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("a\nb.jpg", "a%0Ab"),
        ("\x1b[31mred.jpg", "%1B[31mred"),
        ("a\x00.jpg", "a%00"),
        ("a\x85b.jpg", "a%C2%85b"),
        ("gpj.\u202egpj.exe.jpg", "gpj.%E2%80%AEgpj.exe"),
        ("caf\udce9.png", "caf%E9"),
        ("\ud800.png", "%ED%A0%80"),
        ('<img src=x onerror="alert(1)">.jpg', "%3Cimg src=x onerror=%22alert(1)%22%3E"),
        ("javascript:alert(1).jpg", "javascript%3Aalert(1)"),
        ("C:\\Windows\\x.jpg", "C%3A%5CWindows%5Cx"),
        ("..\\..\\x.jpg", "..%5C..%5Cx"),
        ("what?|*.jpg", "what%3F%7C%2A"),
        ("end. .jpg", "end%2E%20"),
        ("folder./x.jpg", "folder%2E/x"),
        ("folder /x.jpg", "folder%20/x"),
        ("con.jpg", "%63on"),
        ("AUX/lpt1.old.tif", "%41UX/%6Cpt1.old"),
        ("nul .a.jpg", "%6Eul .a"),
        ("com¹.jpg", "%63om¹"),
        (".png", ".png"),
        ("...png", "...png"),
    ],
)
def test_what_some_disk_or_program_could_not_take_is_written_in_digits(image: str, name: str) -> None:
    assert names(image) == {image: name}


def test_names_that_are_equal_when_cleaned_stay_apart() -> None:
    assert names("a<.jpg", "a%3C.jpg", "a%3c.png") == {
        "a<.jpg": "a%3C.jpg", "a%3C.jpg": "a%3C.jpg.2", "a%3c.png": "a%3c.png",
    }  # fmt: skip
    assert names("a:/x.jpg", "a%3A/x.jpg") == {"a:/x.jpg": "a%3A/x.jpg", "a%3A/x.jpg": "a%3A/x.jpg.2"}


@pytest.mark.parametrize("stem", ["x" * 251, "x" * 248 + "ü", "日" * 83, "\n" * 83])
def test_names_that_fit_are_not_cut(stem: str) -> None:
    assert len(output_names([stem + ".jpg"])[0].encode()) in (249, 250, 251)
    assert "~" not in output_names([stem + ".jpg"])[0]


def test_names_too_long_for_a_disk_are_cut_and_stay_apart() -> None:
    images = ["日" * 90 + ending for ending in (".jpg", ".png", "a.jpg")] + [
        "\x01" * 250 + ".jpg",
        "y/" + "<" * 90 + "/a.jpg",
    ]
    images += ["z" * 251 + ".jpg", "Z" * 251 + ".jpg", "z" * 251 + ".png"]
    found = list(output_names(images))
    assert len({name.casefold() for name in found}) == len(images)
    for name in [*found, *(page_name(name, image, 12345) for name, image in zip(found, images, strict=True))]:
        assert all(len(part.encode()) <= 251 for part in name.split("/"))
    assert found == list(output_names(images))
    # The digest is of the name, so that it is the same whatever else is there.
    assert found[2] == output_names([images[2]])[0]


def test_one_more_image_changes_only_names_that_it_meets() -> None:
    images = [f"{folder}/{k}.jpg" for folder in ("a", "b") for k in range(20)]
    before = names(*images)
    for added, changed in [
        ("c/0.jpg", set()),
        ("a/3.png", {"a/3.jpg"}),
        ("A/3.JPG", {"a/3.jpg"}),
        ("a/3.png/x.jpg", {"a/3.jpg"}),
        ("a/3/001.png.jpg", {"a/3.jpg"}),
    ]:
        after = names(added, *images)
        assert {image for image in images if after[image] != before[image]} == changed


@pytest.mark.parametrize(
    "path", ["", "/etc/x.jpg", "../x.jpg", "a/../x.jpg", "a/..", "..", ".", "./x.jpg", "a//x.jpg", "a/"]
)
def test_paths_that_are_not_below_the_input_are_refused(path: str) -> None:
    reason = why_not_relative(path)
    assert reason is not None
    assert "path" in reason
    with pytest.raises(ValueError, match=r"cannot have results: its path (is absolute|has a part)"):
        output_names(["b.jpg", path])


@pytest.mark.parametrize("path", ["x.jpg", "a/..b/x...jpg", ".x/.y", "...", "a/.../b.jpg"])
def test_paths_with_dots_are_fine(path: str) -> None:
    assert why_not_relative(path) is None
    assert ".." not in result_name(path).split("/")


def pages(*images: str) -> dict[str, str]:
    return {image: page_name(name, image, 1) for image, name in names(*images).items()}


def test_pages_are_in_a_folder_with_the_name_of_the_file() -> None:
    assert pages("a/scan.tif") == {"a/scan.tif": "a/scan.tif/page-0001"}
    assert page_name("a/scan", "a/scan.tif", 12345) == "a/scan.tif/page-12345"
    assert pages("scan.tif", "scan.jpg") == {"scan.tif": "scan.tif/page-0001", "scan.jpg": "scan.jpg.pages/page-0001"}
    assert pages("scan") == {"scan": "scan/page-0001"}
    assert pages("a\nb.tif") == {"a\nb.tif": "a%0Ab.tif/page-0001"}
    assert pages("x.TIF", "x.tif") == {"x.TIF": "x.TIF/page-0001", "x.tif": "x.tif.2/page-0001"}
    # The file and a folder that is called the same on some disks.
    assert pages("scan.tif", "SCAN.TIF/page-0001.jpg")["scan.tif"] == "scan.tif.2/page-0001"


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_outputs_never_meet(first: int) -> None:
    for seed in range(first, first + 50):
        check_that_outputs_never_meet(seed)


def check_that_outputs_never_meet(seed: int) -> None:
    rng = random.Random(seed)
    parts = [
        "x", "X", "x.jpg", "x.png", "x.jpg.png", "x.png.jpg", "x.2", "y", "x.tif", "X.TIF", "x.txt", "001.png", "001",
        "x.png.pages", "x<", "x%3C", "page-0001", "x.jpg.2", "con", "%63on", "\u00fc", "u\u0308",
    ]  # fmt: skip
    parts = rng.sample(parts, rng.randrange(2, len(parts)))
    images = {
        "/".join(
            [
                *rng.choices(parts, k=rng.randrange(3)),
                rng.choice(parts) + rng.choice([".jpg", ".png", ".JPG", ".tif", ".Tif"]),
            ]
        )
        for _ in range(rng.randrange(1, 20))
    }
    # A path is a file or a folder, not both.
    ordered = sorted(image for image in images if not any(other.startswith(image + "/") for other in images))
    found = list(output_names(ordered))
    # What a run may write for an image, with or without pages: no two of them may be one file, and no file a folder.
    written = []
    for image, name in zip(ordered, found, strict=True):
        one = [
            [
                *(kind(item) for item in items for kind in (mask_file, overlay_file, yolo_file)),
                *(cutout_path(item, number) for item in items for number in (1, 2)),
            ]
            for items in ([name], [page_name(name, image, 1), page_name(name, image, 2)])
        ]
        written.append(one)
    everything = [file for forms in written for files in forms for file in files]
    keys = [unicodedata.normalize("NFD", unicodedata.normalize("NFD", file).casefold()) for file in everything]
    assert len(set(keys)) == len(keys)
    files = set(keys)
    for key in keys:
        above = key.split("/")
        for k in range(1, len(above)):
            assert "/".join(above[:k]) not in files, key
    assert list(output_names(ordered)) == found
    # The order in which a system lists them decides nothing but numbers.
    backwards = dict(zip(reversed(ordered), output_names(ordered[::-1]), strict=True))
    for image, name in zip(ordered, found, strict=True):
        numberless = [re.sub(r"(\.\d+)+$", "", text) for text in (name, backwards[image])]
        assert numberless[0] == numberless[1]
