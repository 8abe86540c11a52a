from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

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


def test_options_are_required(invoke: Callable[..., Result]) -> None:
    result = invoke("eval")
    assert result.exit_code == 2
    assert "--pred" in result.stderr
