from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from sparsespec.evaluation import (
    MEASURES,
    ImageScore,
    bootstrap,
    bootstrap_all,
    bootstrap_difference,
    score_image,
    summarise,
)


def noisy_scores(seed: int, *, images: int = 14, flips: float = 0.2) -> list[ImageScore]:
    """Label images that are partly wrong, every third of them of nothing, and half of those right."""
    rng = np.random.default_rng(seed)
    scores = []
    for number in range(images):
        truth = np.repeat(rng.integers(0, 4, 12), 5)[None] * (number % 3 > 0)
        wrong = rng.random(truth.shape) < flips * rng.random() * (number % 6 > 0)
        labels = np.where(wrong, rng.integers(0, 4, truth.shape), truth)
        scores.append(score_image(labels, truth, rng.random(3), ranking=True))
    return scores


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.needs("pycocotools")
def test_a_named_measure_is_the_measure_of_drawn_images(name: str) -> None:
    scores = noisy_scores(0)

    def plain(drawn: Sequence[ImageScore]) -> float:
        return float(getattr(summarise(drawn), name))

    named, by_hand = (bootstrap(scores, statistic, n=40, seed=3) for statistic in (name, plain))
    assert named.value == pytest.approx(by_hand.value, abs=1e-12)
    assert (named.low, named.high) == pytest.approx((by_hand.low, by_hand.high), abs=1e-12)
    assert named.low <= named.value <= named.high
    assert named.low < named.high
    together = bootstrap_all(scores, n=40, seed=3)
    assert list(together) == list(MEASURES)
    assert together[name] == named


@pytest.mark.needs("pycocotools")
def test_ends_are_the_percentiles_of_the_draws() -> None:
    scores = noisy_scores(1)
    rng = np.random.default_rng(11)
    drawn = []
    for _ in range(200):
        pick = rng.integers(0, len(scores), len(scores))
        drawn.append(np.mean([scores[i].foreground_f for i in pick]))
    interval = bootstrap(scores, "foreground_f", n=200, level=0.8, seed=11)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.percentile(drawn, [10, 90])))


def test_of_a_mean_it_is_the_textbook_interval() -> None:
    rng = np.random.default_rng(0)
    labels = np.ones((1, 100), int)
    scores = [score_image(np.where(np.arange(100) < k, 1, 0)[None], labels) for k in rng.integers(20, 100, 400)]
    values = np.array([score.mean_iou for score in scores])
    error = values.std() / math.sqrt(len(values))
    interval = bootstrap(scores, "mean_iou", n=2000)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


@pytest.mark.needs("pycocotools")
def test_the_seed_decides() -> None:
    scores = noisy_scores(2)
    assert bootstrap(scores, "ap", n=20, seed=1) == bootstrap(scores, "ap", n=20, seed=1)
    assert bootstrap(scores, "ap", n=20, seed=1) != bootstrap(scores, "ap", n=20, seed=2)


def test_one_image_and_measures_without_meaning() -> None:
    truth = np.array([[1, 2]])
    one = [score_image(truth, truth)]
    interval = bootstrap(one, "f1_50", n=5)
    assert (interval.value, interval.low, interval.high) == (1, 1, 1)
    nothing = bootstrap(one, "false_on_empty", n=5)
    assert math.isnan(nothing.value)
    assert math.isnan(nothing.low)
    assert math.isnan(nothing.high)


def test_draws_without_the_image_that_matters_are_left_out() -> None:
    truth, none = np.array([[1, 2]]), np.array([[0, 0]])
    scores = [score_image(truth, none), score_image(truth, truth)]
    # One draw in four has no empty image.
    assert bootstrap(scores, "false_on_empty", n=50).low == 1


@pytest.mark.needs("pycocotools")
def test_paired_differences() -> None:
    worse, better = noisy_scores(4, flips=0.8), noisy_scores(4, flips=0.1)
    same = bootstrap_difference(better, better, "mean_iou", n=30)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    gain = bootstrap_difference(better, worse, "mean_iou", n=200)
    assert gain.value == pytest.approx(summarise(better).mean_iou - summarise(worse).mean_iou)
    assert 0 < gain.low < gain.value < gain.high


def test_pairing_takes_out_what_both_have_in_common() -> None:
    rng = np.random.default_rng(0)
    truth = np.ones((1, 200), int)

    def cut(pixels: int) -> ImageScore:
        return score_image((np.arange(200) < pixels).astype(int)[None], truth)

    sizes = rng.integers(20, 180, 60)
    first, second = [cut(k + 10) for k in sizes], [cut(k) for k in sizes]
    paired = bootstrap_difference(first, second, "mean_iou", n=100)
    assert (paired.low, paired.high) == pytest.approx((0.05, 0.05))
    alone = bootstrap(first, "mean_iou", n=100)
    assert alone.high - alone.low > 0.05


@pytest.mark.needs("pycocotools")
def test_a_function_can_be_the_statistic() -> None:
    scores = noisy_scores(5)
    interval = bootstrap(scores, lambda drawn: max(s.n_true for s in drawn), n=10)
    assert interval.value == 3
    difference = bootstrap_difference(scores, scores[::-1], lambda drawn: drawn[0].n_true, n=10)
    assert difference.value == scores[0].n_true - scores[-1].n_true


@pytest.mark.needs("pycocotools")
def test_wrong_arguments() -> None:
    scores = noisy_scores(6, images=3)
    unranked = [score_image(np.ones((1, 1), int), np.ones((1, 1), int))]
    with pytest.raises(ValueError, match="scores is empty"):
        bootstrap([], "ap")
    with pytest.raises(ValueError, match="scores is empty"):
        bootstrap_all([])
    with pytest.raises(ValueError, match=r"one of mean_iou, f1_50, foreground_f, .* not 'ap'"):
        bootstrap(unranked, "ap")
    assert "ap" not in bootstrap_all(unranked, n=2)
    with pytest.raises(ValueError, match="not 'iou'"):
        bootstrap(scores, "iou")
    with pytest.raises(ValueError, match="n must be an integer of at least 1, not 0"):
        bootstrap(scores, "ap", n=0)
    with pytest.raises(ValueError, match="n must be an integer"):
        bootstrap(scores, "ap", n=2.5)  # type: ignore[arg-type]
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match=f"level must lie between 0 and 1, not {level}"):
            bootstrap(scores, "ap", level=level)
    with pytest.raises(ValueError, match="hold 3 and 2 scores"):
        bootstrap_difference(scores, scores[:2], "ap")
