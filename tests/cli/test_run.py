from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from sparsespec.batch import Row
from sparsespec.cli._progress import Progress
from sparsespec.directions import Directions
from sparsespec.models import get_model
from tests.cli.conftest import bright_pixels

Invoke = Callable[..., Result]

GOOD = [
    "alpha.png", "animated.gif", "black.png", "cmyk.jpg", "deep-colour.tif", "deep.png", "grey.png", "one-pixel.png",
    "palette.png", "plain.jpg", "rotated.jpg", "strip.png",
]  # fmt: skip
BAD = {
    "cut.jpg": r"it is damaged or cut short \(.*\); copy or export it again",
    "empty.jpg": r"it is empty \(zero bytes\); copy or export it again",
    "text.jpg": r"it is not an image that can be read",
}
SIZES = {"one-pixel.png": [1, 1], "strip.png": [4000, 3], "black.png": [50, 40], "rotated.jpg": [48, 64]}


def record(output: Path) -> dict[str, Any]:
    loaded = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def check_good_images(output: Path) -> None:
    """Masks, COCO and record agree on every readable image, in the orientation in which people see it."""
    rows = {Path(row["path"]).name: row for row in record(output)["images"] if row["status"] == "done"}
    assert sorted(rows) == sorted(GOOD)
    coco = {
        Path(image["file_name"]).name: image for image in json.loads((output / "instances.json").read_text())["images"]
    }
    for name, row in rows.items():
        assert row["size"] == SIZES.get(name, [64, 48])
        assert [coco[name]["width"], coco[name]["height"]] == row["size"]
        with Image.open(output / row["mask"]) as mask:
            assert mask.size == tuple(row["size"])
            assert len(np.unique(np.asarray(mask))) - (np.asarray(mask) == 0).any() == row["instances"]
    assert rows["black.png"]["instances"] == 0


def check_failures(output: Path, result: Result) -> None:
    rows = {Path(row["path"]).name: row for row in record(output)["images"]}
    lines = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert len(lines) == len(result.stderr.splitlines()) == len(BAD)
    for name, pattern in BAD.items():
        assert rows[name]["status"] == "failed"
        assert rows[name]["mask"] is None
        assert re.fullmatch(pattern + ".*", rows[name]["error"])
        assert f"failed: bad/{name}: {rows[name]['error']}" in lines


def test_a_folder_of_everything(invoke: Invoke, fake_segmenter: object, zoo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke("run", "--input", zoo, "--output", out)
    assert result.exit_code == 1
    check_good_images(out)
    check_failures(out, result)
    assert re.fullmatch(
        rf"12 done, 3 failed, \d+ instances, [\d.]+ s; look at {re.escape(str(out))}/report.html\n", result.stdout
    )
    assert (out / "report.html").is_file()


@pytest.mark.parametrize("name", [f"good/{name}" for name in GOOD])
def test_each_good_image_alone(invoke: Invoke, fake_segmenter: object, zoo: Path, tmp_path: Path, name: str) -> None:
    result = invoke("run", "--input", zoo / name, "--output", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.startswith("1 done, 0 failed, ")
    assert (tmp_path / "out" / "masks" / Path(name).with_suffix(".png").name).is_file()


@pytest.mark.parametrize("name", BAD)
def test_each_bad_image_alone(invoke: Invoke, fake_segmenter: object, zoo: Path, tmp_path: Path, name: str) -> None:
    result = invoke("run", "--input", zoo / "bad" / name, "--output", tmp_path / "out")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert re.match(rf"failed: {re.escape(name)}: {BAD[name]}", line)
    assert result.stdout.startswith("0 done, 1 failed, 0 instances")
    (row,) = record(tmp_path / "out")["images"]
    assert row["status"] == "failed"


def test_unreadable_image(
    invoke: Invoke, fake_segmenter: object, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zoo / "good" / "plain.jpg"
    path.chmod(0)
    opening = os.open

    def guarded(path: Any, *arguments: Any, **options: Any) -> int:
        # The superuser, who runs tests in containers, may read everything.
        if Path(os.fsdecode(path)).name == "plain.jpg":
            raise PermissionError(13, "Permission denied")
        return opening(path, *arguments, **options)

    monkeypatch.setattr("os.open", guarded)
    result = invoke("run", "--input", zoo / "good", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == ["failed: plain.jpg: permission denied; check the file and the disk it is on"]
    assert record(tmp_path / "out")["totals"]["done"] == 11
    path.chmod(0o644)


def test_the_default_output_lies_in_the_working_folder(
    invoke: Invoke, fake_segmenter: object, zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(zoo / "good")
    assert invoke("run", "--input", ".").exit_code == 0
    assert (zoo / "good" / "sparsespec-out" / "run.json").is_file()
    # Its own results are no input of the next run.
    assert invoke("run", "--input", ".", "--overwrite").exit_code == 0
    assert record(zoo / "good" / "sparsespec-out")["totals"]["images"] == 12


def test_parameters_are_handed_on_and_recorded(
    invoke: Invoke, fake_segmenter: list[tuple[Any, ...]], zoo: Path, tmp_path: Path
) -> None:
    source = str(zoo / "good" / "*.jpg")
    result = invoke(
        "run", "--input", source, "--output", tmp_path / "out", "--n-instances", 3, "--method", "paper", "--seed", 7,
        "--no-overlays", "--model", "default", "--workers", 1, "--engine", "inline",
    )  # fmt: skip
    assert result.exit_code == 0
    assert fake_segmenter == [("default", 3, "paper", 7, {}, None)]
    saved = record(tmp_path / "out")
    assert saved["parameters"].pop("model_sha256") == hashlib.sha256(get_model("default").path.read_bytes()).hexdigest()
    assert saved["parameters"] == {
        "input": source, "model": "default", "provider": "auto", "n_instances": 3, "method": "paper",
        "directions": "none", "directions_sha256": None, "seed": 7,
    }  # fmt: skip
    assert saved["execution"] == {
        "engine": "inline", "workers": 1, "output": str(tmp_path / "out"), "overwrite": False,
    }  # fmt: skip
    assert not (tmp_path / "out" / "overlays").exists()
    invoke("run", "--input", source, "--output", tmp_path / "again", "--n-instances", "AUTO")
    assert fake_segmenter[1] == ("default", None, "sparse", 0, {}, "default")
    assert record(tmp_path / "again")["parameters"]["n_instances"] == "auto"


def test_provider_is_handed_on_and_recorded(
    invoke: Invoke, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def build(ctx: object, *arguments: Any, **provider: Any) -> Any:
        asked.append(provider)
        return bright_pixels

    monkeypatch.setattr("sparsespec.cli.run._segmenter", build)
    options = ["--provider", "CUDA", "--provider-option", "device_id=1", "--provider-option", "a=b=c"]
    result = invoke("run", "--input", zoo / "good" / "plain.jpg", "--output", tmp_path / "out", *options)
    assert result.exit_code == 0
    given = {"provider": "cuda", "provider_options": {"device_id": "1", "a": "b=c"}}
    assert [{name: each[name] for name in given} for each in asked] == [given]
    parameters = record(tmp_path / "out")["parameters"]
    assert {name: parameters[name] for name in given} == given


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--provider", "nope"], "unknown provider 'nope'; there are auto, cpu, cuda"),
        (["--provider", "xnnpack"], "xnnpack (XnnpackExecutionProvider) isn't available here; available are"),
        (["--provider-option", "device_id=1"], "device_id can't be given with the provider 'auto'"),
        (["--provider", "cpu", "--provider-option", "x=1"], "x can't be given with the provider 'cpu': it has none"),
        (["--provider", "cuda", "--provider-option", "x"], "'x' is not of the form KEY=VALUE"),
        (["--storage-option", "x"], "'x' is not of the form NAME=VALUE, such as anon=true"),
        (["--memory-limit", "0.5"], "--memory-limit 0.5 is in megabytes: give 1 or more"),
        (
            ["--youtube-vis", "--video-list", "nowhere.json"],
            "cannot read the --video-list 'nowhere.json': No such file",
        ),
    ],
)
def test_option_that_cannot_be(invoke: Invoke, zoo: Path, tmp_path: Path, options: list[str], words: str) -> None:
    result = invoke("run", "--input", zoo / "good" / "plain.jpg", "--output", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("cpus", "options", "expected"),
    [
        (1, (), (1, 1)),
        (2, (), (1, 2)),
        (9, (), (2, 4)),
        (9, ("--workers", "1"), (9, 1)),
        (2, ("--workers", "3"), (1, 3)),
        (9, ("--workers", "40"), (1, 12)),
        (9, ("--workers", "AUTO", "--long-side", "672"), (2, 4)),
        (9, ("--long-side", "673"), (9, 1)),
        (9, ("--scale", "0.1"), (9, 1)),
        (9, ("--megapixels", "4"), (9, 1)),
        (9, ("--megapixels", "4", "--workers", "3"), (3, 3)),
    ],
)
def test_workers_share_the_processors(
    invoke: Invoke,
    zoo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cpus: int,
    options: tuple[str, ...],
    expected: tuple[int, int],
) -> None:
    shares = []

    def build(*_: object, threads: int, workers: int, **__: object) -> Any:
        shares.append((threads, workers))
        return lambda image: SimpleNamespace(labels=np.zeros(image.shape[:2], int), scores=np.zeros(0), info={})

    monkeypatch.setattr("sparsespec.cli.run._segmenter", build)
    monkeypatch.setattr("sparsespec._threads.available_cpus", lambda: cpus)
    # Twelve images: more workers would have nothing to do.
    assert invoke("run", "--input", zoo / "good", "--output", tmp_path / "out", *options).exit_code == 0
    assert shares == [expected]
    saved = record(tmp_path / "out")
    assert saved["execution"]["workers"] == expected[1]
    assert saved["totals"]["done"] == 12


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (("--long-side", "960"), {"long_side": 960}),
        (("--scale", "0.5"), {"scale": 0.5}),
        (("--megapixels", "2.5"), {"megapixels": 2.5}),
    ],
)
def test_the_size_of_the_networks_input(
    invoke: Invoke,
    fake_segmenter: list[tuple[Any, ...]],
    zoo: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    size: dict[str, float],
) -> None:
    result = invoke("run", "--input", zoo / "good" / "plain.jpg", "--output", tmp_path / "out", *options)
    assert result.exit_code == 0
    assert fake_segmenter == [("default", None, "sparse", 0, size, "default")]
    parameters = record(tmp_path / "out")["parameters"]
    assert {name: parameters.get(name) for name in ("long_side", "scale", "megapixels")} == {
        "long_side": None, "scale": None, "megapixels": None, **size,
    }  # fmt: skip


def test_the_limit_on_images(invoke: Invoke, fake_segmenter: object, zoo: Path, tmp_path: Path) -> None:
    arguments = ("run", "--input", zoo / "good" / "plain.jpg")
    refused = invoke(*arguments, "--output", tmp_path / "a", "--max-megapixels", "0.003")
    assert refused.exit_code == 1
    assert "64 x 48 = 0.0 megapixels, more than the limit of 0.003 megapixels" in refused.stderr
    assert "--max-megapixels" in refused.stderr
    assert invoke(*arguments, "--output", tmp_path / "b", "--max-megapixels", "0.0031").exit_code == 0
    assert record(tmp_path / "b")["parameters"]["max_megapixels"] == 0.0031


def test_the_same_command_goes_on_and_another_needs_overwrite(
    invoke: Invoke, fake_segmenter: object, zoo: Path, tmp_path: Path
) -> None:
    arguments = ("run", "--input", zoo / "good" / "plain.jpg", "--output", tmp_path / "out")
    assert invoke(*arguments).exit_code == 0
    again = invoke(*arguments, "--workers", 2)
    assert again.exit_code == 0
    assert again.stdout.startswith("1 done (1 earlier), 0 failed, ")
    result = invoke(*arguments, "--seed", 1, "--polygons")
    assert result.exit_code == 2
    assert "holds a run with other settings (polygons was false, is true; seed was 0, is 1)" in " ".join(
        result.stderr.split()
    )
    assert "--overwrite" in result.stderr
    assert invoke(*arguments, "--seed", 1, "--polygons", "--overwrite").exit_code == 0
    assert record(tmp_path / "out")["execution"]["overwrite"] is True


def test_images_that_are_gone_need_prune(invoke: Invoke, fake_segmenter: object, zoo: Path, tmp_path: Path) -> None:
    arguments = ("run", "--input", zoo / "good", "--output", tmp_path / "out")
    assert invoke(*arguments).exit_code == 0
    (zoo / "good" / "plain.jpg").unlink()
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "no longer in the input, such as 'plain.jpg'" in " ".join(result.stderr.split())
    assert "--prune" in result.stderr
    assert (tmp_path / "out" / "masks" / "plain.png").exists()
    result = invoke(*arguments, "--prune")
    assert result.exit_code == 0
    assert result.stdout.startswith("11 done (11 earlier), ")
    assert not (tmp_path / "out" / "masks" / "plain.png").exists()


def test_the_first_failure_ends_the_run_on_request(
    invoke: Invoke, fake_segmenter: object, zoo: Path, tmp_path: Path
) -> None:
    arguments = ("run", "--input", zoo, "--output", tmp_path / "out", "--workers", 1)
    result = invoke(*arguments, "--fail-fast")
    assert result.exit_code == 1
    assert result.stdout.startswith("ended at the first failure: 0 done, 1 failed, 14 not reached, ")
    assert len(result.stderr.splitlines()) == 1
    assert invoke(*arguments).exit_code == 1
    assert record(tmp_path / "out")["totals"]["done"] == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "Missing option '--input'"),
        (("--input", "{tmp}/missing"), "missing' does not exist"),
        (("--input", "{tmp}/empty"), "holds no image"),
        (("--input", "{tmp}/*.webp"), "holds no image"),
        (("--input", ""), "empty string"),
        (("--input", "{zoo}", "--output", "{zoo}"), "output folder is the folder of the input"),
        (("--input", "{zoo}", "--n-instances", "many"), "'many' is neither 'auto' nor a whole number"),
        (("--input", "{zoo}", "--n-instances", "0"), "0 is too small"),
        (("--input", "{zoo}", "--n-instances", "-2"), "-2 is too small"),
        (("--input", "{zoo}", "--n-instances", "2.5"), "'2.5' is neither"),
        (("--input", "{zoo}", "--method", "paper"), "--n-instances N"),
        (("--input", "{zoo}", "--method", "magic"), "'magic' is not one of 'sparse', 'paper'"),
        (("--input", "{zoo}", "--workers", "0"), "'--workers': 0 is too small: give 'auto' or a number from 1 on"),
        (("--input", "{zoo}", "--workers", "all"), "'--workers': 'all' is neither 'auto' nor a whole number"),
        (("--input", "{zoo}", "--engine", "inline", "--time-limit", "9"), "limit together with --engine processes"),
        (
            ("--input", "{zoo}", "--engine", "dask", "--memory-limit", "9"),
            "--memory-limit goes with --engine processes",
        ),
        (("--input", "{zoo}", "--time-limit", "0"), "'--time-limit': 0 is not a number above 0"),
        (("--input", "{zoo}", "--dask-scheduler", "tcp://x:1"), "--dask-scheduler goes with --engine dask"),
        (("--input", "{zoo}", "--shard-size", "63"), "'--shard-size': 63 is not in the range 64<=x<=512"),
        (("--input", "{zoo}", "--table", "xls"), "'xls' is not one of 'csv', 'parquet'"),
        (("--input", "{zoo}", "--video-list", "x.json"), "--video-list goes with --youtube-vis"),
        (("--input", "{zoo}", "--engine", "spark"), "'spark' is not"),
        (("--input", "{zoo}", "--seed", "-1"), "-1 is not in the range"),
        (("--input", "{zoo}", "--long-side", "0"), "'--long-side': 0 is not in the range x>=1"),
        (("--input", "{zoo}", "--long-side", "1.5"), "'--long-side': '1.5' is not a valid integer"),
        (("--input", "{zoo}", "--scale", "0"), "'--scale': 0 is not a number above 0"),
        (("--input", "{zoo}", "--scale", "nan"), "'--scale': nan is not a number above 0"),
        (("--input", "{zoo}", "--scale", "half"), "'--scale': 'half' is not a number"),
        (("--input", "{zoo}", "--megapixels", "-2"), "'--megapixels': -2 is not a number above 0"),
        (("--input", "{zoo}", "--megapixels", "inf"), "'--megapixels': inf is not a number above 0"),
        (("--input", "{zoo}", "--max-megapixels", "0"), "'--max-megapixels': 0 is not a number above 0"),
        (
            ("--input", "{zoo}", "--scale", "1", "--long-side", "700"),
            "--long-side 700 and --scale 1 contradict each other",
        ),
        (("--input", "{zoo}", "--scale", "1", "--megapixels", "2"), "--scale 1 and --megapixels 2 contradict"),
        (("--input", "{zoo}", "--output", "{tmp}/file.txt"), "is a file"),
        (("--input", "{zoo}", "--directions", ""), "'--directions': the name is empty"),
        (
            ("--input", "{zoo}", "--directions", "{tmp}/x.npz", "--method", "paper", "--n-instances", "2"),
            "--method paper uses no directions",
        ),
        (("--input", "{zoo}", "surplus"), "unexpected extra argument"),
    ],
)
def test_wrong_usage(
    invoke: Invoke, fake_segmenter: object, zoo: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    arguments = [option.format(tmp=tmp_path, zoo=zoo) for option in options]
    if "--output" not in arguments:
        arguments += ["--output", str(tmp_path / "out")]
    result = invoke("run", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["vit-xxl", "missing.onnx", "{tmp}/text.onnx"])
def test_wrong_model(invoke: Invoke, zoo: Path, tmp_path: Path, model: str) -> None:
    (tmp_path / "text.onnx").write_text("not a network")
    name = model.format(tmp=tmp_path)
    result = invoke("run", "--input", zoo / "good", "--output", tmp_path / "out", "--model", name)
    assert result.exit_code == 2
    assert f"cannot use the model '{name}'" in result.stderr
    assert not (tmp_path / "out").exists()


def directions(channels: int = 384, source_sha256: str = "") -> Directions:
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.1, (3 * channels, 3))
    return Directions(weights[:, 0], 0.0, weights[:, 1:], np.zeros(2), source_sha256, photographs=9)


@pytest.mark.parametrize(
    ("given", "handed_on"),
    [((), "default"), (("default",), "default"), (("None",), None), (("./none",), "./none"), (("{tmp}/x",), "{tmp}/x")],
)
def test_directions_are_handed_on_and_recorded(
    invoke: Invoke,
    fake_segmenter: list[tuple[Any, ...]],
    zoo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: tuple[str, ...],
    handed_on: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    directions().save("none")
    directions().save("x")
    options = [part.format(tmp=tmp_path) for name in given for part in ("--directions", name)]
    result = invoke("run", "--input", zoo / "good" / "plain.jpg", "--output", "out", *options)
    assert result.exit_code == 0, result.output
    expected = None if handed_on is None else handed_on.format(tmp=tmp_path)
    assert fake_segmenter[0][-1] == expected
    parameters = record(tmp_path / "out")["parameters"]
    assert parameters["directions"] == (expected or "none")
    shipped = get_model("default").path.with_name("dinov2_vits14_directions.npz").read_bytes()
    content = {"default": shipped, None: None}.get(expected, directions().to_bytes())
    assert parameters["directions_sha256"] == (None if content is None else hashlib.sha256(content).hexdigest())


def test_no_directions_for_a_model(
    invoke: Invoke, fake_segmenter: object, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsespec.models.registry._DIRECTIONS", {})
    assert invoke("run", "--input", zoo / "good" / "plain.jpg", "--output", tmp_path / "out").exit_code == 0
    parameters = record(tmp_path / "out")["parameters"]
    assert (parameters["directions"], parameters["directions_sha256"]) == ("default", None)


def test_wrong_directions(invoke: Invoke, zoo: Path, tmp_path: Path) -> None:
    def refused(name: str) -> str:
        result = invoke("run", "--input", zoo / "good", "--output", tmp_path / "out", "--directions", tmp_path / name)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert not (tmp_path / "out").exists()
        return " ".join(result.stderr.split())

    (tmp_path / "text.npz").write_text("objectness 1 2 3")
    directions(channels=12).save(tmp_path / "narrow.npz")
    directions(source_sha256="ab" * 32).save(tmp_path / "other.npz")
    assert f"there is no file of directions '{tmp_path / 'missing.npz'}'; give a file that" in refused("missing.npz")
    assert "text.npz' is no file of directions, or it is cut short" in refused("text.npz")
    assert "narrow.npz' are of a network with 12 channels, this one has 384" in refused("narrow.npz")
    assert "other.npz' were fitted on another network's features" in refused("other.npz")
    assert "there is no file of directions" in refused("")


def test_full_disk(
    invoke: Invoke, fake_segmenter: object, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsespec.formats.coco.CocoWriter.close", full)
    result = invoke("run", "--input", zoo / "good", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr == (
        "sparsespec: cannot write the results: [Errno 28] No space left on device;"
        " give the same command again to go on\n"
    )
    assert record(tmp_path / "out")["state"] == "running"
    monkeypatch.undo()


def test_disk_that_is_full_in_the_middle(
    invoke: Invoke, fake_segmenter: object, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsespec.formats.labels import write_label_png

    written: list[Path] = []

    def write(path: Path, labels: np.ndarray) -> None:
        written.append(path)
        if len(written) > 4:
            raise OSError(28, "No space left on device")
        write_label_png(path, labels)

    arguments = ("run", "--input", zoo / "good", "--output", tmp_path / "out", "--workers", 1)
    with monkeypatch.context() as patch:
        patch.setattr("sparsespec.batch.one.write_label_png", write)
        result = invoke(*arguments)
    assert result.exit_code == 1
    assert result.stderr == (
        "sparsespec: cannot write the results: No space left on device; give the same command again to go on\n"
    )
    assert result.stdout.startswith("4 done, 0 failed, 8 not reached, ")
    assert record(tmp_path / "out")["state"] == "blocked"
    result = invoke(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("12 done (4 earlier), 0 failed, ")


def test_interrupted(
    invoke: Invoke, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_segmenter: object
) -> None:
    calls = 0

    def stopping(image: np.ndarray) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return SimpleNamespace(labels=np.zeros(image.shape[:2], int), scores=np.zeros(0), info={})

    monkeypatch.setattr("sparsespec.cli.run._segmenter", lambda *_, **__: stopping)
    result = invoke("run", "--input", zoo / "good", "--output", tmp_path / "out", "--workers", 1)
    assert result.exit_code == 130
    assert result.stdout.startswith("interrupted: 2 done, 0 failed, 10 not reached, ")
    assert result.stdout.endswith(f"; look at {tmp_path / 'out' / 'report.html'}\n")
    assert record(tmp_path / "out")["state"] == "interrupted"
    # Of too many images to write it while somebody waits, there is no report to look at.
    monkeypatch.setattr("sparsespec.batch.run._AT_ONCE", 1)
    calls = 0
    result = invoke("run", "--input", zoo / "good", "--output", tmp_path / "many", "--workers", 1)
    assert result.exit_code == 130
    assert result.stdout.endswith(f"; results in {tmp_path / 'many'}\n")
    assert not (tmp_path / "many" / "report.html").exists()


def test_interrupted_before_the_first_image(
    invoke: Invoke, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsespec.cli.run._segmenter", impatient)
    result = invoke("run", "--input", zoo / "good", "--output", tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr.strip() == "sparsespec: interrupted"


@pytest.mark.skipif(os.name == "nt", reason="a process cannot send itself Ctrl-C there without its console")
def test_a_real_signal_gives_no_traceback(zoo: Path, tmp_path: Path) -> None:
    code = f"""
import os, signal, types
import numpy as np
import sparsespec.cli.run as run
from sparsespec.cli import main
once = iter([True])
def segment(image):
    # Not from two workers at the same moment, which would be a second Ctrl-C.
    if next(once, False):
        os.kill(os.getpid(), signal.SIGINT)
    return types.SimpleNamespace(labels=np.zeros(image.shape[:2], int), scores=np.zeros(0), info={{}})
run._segmenter = lambda *_, **__: segment
main(["run", "--input", {str(zoo / "good")!r}, "--output", {str(tmp_path / "out")!r}])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 128 + signal.SIGINT
    assert set(result.stderr.splitlines()) == {"stopping after the images at work; Ctrl-C again to stop now"}
    # Images that are at work when the signal comes are finished, where there are several workers.
    found = re.match(r"interrupted: ([0-4]) done, 0 failed, (\d+) not reached", result.stdout)
    assert found is not None, result.stdout
    assert record(tmp_path / "out")["totals"]["skipped"] == int(found[2]) == 12 - int(found[1])


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_a_second_signal_ends_the_process(zoo: Path, tmp_path: Path) -> None:
    code = f"""
import os, signal, sys, threading, time
import sparsespec.cli.run as run
from sparsespec.cli import entry
began = threading.Semaphore(0)
def segment(image):
    began.release()
    time.sleep(300)
def signals():
    began.acquire(), began.acquire()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
run._segmenter = lambda *_, **__: segment
threading.Thread(target=signals, daemon=True).start()
out = {str(tmp_path / "out")!r}
sys.argv = ["sparsespec", "run", "--input", {str(zoo / "good")!r}, "--output", out, "--workers", "2"]
entry()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 128 + signal.SIGINT
    assert result.stdout.startswith("interrupted: 0 done, 0 failed, 12 not reached")
    assert record(tmp_path / "out")["state"] == "interrupted"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(4) as progress:
        progress.update(Row("a.jpg", status="done"), 1, 4)
        progress.update(Row("b.jpg", status="failed", error="it is empty"), 2, 4)
    written = terminal.getvalue()
    assert "] 0/4" in written
    assert "] 2/4" in written
    assert "1 failed" in written
    # The failure stands on a line of its own, and the bar is gone at the end.
    assert "\rfailed: b.jpg: it is empty\n" in written
    assert written.endswith("\r")
    assert "\x1b" not in written


def test_progress_line() -> None:
    progress = Progress(40)
    assert progress.line(0, 1.0) == "[------------------------] 0/40"
    assert progress.line(10, 5.0) == "[######------------------] 10/40  2.0 images/s  15.0 s left"
    assert progress.line(10, 50.0) == "[######------------------] 10/40  5.0 s/image  2 min 30 s left"


def test_no_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(2) as progress:
        progress.update(Row("a.jpg", status="done"), 1, 2)
    assert stream.getvalue() == ""


def test_names_cannot_take_over_the_terminal(invoke: Invoke, fake_segmenter: object, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    try:
        (tmp_path / "in" / "a\x1b[2J\n.jpg").write_bytes(b"")
    except OSError:
        pytest.skip("this file system refuses control characters in names")
    result = invoke("run", "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "\x1b" not in result.output
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_real_segmenter_on_everything(invoke: Invoke, zoo: Path, tmp_path: Path) -> None:
    result = invoke("run", "--input", zoo, "--output", tmp_path / "out")
    assert result.exit_code == 1
    check_good_images(tmp_path / "out")
    check_failures(tmp_path / "out", result)


def test_the_real_segmenter_on_one_image(invoke: Invoke, zoo: Path, tmp_path: Path) -> None:
    result = invoke("run", "--input", zoo / "good" / "plain.jpg", "--output", tmp_path / "out", "--n-instances", 1)
    assert result.exit_code == 0, result.stderr
    (row,) = record(tmp_path / "out")["images"]
    assert row["instances"] == 1
    assert {"read", "features", "write", "total"} <= set(row["seconds"])


def test_dask_that_is_not_installed(invoke: Invoke, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    source = zoo / "good" / "plain.jpg"
    result = invoke("run", "--input", source, "--output", tmp_path / "out", "--engine", "dask")
    assert result.exit_code == 2
    assert "pip install 'sparsespec[dask]'" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
