"""The scripts of docs/recipes, run as a user runs them, and the page that shows them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sparsespec
from sparsespec.images import read_image
from tests.recipes.update_page import BLOCK

DOCS = Path(__file__).resolve().parents[2] / "docs"
RECIPES = DOCS / "recipes"


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where classes look for the types that they name
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two photographs and a file that is none, in the working folder."""
    folder = tmp_path / "photographs"
    (folder / "sky").mkdir(parents=True)
    for example, name in (("rocket", "sky/rocket"), ("astronaut", "astronaut")):
        with Image.open(DOCS / "examples" / f"{example}.jpg") as image:
            image.reduce(2).save(folder / f"{name}.jpg")
    (folder / "broken.jpg").write_bytes(b"no photograph")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.needs("fastapi", "httpx")
def test_fastapi_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastapi.testclient import TestClient

    from sparsespec.formats import decode_rle

    endpoint = recipe("fastapi_endpoint")
    monkeypatch.setattr(endpoint, "MAX_WAITING", 0)
    monkeypatch.setattr(endpoint, "MAX_BYTES", 300_000)
    photograph = (DOCS / "examples" / "rocket.jpg").read_bytes()
    with TestClient(endpoint.app) as client:
        answer = client.post("/instances", content=photograph)
        assert answer.status_code == 200
        found = answer.json()
        assert (found["width"], found["height"]) == (640, 427)
        assert found["instances"]
        for instance in found["instances"]:
            assert decode_rle(instance["segmentation"]).sum() == instance["area"] > 0
        assert "Instance" in client.get("/openapi.json").json()["components"]["schemas"]

        refused = client.post("/instances", content=photograph[:5000])
        assert refused.status_code == 422
        assert "upload" not in refused.json()["detail"]
        assert client.post("/instances", content=b"").status_code == 422
        # In pieces, without a Content-Length.
        assert client.post("/instances", content=(b"x" * 100_000 for _ in range(4))).status_code == 413
        monkeypatch.setattr(endpoint, "MAX_PIXELS", 1000)
        assert client.post("/instances", content=photograph).status_code == 422

        backbone = client.app_state["segmenter"].backbone
        with ExitStack() as stack:
            for _ in range(backbone.concurrency):
                stack.enter_context(TurnOfAnotherThread(backbone))
            busy = client.post("/instances", content=photograph)
        assert (busy.status_code, busy.headers["Retry-After"]) == (429, "5")


@pytest.mark.needs("fastapi", "httpx")
def test_fastapi_endpoint_does_not_wait_for_slow_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    import httpx

    endpoint = recipe("fastapi_endpoint")
    monkeypatch.setattr(endpoint, "UPLOAD_SECONDS", 0.05)

    async def post() -> httpx.Response:
        never = asyncio.Event()

        async def body() -> AsyncIterator[bytes]:
            yield b"\xff\xd8"
            await never.wait()

        transport = httpx.ASGITransport(app=endpoint.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post("/instances", content=body())

    answer = asyncio.run(post())
    assert (answer.status_code, "0.05 seconds" in answer.json()["detail"]) == (408, True)


@pytest.mark.needs("fastapi")
def test_fastapi_endpoint_when_an_upload_breaks_off() -> None:
    import asyncio

    endpoint = recipe("fastapi_endpoint")
    received = iter(({"type": "http.request", "body": b"abc", "more_body": True}, {"type": "http.disconnect"}))
    sent: list[Any] = []

    async def receive() -> Any:
        return next(received)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/instances", "query_string": b"", "headers": [], "state": {}}
    asyncio.run(endpoint.app(scope, receive, send))
    assert sent[0]["status"] == 400


class TurnOfAnotherThread:
    def __init__(self, backbone: Any) -> None:
        self._backbone = backbone
        self._inside, self._leave = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold)

    def _hold(self) -> None:
        with self._backbone.turn():
            self._inside.set()
            self._leave.wait(60)

    def __enter__(self) -> None:
        self._thread.start()
        assert self._inside.wait(60)

    def __exit__(self, *error: object) -> None:
        self._leave.set()
        self._thread.join()


@pytest.mark.slow
def test_process_pool(photographs: Path) -> None:
    done = subprocess.run(
        [sys.executable, RECIPES / "process_pool.py", photographs, "--workers", "2"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert done.returncode == 0, done.stderr
    answers = {Path(answer["path"]).name: answer for answer in map(json.loads, done.stdout.splitlines())}
    assert sorted(answers) == ["astronaut.jpg", "broken.jpg", "rocket.jpg"]
    assert answers["rocket.jpg"]["instances"]
    assert answers["astronaut.jpg"]["instances"]
    assert answers["broken.jpg"]["error"].startswith("ImageReadError: cannot read image")


def test_scikit_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = recipe("scikit_image")
    coins = read_image(DOCS / "examples" / "coins.jpg")[120:260, 70:260]
    monkeypatch.chdir(tmp_path)
    Image.fromarray(coins).save("coins.png")
    script.main(["coins.png", "--output", "made"])
    rows = (tmp_path / "made" / "objects.csv").read_text().splitlines()
    labels = np.asarray(Image.open(tmp_path / "made" / "labels.tif"))
    assert rows[0].startswith("label,centroid-0,centroid-1,area,")
    assert len(rows) - 1 == len(np.unique(labels)) - 1 > 1
    for row in rows[1:]:
        label, area, score = (dict(zip(rows[0].split(","), row.split(","), strict=True))[k] for k in _COLUMNS)
        assert (labels == int(label)).sum() == float(area) >= 100
        assert 0 < float(score) <= 1
    assert not labels[0].any()
    assert not labels[:, 0].any()
    with Image.open(tmp_path / "made" / "objects.png") as drawn:
        assert drawn.size == (190, 140)
    assert "diameter" in capsys.readouterr().out


_COLUMNS = ("label", "area", "score")


def test_borders_snap_to_edges_and_no_instance_is_lost() -> None:
    script = recipe("scikit_image")
    image = np.zeros((60, 80, 3), np.uint8)
    image[10:40, 10:40] = 200
    image[10:40, 40:70] = 120
    labels = np.zeros((60, 80), np.int32)
    labels[12:42, 12:38] = 1  # two pixels off
    labels[12:38, 38:71] = 2
    labels[50:52, 50:70] = 3  # narrower than what is taken off
    moved = script.snapped(labels, image, 3)
    true = np.zeros_like(labels)
    true[10:40, 10:40], true[10:40, 40:70] = 1, 2
    for label in (1, 2):
        before, after = (((one == label) & (true == label)).sum() / ((one == label) | (true == label)).sum()
                         for one in (labels, moved))  # fmt: skip
        assert after > max(before, 0.9)
    assert np.array_equal(moved == 3, labels == 3)


def test_yolo_pseudo_labels(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = recipe("yolo_pseudo_labels")
    script.main([str(photographs), "--min-score", "0.2", "--validation", "0.5"])
    printed = capsys.readouterr().out
    dataset = tmp_path / "yolo-dataset"
    images = {p.relative_to(dataset / "images").with_suffix("") for p in dataset.glob("images/**/*.jpg")}
    texts = {p.relative_to(dataset / "labels").with_suffix("") for p in dataset.glob("labels/**/*.txt")}
    assert images == texts
    assert {p.parts[0] for p in images} == {"train", "val"}
    assert {p.name for p in images} == {"rocket", "astronaut"}
    assert "2 of 3 photographs" in printed
    assert float(re.findall(r"([\d.]+) at least", printed)[0]) > 0.97
    assert (dataset / "data.yaml").read_text().startswith("train: images/train\nval: images/val\n")
    with pytest.raises(SystemExit):
        script.main([str(photographs)])
    assert "remove it" in capsys.readouterr().err
    if importlib.util.find_spec("ultralytics") is not None:
        lines = sum(len(text.read_text().splitlines()) for text in dataset.glob("labels/**/*.txt"))
        assert ultralytics_reads(tmp_path) == lines

    # What the reader reads is what the labels say, and nothing else is taken for it.
    text = next(dataset.glob("labels/**/rocket.txt"))
    (image,) = dataset.glob("images/**/rocket.jpg")
    text.write_text("0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\n")
    (mask,) = script.read_masks(image, text)
    width, height = 320, 214
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max()) == (int(0.1 * height), int(0.5 * height))
    assert (columns.min(), columns.max()) == (int(0.1 * width), int(0.5 * width))
    for wrong in ("1 0.1 0.1 0.5 0.1 0.5 0.5", "0 0.1 0.1 0.5 0.1", "0 0.1 0.1 1.5 0.1 0.5 0.5"):
        text.write_text(wrong)
        with pytest.raises(ValueError, match="no class 0"):
            script.read_masks(image, text)


_ULTRALYTICS = """
from ultralytics.cfg import get_cfg
from ultralytics.data import build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
data = check_det_dataset("yolo-dataset/data.yaml", autodownload=False)
task = get_cfg(overrides={"task": "segment"})
parts = [build_yolo_dataset(task, data[part], 1, data, mode="val") for part in ("train", "val")]
print(sum(len(label["segments"]) for part in parts for label in part.labels))
"""


def ultralytics_reads(folder: Path) -> int:
    """How many instances it finds in the data set there."""
    done = subprocess.run(
        [sys.executable, "-c", _ULTRALYTICS],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "YOLO_CONFIG_DIR": str(folder), "YOLO_OFFLINE": "true"},
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def test_pseudo_labels_leave_out_what_is_below_the_score(photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipe("yolo_pseudo_labels").main([str(photographs / "sky"), "--min-score", "1.0"])
    assert "give a lower --min-score" in capsys.readouterr().err


@pytest.mark.slow
def test_large_tiff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import tifffile

    monkeypatch.chdir(DOCS.parent)
    with pytest.raises(SystemExit):
        recipe("large_tiff").main([str(tmp_path / "none.tif"), "--output", str(tmp_path)])
    assert "none.tif" in capsys.readouterr().err
    # Just large enough to be read by window, and no multiple of a tile.
    recipe("large_tiff").main(["--side", "4900", "--output", str(tmp_path), "--megapixels", "0.1"])
    with tifffile.TiffFile(tmp_path / "labels.tif") as file:
        assert file.pages[0].is_tiled
        labels = file.asarray()
    assert labels.shape == (4900, 4900)
    assert labels.dtype == np.uint16
    assert labels.max() >= 1
    printed = capsys.readouterr().out
    assert printed.count("0.") >= labels.max()
    assert "72 MB as an array" in printed
    assert read_image(tmp_path / "detail.tif").shape == (512, 512, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["detail.tif", "labels.tif", "overlay.jpg", "scan.tif"]


@pytest.mark.needs("onnx")
def test_own_backbone(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparsespec.directions import Directions

    with pytest.raises(SystemExit):
        recipe("own_backbone").main(["--photographs", str(photographs)])
    assert "broken.jpg': it is not an image" in capsys.readouterr().err
    (photographs / "broken.jpg").unlink()
    recipe("own_backbone").main(["--photographs", str(photographs), "--output", "mine", "--precision", "float32"])
    assert (tmp_path / "mine" / "mine.onnx").exists()
    assert Directions.load(tmp_path / "mine" / "mine.npz").photographs == 2
    counts = re.findall(r"(\d+) instances", capsys.readouterr().out)
    assert len(counts) == 2
    assert any(int(count) > 0 for count in counts)


@pytest.mark.needs("onnx")
def test_what_is_no_export_is_told(photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipe("own_backbone").main([str(photographs / "broken.jpg")])
    assert "broken.jpg" in capsys.readouterr().err


@pytest.mark.needs("pandas")
def test_pandas_table(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = recipe("pandas_table")
    script.main(["run", "--input", str(photographs)])
    printed = capsys.readouterr().out
    found, instances = script.read_run(tmp_path / "run")
    assert found["path"].tolist() == ["astronaut.jpg", "broken.jpg", "sky/rocket.jpg"]
    assert found["status"].tolist() == ["done", "failed", "done"]
    names = found.set_index("image_id")["path"]
    assert (instances["image_id"].map(names) == instances["file_name"]).all()
    assert found.set_index("path")["instances"].sum() == len(instances) > 1
    assert re.search(r"^sky +1 +0 +0 +\d+ +0\.\d+", printed, re.MULTILINE)
    page = (tmp_path / "run" / "photographs.html").read_text()
    assert page.count("<tr") == 4
    assert "convert it to PNG or JPEG" in page
    script.main(["run"])  # again, from what is there
    with pytest.raises(SystemExit):
        script.main(["photographs"])
    assert "photographs" in capsys.readouterr().err


def test_video_frames(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = recipe("video_frames")
    photograph = read_image(photographs / "sky" / "rocket.jpg")
    (photographs / "clip").mkdir()
    for number, frame in enumerate(script.pan(photograph, 3, step=2)):
        assert frame.shape == (214, 314, 3)
        Image.fromarray(frame).save(photographs / "clip" / f"{number}.png")
    script.main([str(photographs / "clip")])
    printed = capsys.readouterr().out
    assert "frame 2: tracks [1" in printed
    assert "in 3 frames, the longest of 3: followed.gif" in printed
    with Image.open(tmp_path / "followed.gif") as made:
        assert (made.n_frames, made.size) == (3, (314, 214))  # type: ignore[attr-defined]
    with pytest.raises(SystemExit):
        script.main([str(photographs / "sea")])
    assert "sea" in capsys.readouterr().err


def test_the_page_shows_the_scripts_as_they_are() -> None:
    blocks = BLOCK.findall((DOCS / "recipes.md").read_text(encoding="utf-8"))
    assert sorted(name for _, name, _ in blocks) == sorted(path.name for path in RECIPES.glob("*.py"))
    for _, name, code in blocks:
        text = (RECIPES / name).read_text(encoding="utf-8")
        assert code == text, f"recipes.md shows another {name}: python tests/recipes/update_page.py"


def snippets() -> list[str]:
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text[text.index("## Snippets") :], re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(snippets())))
def test_snippets(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = snippets()[number]
    image = read_image(DOCS / "examples" / "rocket.jpg")
    names: dict[str, Any] = {"np": np, "sparsespec": sparsespec, "image": image}
    if "cv2." in code:
        names["cv2"] = pytest.importorskip("cv2")
        monkeypatch.chdir(tmp_path)
        Image.fromarray(image).save("photograph.jpg", quality=95)
    if "result" in code:
        names["result"] = sparsespec.segment(image)
    exec(compile(code, "recipes.md", "exec"), names)
    result = names.get("result")
    if "masks" in names:
        assert names["masks"].shape == (len(result), *image.shape[:2])
        for mask, (left, top, right, bottom) in zip(names["masks"], names["corners"], strict=True):
            rows, columns = np.nonzero(mask)
            assert (left, top, right, bottom) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    elif "cv2" in names:
        read = names["cv2"].imread("photograph.jpg")
        assert np.array_equal(names["result"].labels, sparsespec.segment(np.ascontiguousarray(read[..., ::-1])).labels)
        assert (names["image"] != read).any(axis=2).sum() > 100  # the outlines
    else:
        assert names["picture"].shape[2:] == names["whole"].shape == (384,)


def test_scripts_stand_alone() -> None:
    """They are copied out of the repository: nothing but the public package and what the docstring tells to install."""
    for path in RECIPES.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "__file__" not in text
        assert not re.search(r"sparsespec\._|from (tests|docs)|import tests", text), path.name
        assert f"python {path.name}" in text.split('"""')[1]
