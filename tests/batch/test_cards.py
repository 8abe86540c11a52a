"""What the report shows of each image, in whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sparsespec
from sparsespec.batch import Formats, Inputs, OutputsError, find_inputs, run_batch
from sparsespec.batch import run as run_module
from sparsespec.batch.job import Item, Job
from sparsespec.batch.one import EIGENVECTORS, process_file
from sparsespec.batch.plan import fewest_digests
from sparsespec.batch.store import LocalStore

Photo = Callable[..., Path]


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def lasting(root: Path) -> dict[str, bytes]:
    """All that does not differ from run to run."""
    return {name: data for name, data in files(root).items() if name not in ("run.json", "report/run.js")}


def index_of(out: Path) -> dict[str, Any]:
    page = (out / "report.html").read_text(encoding="utf-8")
    index: dict[str, Any] = json.loads(page.partition('id="index">')[2].partition("</script>")[0])
    return index


def told(out: Path) -> dict[str, Any]:
    text = (out / "report" / "run.js").read_text(encoding="ascii")
    found: dict[str, Any] = json.loads(text.removeprefix("sparsespec.run(").removesuffix(");\n"))
    return found


def card(out: Path, name: str) -> dict[str, Any]:
    text = (out / "report" / "images" / f"{name}.js").read_text(encoding="ascii")
    found: dict[str, Any]
    _, found = json.loads(f"[{text.removeprefix('sparsespec.card(').removesuffix(');' + chr(10))}]")
    return found


def test_images_called_like_files_of_the_report(tmp_path: Path, segmenter: Any, photo: Photo) -> None:
    names = ["run.jpg", "images/run.jpg", "images.jpg", "report/run.png", "run.js/x.png", "a.js/y.png", "a.png"]
    for name in names:
        photo(tmp_path / "in" / name)
    out = tmp_path / "out"
    result = run_batch(segmenter, find_inputs(tmp_path / "in"), out)
    assert [row.error for row in result.rows] == [None] * len(names)
    index = index_of(out)
    cards = [row[index["columns"].index("name")] for row in index["rows"]]
    assert len({name.lower() for name in cards}) == len(names)
    for name in cards:
        assert card(out, name)["size"] == [60, 40]
        assert (out / "report" / "images" / f"{name}.jpg").is_file()
    assert told(out)["seconds"][0][-1] > 0


def test_times_and_the_way_to_the_photographs(tmp_path: Path, segmenter: Any, photo: Photo) -> None:
    photo(tmp_path / "in 1" / "a.jpg")
    (tmp_path / "in 1" / "b.jpg").write_bytes(b"")
    out = tmp_path / "in 1" / "out"
    inputs = find_inputs(tmp_path / "in 1", output=out)
    result = run_batch(segmenter, inputs, out)
    found = told(out)
    assert found["photographs"] == "../"
    assert found["stages"] == ["read", "features", "instances", "write"]
    for row, seconds in zip(result.rows, found["seconds"], strict=True):
        expected = [row.seconds.get(stage, 0) for stage in (*found["stages"], "total")]
        assert seconds == pytest.approx(expected, abs=5.1e-5)
    assert found["finished"] == json.loads((out / "run.json").read_text())["finished"]
    # Where there is no folder, there is no way.
    store = SimpleNamespace(folder=None)
    job: Any = SimpleNamespace(source=LocalStore(tmp_path), target=store)
    assert run_module._photographs(job) is None
    job = SimpleNamespace(source=store, target=LocalStore(tmp_path))
    assert run_module._photographs(job) is None


def test_no_inputs(tmp_path: Path, segmenter: Any) -> None:
    run_batch(segmenter, Inputs(tmp_path / "in", ()), tmp_path / "out")
    assert index_of(tmp_path / "out")["rows"] == told(tmp_path / "out")["seconds"] == []


def test_of_many_images_some_have_cards(
    tmp_path: Path, segmenter: Any, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more image, and another is left out: the end is that of a new run."""
    monkeypatch.setattr(run_module, "REPORT_CARDS", 4)
    source, out = tmp_path / "in", tmp_path / "out"
    photo(source / "a.jpg")
    chosen, replaced = {"a.jpg"}, set()
    for k in range(9):
        photo(source / f"{k}.jpg", 50 + k)
        run_batch(segmenter, find_inputs(source), out)
        images = find_inputs(source).images
        before, chosen = chosen, set(fewest_digests(images, 4) or images)
        replaced |= before - chosen
        names = sorted(path.removesuffix(".jpg") for path in chosen)
        assert sorted(path.stem for path in (out / "report" / "images").glob("*.js")) == names
        assert sorted(path.stem for path in (out / "report" / "images").glob("*.jpg")) == names
    assert replaced
    index = index_of(out)
    assert (index["done"], index["shown"], index["images"]) == ([4, 10], 4, 10)
    assert sum(images for _, images in index["histograms"]["counts"]) == 10
    assert {row[0] for row in index["rows"]} == chosen
    assert len(told(out)["seconds"]) == 4
    run_batch(segmenter, find_inputs(source), tmp_path / "new")
    assert lasting(out) == lasting(tmp_path / "new")


def test_an_image_that_goes_takes_its_card_along(tmp_path: Path, segmenter: Any, photo: Photo) -> None:
    for name in ("a", "b/c"):
        photo(tmp_path / "in" / f"{name}.jpg")
    out = tmp_path / "out"
    run_batch(segmenter, find_inputs(tmp_path / "in"), out)
    (tmp_path / "in" / "b" / "c.jpg").unlink()
    run_batch(segmenter, find_inputs(tmp_path / "in"), out, prune=True)
    assert {name for name in files(out) if name.startswith("report/images/")} == {
        "report/images/a.jpg", "report/images/a.js",
    }  # fmt: skip
    assert not (out / "report" / "images" / "b").exists()
    (tmp_path / "in" / "a.jpg").write_bytes(b"no longer an image")
    run_batch(segmenter, find_inputs(tmp_path / "in"), out)
    assert not files(out / "report" / "images")


@pytest.mark.parametrize("ending", ["jpg", "js"])
@pytest.mark.parametrize("left", [b"", b"cut short"])
def test_a_card_that_is_lost_is_made_again(
    tmp_path: Path, segmenter: Any, photo: Photo, ending: str, left: bytes
) -> None:
    photo(tmp_path / "in" / "a.jpg")
    photo(tmp_path / "in" / "b.jpg")
    out = tmp_path / "out"
    run_batch(segmenter, find_inputs(tmp_path / "in"), out)
    before = lasting(out)
    place = out / "report" / "images" / f"a.{ending}"
    place.write_bytes(left) if left else place.unlink()
    assert run_batch(segmenter, find_inputs(tmp_path / "in"), out).earlier == 1
    assert lasting(out) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_report_folder_that_is_a_link_is_refused(
    tmp_path: Path, segmenter: Any, photo: Photo, overwrite: bool
) -> None:
    photo(tmp_path / "in" / "a.jpg")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "run.js").write_text("precious")
    (tmp_path / "out").mkdir()
    try:
        (tmp_path / "out" / "report").symlink_to(elsewhere, target_is_directory=True)
    except OSError:
        pytest.skip("this system does not let us make symbolic links")
    with pytest.raises(OutputsError, match="report' is a link: remove it, or choose another output"):
        run_batch(segmenter, find_inputs(tmp_path / "in"), tmp_path / "out", overwrite=overwrite)
    assert files(elsewhere) == {"run.js": b"precious"}
    (tmp_path / "out" / "report").unlink()
    (tmp_path / "out" / "report").write_text("precious")
    with pytest.raises(OutputsError, match="report' is a file: remove it, or choose another output"):
        run_batch(segmenter, find_inputs(tmp_path / "in"), tmp_path / "out", overwrite=overwrite)


def test_large_photographs_have_masks_of_a_bounded_size(tmp_path: Path, segmenter: Any, photo: Photo) -> None:
    photo(tmp_path / "in" / "a.png", 1400, 700)
    shown = []
    for overlays in (True, False):
        out = tmp_path / f"out {overlays}"
        run_batch(segmenter, find_inputs(tmp_path / "in"), out, formats=Formats(overlays=overlays))
        shown.append(card(out, "a"))
        with Image.open(out / "report" / "images" / "a.jpg") as small:
            assert small.size == (384, 192)
        assert len((out / "report" / "images" / "a.js").read_bytes()) < 3000
    assert shown[0] == shown[1]
    assert shown[0]["maskSize"] == [320, 640]
    assert [entry["box"] for entry in shown[0]["instances"]] == [[175, 175, 175, 175], [875, 175, 350, 175]]


class Others:
    """A segmenter of somebody else, which knows nothing of what ours can be asked for."""

    def __init__(self, **more: Any) -> None:
        self.more = more

    def __call__(self, image: Any, /, *, out: Any = None) -> Any:
        labels = np.zeros(image.shape[:2], int)
        info = self.more.get("info", {})
        return SimpleNamespace(**{"labels": labels, "scores": np.zeros(0), **self.more, "info": info})


@pytest.mark.parametrize(
    ("more", "layers"),
    [
        ({}, []),
        ({"layers": None}, []),
        ({"layers": "none"}, []),
        ({"layers": {"heat": [[0.0, 1.0]], "odd": "x"}, "info": {"extent": "all of it"}}, ["heat"]),
        ({"layers": {"heat": [[0.0, 1.0]]}}, ["heat"]),
    ],
)
def test_segmenters_of_others(tmp_path: Path, photo: Photo, more: dict[str, Any], layers: list[str]) -> None:
    photo(tmp_path / "in" / "a.jpg")
    result = run_batch(Others(**more), find_inputs(tmp_path / "in"), tmp_path / "out")
    assert result.rows[0].error is None
    found = card(tmp_path / "out", "a")
    assert [layer["name"] for layer in found["layers"]] == layers
    assert found["instances"] == []


class Watched(sparsespec.Segmenter):
    """Ours, whose network is left out."""

    asked: list[dict[str, Any]]

    def __call__(self, image: Any, **options: Any) -> Any:
        self.asked.append(options)
        layers = {"foreground": np.eye(3)} | {
            f"eigenvector {k}": np.eye(3) for k in range(options.get("eigenvectors", 0))
        }
        labels = np.zeros(image.shape[:2], int)
        return sparsespec.Segmentation(labels, np.zeros(0), np.zeros((0, 4)), {"extent": [3, 2.5]}, layers)


def test_eigenvectors_are_computed_where_they_are_shown(tmp_path: Path, photo: Photo) -> None:
    photo(tmp_path / "in" / "a.jpg")
    (tmp_path / "out").mkdir()
    segmenter = Watched()
    segmenter.asked = []
    job = Job(segmenter, LocalStore(tmp_path / "in"), LocalStore(tmp_path / "out"))
    (without,) = process_file(job, Item("a.jpg", "without", card=False))
    (outcome,) = process_file(job, Item("a.jpg", "with"))
    assert segmenter.asked == [{}, {"eigenvectors": EIGENVECTORS}]
    assert (without.card, outcome.card) == (None, "with")
    assert not [path for path in without.files if path.startswith("report/")]
    assert {path for path in outcome.files if path.startswith("report/")} == {
        "report/images/with.jpg", "report/images/with.js",
    }  # fmt: skip
    layers = card(tmp_path / "out", "with")["layers"]
    assert len(layers) == 1 + EIGENVECTORS
    assert layers[0]["extent"] == [3, 2.5]


@pytest.mark.slow
def test_layers_of_the_network(tmp_path: Path) -> None:
    from skimage import data

    (tmp_path / "in").mkdir()
    Image.fromarray(data.coffee()).resize((150, 100)).save(tmp_path / "in" / "a.png")
    segmenter = sparsespec.Segmenter(long_side=224)
    (row,) = run_batch(segmenter, find_inputs(tmp_path / "in"), tmp_path / "out").rows
    assert row.seconds["eigenvectors"] > 0
    layers = card(tmp_path / "out", "a")["layers"]
    assert [layer["name"] for layer in layers] == ["foreground", *(f"eigenvector {k}" for k in range(1, 5))]
    assert all(layer["grid"] == row.details["grid"] for layer in layers)
    for layer in layers[1:]:
        assert layer["range"][1] == 1
