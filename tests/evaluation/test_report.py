from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from sparsespec.evaluation import MissingPackageError, Report, TrueInstances, measure, score_image, summarise
from sparsespec.evaluation.report import Prediction

TWO = np.array([[1, 1, 0, 2]])
ONE = np.array([[1, 1, 0, 0]])
NONE = np.array([[0, 0, 0, 0]])


def some() -> list[Prediction]:
    return [
        ("a", ONE, [0.8], TrueInstances.from_labels(TWO)),
        ("b", TWO, [0.9, 0.3], TWO),
        ("c", NONE, [], NONE),
    ]


@pytest.mark.needs("pycocotools")
def test_measures_are_those_of_the_images() -> None:
    report = measure(some())
    scores = [score_image(labels, truth, scores, ranking=True) for _, labels, scores, truth in some()]
    assert report.images == dict(zip("abc", scores, strict=True))
    assert report.summary == summarise(scores)
    assert report.summary.f1_50 == pytest.approx(2 * 3 / 7)
    assert report.summary.ap_50 == pytest.approx(76 / 101)  # three of four found: the recalls 0, 0.01, .., 0.75
    assert report.summary.false_on_empty == 0
    assert report.notes == []


def test_predictions_may_come_one_at_a_time() -> None:
    alive = 0

    def one_by_one() -> Iterator[Prediction]:
        nonlocal alive
        for name, labels, scores, truth in some():
            alive += 1
            yield name, labels, scores, truth

    assert measure(one_by_one()).summary == measure(some()).summary
    assert alive == 3


@pytest.mark.needs("pycocotools")
def test_without_scores_it_is_said_that_all_rank_equal() -> None:
    [note] = measure([("a", ONE, None, TWO)]).notes
    assert "rank equal" in note
    assert "approximate" in note
    [note] = measure([*some(), ("d", ONE, None, TWO)]).notes
    assert "1 image" in note
    assert measure([("a", NONE, None, TWO), ("b", ONE, [1], TWO)]).notes == []


def test_bad_predictions() -> None:
    with pytest.raises(ValueError, match="two predictions are called 'a'"):
        measure([*some(), some()[0]])
    with pytest.raises(ValueError, match="predictions is empty"):
        measure([])
    with pytest.raises(ValueError, match=r"'x': predicted and truth must be of one shape .*\(1, 4\) and \(2, 2\)"):
        measure([("x", ONE, [1], np.zeros((2, 2), int))])
    with pytest.raises(ValueError, match="'x': labels must lie in"):
        measure([("x", TWO, [1], TWO)])


def test_average_precision_can_be_left_out_or_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure(some(), average_precision=False).summary.ap is None
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    report = measure(some())
    assert report.summary.ap is None
    [note] = report.notes
    assert "pip install 'sparsespec[eval]'" in note
    table = report.with_intervals(n=3).table()
    assert "AP50" not in table
    assert note in table
    with pytest.raises(MissingPackageError, match="pycocotools"):
        measure(some(), average_precision=True)


def rows(report: Report) -> dict[str, str]:
    return {line[:22].strip(): line[22:].strip() for line in report.table().splitlines()}


@pytest.mark.needs("pycocotools")
def test_the_table_has_every_measure() -> None:
    table = rows(measure(some()))
    assert table == {
        "images": "3",
        "true instances": "4",
        "predicted instances": "3",
        "mIoU": "0.750",
        "F1 at IoU 0.5": "0.857",
        "AP": "0.752",
        "AP50": "0.752",
        "AP75": "0.752",
        "AR100": "0.750",
        "foreground F": "0.933",
        "foreground IoU": "0.889",
        "error in the count": "0.33",
        "false on empty": "0.000  of 1 image",
    }


@pytest.mark.needs("pycocotools")
def test_measures_without_meaning_are_dashes() -> None:
    table = rows(measure([("a", NONE, [], NONE)]))
    assert table["mIoU"] == table["AP50"] == table["AR100"] == "-"
    assert rows(measure(some()[:2]))["false on empty"] == "-  no image is empty"


@pytest.mark.needs("pycocotools")
def test_intervals_stand_in_brackets() -> None:
    report = measure(some()).with_intervals(n=50, level=0.9, seed=1)
    table = rows(report)
    interval = report.intervals["mean_iou"]
    assert table["mIoU"] == f"0.750  [{interval.low:.3f}, {interval.high:.3f}]"
    assert table["false on empty"] == "0.000  [0.000, 0.000]  of 1 image"
    assert "[" in table["AP50"]
    assert "90 %" in report.table()
    assert measure(some()).with_intervals(n=50, level=0.9, seed=1).intervals == report.intervals


def test_names_that_have_no_counterpart_are_listed() -> None:
    report = measure(some())
    listed = Report(report.summary, report.images, [f"p{k}" for k in range(7)], ["t"], ["i"])
    table = rows(listed)
    assert table["no prediction for"] == "p0, p1, p2, p3, p4 and 2 more"
    assert table["no truth for"] == "t"
    assert table["no image for"] == "i"
    assert listed.to_dict()["without_prediction"][-1] == "p6"
    assert listed.to_dict()["without_image"] == ["i"]


@pytest.mark.needs("pycocotools")
def test_everything_is_json() -> None:
    report = measure([("a", NONE, None, NONE), ("b", TWO, None, ONE)])
    plain = json.loads(json.dumps(report.with_intervals(n=5).to_dict(), allow_nan=False))
    assert plain["summary"]["ap_50"] == pytest.approx(1)
    assert plain["summary"]["n_empty"] == 1
    assert plain["images"]["a"]["mean_iou"] is None
    assert plain["images"]["b"]["foreground_iou"] == pytest.approx(2 / 3)
    assert plain["images"]["b"]["foreground_both"] == 2
    assert set(plain["intervals"]["ap"]) == {"low", "high"}
    assert plain["level"] == 0.95
    assert len(plain["notes"]) == 1
    assert "intervals" not in report.to_dict()
    missing = measure([("a", NONE, None, NONE)], average_precision=False).to_dict()
    assert missing["summary"]["ap"] is None
    assert missing["summary"]["mean_iou"] is None
