from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from sparsespec.cli import evaluate
from sparsespec.evaluation import Dataset, Example, TrueInstances
from sparsespec.formats import write_label_png


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    truth = np.zeros((20, 30), int)
    truth[2:10, 3:12], truth[12:18, 15:28] = 1, 2
    half = truth.copy()
    half[truth == 2] = 0
    for name, labels in (("pred", half), ("truth", truth)):
        (tmp_path / name / "a").mkdir(parents=True)
        write_label_png(tmp_path / name / "a" / "x.png", labels)
    return tmp_path / "pred", tmp_path / "truth"


def test_table(invoke: Callable[..., Result], folders: tuple[Path, Path]) -> None:
    result = invoke("eval", "--pred", folders[0], "--truth", folders[1])
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "mIoU" in result.output
    assert "0.500" in result.output  # one of two objects, found exactly


def test_json(invoke: Callable[..., Result], folders: tuple[Path, Path]) -> None:
    result = invoke("eval", "--pred", folders[0], "--truth", folders[1], "--json")
    assert result.exit_code == 0
    report = json.loads(result.output)
    assert report["summary"]["mean_iou"] == pytest.approx(0.5)
    assert list(report["images"]) == ["a/x"]


def test_a_run_can_be_evaluated(
    invoke: Callable[..., Result], fake_segmenter: object, tmp_path: Path, zoo: Path
) -> None:
    assert invoke("run", "--input", zoo / "good", "--output", tmp_path / "out").exit_code == 0
    result = invoke("eval", "--pred", tmp_path / "out", "--truth", tmp_path / "out" / "masks", "--json")
    assert result.exit_code == 0
    assert json.loads(result.output)["summary"]["images"] == 12


@pytest.mark.parametrize("missing", ["pred", "truth"])
def test_missing_folder(
    invoke: Callable[..., Result], folders: tuple[Path, Path], tmp_path: Path, missing: str
) -> None:
    paths = dict(zip(("pred", "truth"), folders, strict=True)) | {missing: tmp_path / "nowhere"}
    result = invoke("eval", "--pred", paths["pred"], "--truth", paths["truth"])
    assert result.exit_code == 2
    assert "nowhere" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--pred"),
        (["--truth", "t"], "Missing option '--pred'"),
        (["--pred", "p"], "Missing option '--truth'"),
        (["--ablation"], "Missing option '--truth'"),
        (["--ablation", "--truth", "t", "--pred", "p"], "--pred can't be used with --ablation"),
        (["--ablation", "--truth", "t", "--intervals"], "--intervals can't be used with --ablation"),
        (["--pred", "p", "--truth", "t", "--truth", "u"], "--truth may be given once only"),
        (["--pred", "p", "--truth", "t", "--update", "page.md"], "--update needs --ablation"),
        (["--pred", "p", "--truth", "t", "--limit", 3], "--limit needs --ablation"),
        (["--ablation", "--truth", "t", "--limit", 0], "--limit"),
        (["--pred", "p", "--truth", "t", "--split", "val"], "--split can't be used with --dataset labels"),
        (["--ablation", "--truth", "t", "--split", "val"], "--split can't be used with --dataset labels"),
        (["--pred", "p", "--truth", "t", "--dataset", "imagenet"], "youtube-vis"),
    ],
)
def test_wrong_usage(invoke: Callable[..., Result], arguments: list[object], message: str) -> None:
    result = invoke("eval", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in " ".join(result.stderr.split())


def test_intervals(invoke: Callable[..., Result], folders: tuple[Path, Path]) -> None:
    result = invoke("eval", "--pred", folders[0], "--truth", folders[1], "--intervals")
    assert "0.500  [0.500, 0.500]" in result.output
    assert "95 %" in result.output
    result = invoke("eval", "--pred", folders[0], "--truth", folders[1], "--intervals", "--json")
    assert json.loads(result.output)["intervals"]["mean_iou"] == {"low": 0.5, "high": 0.5}


@pytest.mark.needs("pycocotools")
def test_plain_folders_have_no_scores_and_a_run_has(
    invoke: Callable[..., Result], fake_segmenter: object, folders: tuple[Path, Path], tmp_path: Path, zoo: Path
) -> None:
    result = invoke("eval", "--pred", folders[0], "--truth", folders[1])
    assert "no scores with the predictions" in result.output
    assert "AP50" in result.output
    out = tmp_path / "out"
    assert invoke("run", "--input", zoo / "good", "--output", out).exit_code == 0
    result = invoke("eval", "--pred", out, "--truth", out / "masks")
    assert "no scores" not in result.output
    (out / "instances.json").write_text("{}")
    result = invoke("eval", "--pred", out, "--truth", out / "masks")
    assert result.exit_code == 2
    assert "instances.json' is not the instances.json of a run" in result.stderr


def test_without_pycocotools_the_other_measures_are_shown(
    invoke: Callable[..., Result], folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    result = invoke("eval", "--pred", folders[0], "--truth", folders[1], "--intervals")
    assert result.exit_code == 0
    assert "mIoU" in result.output
    assert "AP50" not in result.output
    assert "pip install 'sparsespec[eval]'" in result.output


def test_sizes_that_differ(invoke: Callable[..., Result], folders: tuple[Path, Path]) -> None:
    write_label_png(folders[1] / "a" / "x.png", np.zeros((4, 5), int))
    result = invoke("eval", "--pred", folders[0], "--truth", folders[1])
    assert result.exit_code == 2
    assert "30 x 20" in result.stderr
    assert "5 x 4" in result.stderr


def test_options_of_a_data_set_reach_its_reader(
    invoke: Callable[..., Result], folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def open_dataset(kind: str, root: Path, *, split: str | None, images: Path | None) -> Dataset:
        calls.append((kind, root, split, images))
        if split == "nosuch":
            raise ValueError("split must be train or val, not 'nosuch'")
        truth = TrueInstances.from_labels(np.eye(20, 30, dtype=int))
        return Dataset("set", [Example("a/x", tmp_path / "x.jpg", lambda: truth)], without_image=("gone",))

    monkeypatch.setitem(sys.modules, "sparsespec.evaluation.datasets", SimpleNamespace(open_dataset=open_dataset))
    arguments = ("eval", "--pred", folders[0], "--truth", tmp_path, "--dataset", "voc", "--images", tmp_path / "jpg")
    result = invoke(*arguments, "--split", "val", "--json")
    assert result.exit_code == 0
    assert json.loads(result.output)["without_image"] == ["gone"]
    assert calls == [("voc", tmp_path, "val", tmp_path / "jpg")]
    result = invoke(*arguments, "--split", "nosuch")
    assert result.exit_code == 2
    assert "split must be train or val" in result.stderr


@pytest.mark.parametrize("as_images", [False, True])
def test_photographs_beside_the_labels_are_told_of(
    invoke: Callable[..., Result], folders: tuple[Path, Path], tmp_path: Path, as_images: bool
) -> None:
    photographs, labels = tmp_path / "set" / "images", tmp_path / "set" / "labels"
    (photographs / "a").mkdir(parents=True)
    folders[1].rename(labels)
    for name in ("a/x", "more"):
        Image.new("RGB", (30, 20)).save(photographs / f"{name}.jpg")
    write_label_png(labels / "lost.png", np.zeros((20, 30), int))
    where = ("--truth", labels, "--images", photographs) if as_images else ("--truth", tmp_path / "set")
    report = json.loads(invoke("eval", "--pred", folders[0], *where, "--json").output)
    assert report["summary"]["mean_iou"] == pytest.approx(0.5)
    assert report["without_truth"] == ["more"]
    assert report["without_image"] == ["lost"]


def test_every_kind_of_data_set_can_be_given() -> None:
    from sparsespec.evaluation.datasets import KINDS

    assert evaluate.KINDS == KINDS


def test_the_ablation_gets_its_options(
    invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def run(*arguments: object) -> None:
        calls.append(arguments)
        if arguments[3] is not None:
            raise ValueError("there is no such folder")

    monkeypatch.setattr("sparsespec.cli._ablation.run", run)
    assert invoke("eval", "--ablation", "--truth", "one", "--truth", "two").exit_code == 0
    more = ("--dataset", "coco", "--split", "val2017", "--update", "page.md", "--limit", 5, "--json", "--part", "steps")
    assert invoke("eval", "--ablation", "--truth", "one", *more).exit_code == 0
    assert calls == [
        ((Path("one"), Path("two")), "labels", None, None, None, None, False, (), (), ()),
        ((Path("one"),), "coco", "val2017", None, Path("page.md"), 5, True, (), (), ("steps",)),
    ]
    result = invoke("eval", "--ablation", "--truth", "one", "--images", "nowhere")
    assert result.exit_code == 2
    assert "there is no such folder." in result.stderr
