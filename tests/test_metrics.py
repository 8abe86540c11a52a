from __future__ import annotations

import math

import imageio.v3 as iio
import numpy as np
import pytest

from sparsespec.evaluation import evaluate_folders, iou_matrix, score_image, summarise


def _iou_by_loops(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    rows = [v for v in np.unique(predicted) if v]
    columns = [v for v in np.unique(truth) if v]
    out = np.zeros((len(rows), len(columns)))
    for i, a in enumerate(rows):
        for j, b in enumerate(columns):
            first, second = predicted == a, truth == b
            out[i, j] = (first & second).sum() / (first | second).sum()
    return out


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_iou_matrix_is_the_plain_one(dtype: type) -> None:
    rng = np.random.default_rng(0)
    predicted = rng.integers(0, 5, (13, 17)).astype(dtype)
    truth = (rng.integers(0, 4, (13, 17)) * 60).astype(dtype)
    np.testing.assert_allclose(iou_matrix(predicted, truth), _iou_by_loops(predicted, truth))


@pytest.mark.parametrize("value", [0, 1])
def test_images_of_one_value(value: int) -> None:
    truth = np.array([[0, 1], [2, 2]])
    assert iou_matrix(np.full((2, 2), value), truth).shape == (value, 2)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"one shape.*\(2, 2\).*\(2, 3\)"):
        iou_matrix(np.zeros((2, 2), int), np.zeros((2, 3), int))


def test_hungarian_beats_greedy() -> None:
    # The larger prediction covers both true instances; taking its best partner first would leave the other one nothing.
    truth = np.array([[1] * 6 + [2] * 4])
    predicted = np.array([[1] * 10])
    score = score_image(predicted, truth)
    assert score.matched_iou == pytest.approx(0.6)
    assert score.mean_iou == pytest.approx(0.3)
    assert score.matches_50 == 1


def test_perfect_and_empty() -> None:
    truth = np.array([[0, 3, 3], [9, 9, 0]])
    perfect = score_image(truth, truth)
    assert (perfect.mean_iou, perfect.matches_50, perfect.foreground_f) == (1, 2, 1)
    nothing = score_image(np.zeros_like(truth), truth)
    assert (nothing.mean_iou, nothing.matches_50, nothing.foreground_f) == (0, 0, 0)
    both_empty = score_image(np.zeros_like(truth), np.zeros_like(truth))
    assert math.isnan(both_empty.mean_iou)
    assert both_empty.foreground_f == 1


def test_half_is_a_match_and_less_is_not() -> None:
    truth = np.array([[1, 1, 0, 0]])
    assert score_image(np.array([[1, 0, 0, 0]]), truth).matches_50 == 1
    assert score_image(np.array([[1, 0, 1, 0]]), truth).matches_50 == 0


def test_summary_counts_over_the_set() -> None:
    truth = np.array([[1, 2]])
    scores = [score_image(np.array([[1, 0]]), truth), score_image(np.array([[5, 6]]), truth)]
    total = summarise(scores)
    assert total.images == 2
    assert total.mean_iou == pytest.approx(0.75)
    assert total.f1_50 == pytest.approx(2 * 3 / (3 + 4))
    assert total.count_error == pytest.approx(0.5)
    assert total.foreground_f == pytest.approx((2 / 3 + 1) / 2)
    with pytest.raises(ValueError, match="scores is empty"):
        summarise([])


def test_folders(tmp_path) -> None:  # type: ignore[no-untyped-def]
    truth, run = tmp_path / "truth", tmp_path / "run"
    (truth / "a").mkdir(parents=True)
    (run / "masks" / "a").mkdir(parents=True)
    labels = np.array([[0, 1], [2, 2]], np.uint16)
    iio.imwrite(truth / "a" / "x.png", labels)
    iio.imwrite(truth / "only.png", labels)
    iio.imwrite(run / "masks" / "a" / "x.png", labels)
    report = evaluate_folders(run, truth)
    assert report.summary.mean_iou == 1
    assert report.without_prediction == ["only"]
    assert report.to_dict()["images"]["a/x"]["matches_50"] == 2
    assert "mIoU" in report.table()

    iio.imwrite(truth / "a" / "x.png", np.zeros((3, 2), np.uint8))
    with pytest.raises(ValueError, match=r"x\.png' is 2 x 2 .*x\.png' is 2 x 3"):
        evaluate_folders(run, truth)


def test_bad_folders(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"pred_dir .* is not a folder"):
        evaluate_folders(tmp_path / "none", tmp_path)
    with pytest.raises(ValueError, match="holds no label image"):
        evaluate_folders(tmp_path, tmp_path)
    (tmp_path / "p").mkdir()
    (tmp_path / "t").mkdir()
    iio.imwrite(tmp_path / "p" / "a.png", np.zeros((2, 2), np.uint8))
    iio.imwrite(tmp_path / "t" / "b.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match="no image of pred_dir"):
        evaluate_folders(tmp_path / "p", tmp_path / "t")
    (tmp_path / "t" / "a.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"cannot read the label image .*a\.png"):
        evaluate_folders(tmp_path / "p", tmp_path / "t")
    iio.imwrite(tmp_path / "t" / "a.png", np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(ValueError, match="is not a label image"):
        evaluate_folders(tmp_path / "p", tmp_path / "t")
