from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from sparsespec.evaluation import TrueInstances, iou_matrix, score_image, summarise


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


def _plain(predicted: np.ndarray, truth: TrueInstances) -> dict[str, float]:
    """Every number of an image by sets of pixels and all assignments."""
    judged = {(y, x) for y, x in np.argwhere(np.ones(truth.shape)) if truth.void is None or not truth.void[y, x]}

    def pixels(mask: np.ndarray) -> set[tuple[int, int]]:
        return {(y, x) for y, x in np.argwhere(mask)} & judged

    found = [found for value in np.unique(predicted) if value and (found := pixels(predicted == value))]
    all_true = [(pixels(mask), crowd) for mask, crowd in zip(truth.masks, truth.crowd, strict=True)]
    true = [mask for mask, crowd in all_true if mask and not crowd]
    crowds = set().union(*(mask for mask, crowd in all_true if crowd))
    true_foreground = set().union(*true)
    crowds -= true_foreground
    iou = np.array([[len(a & b) / len(a | b) for b in true] for a in found]).reshape(len(found), len(true))
    padded = np.zeros((max(len(found), len(true), 1),) * 2)
    padded[: len(found), : len(true)] = iou
    options = list(itertools.permutations(range(len(padded))))
    sums = [sum(padded[row, column] for row, column in enumerate(option)) for option in options]
    hits = [[row for row, column in enumerate(option) if padded[row, column] >= 0.5] for option in options]
    best = max(hits, key=len)
    excused = [i for i, mask in enumerate(found) if i not in best and len(mask & crowds) > len(mask) / 2]
    foreground = set().union(*found) - crowds
    return {
        "n_predicted": len(found) - len(excused),
        "n_true": len(true),
        "matched_iou": max(sums),
        "matches_50": len(best),
        "foreground_predicted": len(foreground),
        "foreground_true": len(true_foreground),
        "foreground_both": len(foreground & true_foreground),
        "n_in_crowd": len(excused),
    }


def _boxes(rng: np.random.Generator) -> tuple[np.ndarray, TrueInstances]:
    height, width = 14, 18
    masks = np.zeros((int(rng.integers(0, 5)), height, width), bool)
    predicted = np.zeros((height, width), int)
    for number, mask in enumerate(masks, start=1):
        top, left, tall, wide = rng.integers([0, 0, 0, 1], [9, 12, 6, 7])
        mask[top : top + tall, left : left + wide] = True
        if rng.random() < 0.7:
            predicted[top : top + tall, left + 1 : left + wide] = number
    for number in range(5, 5 + rng.integers(0, 2)):
        top, left = rng.integers(0, 12, 2)
        predicted[top : top + 3, left : left + 4] = number
    void = rng.random((height, width)) < 0.3 if rng.random() < 0.5 else None
    return predicted, TrueInstances(masks, rng.random(len(masks)) < 0.3, void)


@pytest.mark.parametrize("seed", range(60))
def test_scores_are_the_plain_ones(seed: int) -> None:
    predicted, truth = _boxes(np.random.default_rng(seed))
    ours = score_image(predicted, truth).to_dict()
    for name, value in _plain(predicted, truth).items():
        assert ours[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.needs("pycocotools")
@pytest.mark.parametrize("seed", range(10))
def test_a_label_image_and_its_masks_score_the_same(seed: int) -> None:
    rng = np.random.default_rng(seed)
    predicted, truth = rng.integers(0, 5, (2, 9, 11))
    first = score_image(predicted, truth, rng.random(4), ranking=True)
    second = score_image(predicted, TrueInstances.from_labels(truth), np.zeros(4), ranking=True)
    assert first == second
    assert summarise([first]).ar_100 == summarise([second]).ar_100


def test_foreground_measures_from_their_definitions() -> None:
    score = score_image(np.array([[1, 1, 2, 0, 0]]), np.array([[0, 3, 3, 3, 0]]))
    assert score.foreground_precision == pytest.approx(2 / 3)
    assert score.foreground_recall == pytest.approx(2 / 3)
    assert score.foreground_f == pytest.approx(2 / 3)
    assert score.foreground_iou == pytest.approx(2 / 4)
    shares = score.foreground_precision, score.foreground_recall
    assert score.foreground_f == pytest.approx(2 / (1 / shares[0] + 1 / shares[1]))


def test_foregrounds_that_are_not_there() -> None:
    one, none = np.array([[1, 0]]), np.array([[0, 0]])
    for predicted, truth, value in ((none, none, 1), (one, none, 0), (none, one, 0), (np.fliplr(one), one, 0)):
        score = score_image(predicted, truth)
        assert (score.foreground_f, score.foreground_iou) == (value, value)


def test_overlapping_truth_is_compared_mask_by_mask() -> None:
    # A ball in front of a player: as label images, one of the two would lose pixels.
    player, ball = np.zeros((2, 6, 6), bool)
    player[0:6, 1:5] = True
    ball[4:6, 3:6] = True
    truth = TrueInstances(np.stack([player, ball]), np.zeros(2, bool))
    score = score_image(player.astype(int), truth)
    assert score.matched_iou == pytest.approx(1)
    assert (score.n_true, score.matches_50) == (2, 1)
    assert score.foreground_true == np.count_nonzero(player | ball)


@pytest.mark.needs("pycocotools")
def test_void_pixels_count_for_nothing() -> None:
    labels = np.array([[1, 1, 2, 2, 3]])
    truth = np.array([[7, 0, 0, 8, 9]])
    void = np.array([[False, True, False, False, True]])
    score = score_image(labels, TrueInstances.from_labels(truth, void))
    # The third of each side lies in void altogether: it is not there.
    assert (score.n_predicted, score.n_true) == (2, 2)
    assert score.matched_iou == pytest.approx(1 + 1 / 2)
    assert (score.foreground_predicted, score.foreground_true, score.foreground_both) == (3, 2, 2)
    everything = score_image(labels, TrueInstances.from_labels(truth, np.ones((1, 5), bool)), ranking=True)
    assert (everything.n_predicted, everything.n_true, everything.foreground_f) == (0, 0, 1)


def test_what_lies_in_a_crowd_is_not_wrong() -> None:
    masks = np.zeros((2, 1, 10), bool)
    masks[0, 0, :2] = True
    masks[1, 0, 4:8] = True
    truth = TrueInstances(masks, np.array([False, True]))
    labels = np.array([[1, 1, 0, 0, 2, 2, 3, 3, 3, 3]])  # the last lies with half of it in the crowd: not mostly
    score = score_image(labels, truth)
    assert (score.n_true, score.n_predicted, score.n_in_crowd) == (1, 2, 1)
    assert (score.foreground_predicted, score.foreground_true, score.foreground_both) == (4, 2, 2)
    assert score_image(np.array([[1, 1, 0, 0, 2, 2, 2, 2, 2, 0]]), truth).n_in_crowd == 1


def test_what_matches_counts_although_it_lies_in_a_crowd() -> None:
    masks = np.ones((2, 1, 4), bool)
    score = score_image(np.ones((1, 4), int), TrueInstances(masks, np.array([False, True])))
    assert (score.n_predicted, score.n_true, score.matches_50, score.n_in_crowd) == (1, 1, 1, 0)


@pytest.mark.needs("pycocotools")
def test_empty_masks_among_true_ones() -> None:
    masks = np.zeros((3, 2, 2), bool)
    masks[1] = True
    truth = TrueInstances(masks, np.array([False, False, True]))
    score = score_image(np.ones((2, 2), int), truth, ranking=True)
    assert (score.n_true, score.mean_iou) == (1, 1)
    assert summarise([score]).ap == pytest.approx(1)


@pytest.mark.needs("pycocotools")
@pytest.mark.parametrize("predicted", [0, 1])
@pytest.mark.parametrize("true", [0, 1])
def test_images_of_one_pixel(predicted: int, true: int) -> None:
    truth = TrueInstances.from_labels(np.array([[true]]))
    score = score_image(np.array([[predicted]]), truth, ranking=True)
    assert (score.n_predicted, score.n_true) == (predicted, true)
    assert score.matched_iou == predicted * true
    assert score.foreground_f == score.foreground_iou == (predicted == true)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint64, np.int16, np.int64])
def test_label_images_of_any_integer_type(dtype: type) -> None:
    labels = np.array([[0, 1], [1, 1]]).astype(dtype)
    assert score_image(labels, TrueInstances.from_labels(labels)).mean_iou == 1
    assert score_image(labels, labels).mean_iou == 1


def test_labels_that_are_large_or_negative() -> None:
    labels = np.array([[0, -5, 70_000, 10**12]])
    assert score_image(labels, labels).matched_iou == 3
    assert score_image(labels, TrueInstances.from_labels(labels)).matched_iou == 3
    no_background = np.array([[-5, 70_000]])
    assert score_image(no_background, TrueInstances.from_labels(no_background)).matched_iou == 2


def test_scores_must_fit_the_labels() -> None:
    labels = np.array([[0, 1, 3]])
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2, the number of scores; got 1\.\.3"):
        score_image(labels, labels, [0.5, 0.5])
    with pytest.raises(ValueError, match="labels must lie in"):
        score_image(-labels, labels, [0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="scores must be finite"):
        score_image(labels, labels, [0.5, np.nan, 1])
    with pytest.raises(ValueError, match=r"scores must .*shape \(1, 3\)"):
        score_image(labels, labels, [[0.5, 0.5, 1]])


def test_shapes_of_masks_must_agree() -> None:
    with pytest.raises(ValueError, match=r"one shape.*\(2, 2\).*\(2, 3\)"):
        score_image(np.zeros((2, 2), int), TrueInstances.from_labels(np.zeros((2, 3), int)))
    with pytest.raises(ValueError, match="one shape"):
        score_image(np.zeros(4, int), np.zeros(4, int))


def test_false_on_empty() -> None:
    one, none = np.array([[1, 0]]), np.array([[0, 0]])
    assert math.isnan(summarise([score_image(one, one)]).false_on_empty)
    scores = [score_image(one, one), score_image(one, none), score_image(none, none), score_image(none, none)]
    total = summarise(scores)
    assert total.false_on_empty == pytest.approx(1 / 3)
    assert total.n_empty == 3
    assert total.mean_iou == 1


def test_a_set_with_nothing_in_it() -> None:
    none = np.zeros((2, 2), int)
    total = summarise([score_image(none, none)])
    assert math.isnan(total.mean_iou)
    assert (total.f1_50, total.foreground_f, total.foreground_iou, total.count_error) == (1, 1, 1, 0)
    assert total.false_on_empty == 0


@pytest.mark.parametrize("seed", range(3))
def test_set_measures_are_the_plain_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [_plain(*pair) for pair in (_boxes(rng) for _ in range(15))]
    rng = np.random.default_rng(seed)
    total = summarise([score_image(*_boxes(rng)) for _ in range(15)])
    both, predicted, true = (
        np.array([row[f"foreground_{kind}"] for row in rows]) for kind in ("both", "predicted", "true")
    )
    f = [2 * b / (p + t) if p + t else 1 for b, p, t in zip(both, predicted, true, strict=True)]
    iou = [b / (p + t - b) if p + t else 1 for b, p, t in zip(both, predicted, true, strict=True)]
    n_predicted, n_true = sum(row["n_predicted"] for row in rows), sum(row["n_true"] for row in rows)
    assert total.mean_iou == pytest.approx(np.mean([r["matched_iou"] / r["n_true"] for r in rows if r["n_true"]]))
    assert total.f1_50 == pytest.approx(2 * sum(row["matches_50"] for row in rows) / (n_predicted + n_true))
    assert total.foreground_f == pytest.approx(np.mean(f))
    assert total.foreground_iou == pytest.approx(np.mean(iou))
    assert total.count_error == pytest.approx(np.mean([abs(r["n_predicted"] - r["n_true"]) for r in rows]))
    assert total.false_on_empty == pytest.approx(np.mean([r["n_predicted"] > 0 for r in rows if not r["n_true"]]))
