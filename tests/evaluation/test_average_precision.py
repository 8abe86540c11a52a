from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sparsespec.evaluation import MissingPackageError, TrueInstances, score_image, summarise
from sparsespec.evaluation.average_precision import THRESHOLDS, AveragePrecision, ImageRanking, Rankings, rank_image

Scene = tuple[np.ndarray, np.ndarray, TrueInstances]


def scene(rng: np.random.Generator, *, ties: bool = False) -> Scene:
    """A picture of boxes with predictions that are shifted copies of some of them, and some that are nowhere near."""
    height, width = 40, 56
    n_true = int(rng.integers(0, 6))
    masks = np.zeros((n_true, height, width), bool)
    labels = np.zeros((height, width), np.int64)
    number = 0
    for mask in masks:
        top, left, tall, wide = (int(v) for v in rng.integers([0, 0, 4, 4], [30, 44, 14, 16]))
        mask[top : top + tall, left : left + wide] = True
        if rng.random() < 0.8:
            number += 1
            down, right = rng.integers(0, 3, 2)
            labels[top + down : top + tall, left + right : left + wide] = number
    for _ in range(int(rng.integers(0, 3))):
        number += 1
        top, left = rng.integers(0, 30, 2)
        labels[top : top + 6, left : left + 6] = number
    scores = np.round(rng.random(number), 1) if ties else rng.random(number)
    crowd = rng.random(n_true) < 0.25
    void = rng.random((height, width)) < 0.05 if rng.random() < 0.5 else None
    return labels, scores, TrueInstances(masks, crowd, void)


def coco_itself(scenes: Sequence[Scene], capsys: pytest.CaptureFixture[str]) -> tuple[float, ...]:
    """The four measures as pycocotools takes them, from files of the usual form to its own summary."""
    from pycocotools import mask as codec
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def encode(mask: np.ndarray) -> dict[str, Any]:
        return codec.encode(np.asfortranarray(mask.astype(np.uint8)))

    images, true, found = [], [], []
    for image_id, (labels, scores, truth) in enumerate(scenes, start=1):
        judged = np.ones(truth.shape, bool) if truth.void is None else ~truth.void
        images.append({"id": image_id, "height": truth.shape[0], "width": truth.shape[1]})
        for mask, crowd in zip(truth.masks, truth.crowd, strict=True):
            if (mask & judged).any():
                rle = encode(mask & judged)
                true.append(
                    {
                        "id": len(true) + 1,
                        "image_id": image_id,
                        "category_id": 1,
                        "segmentation": rle,
                        "area": float(codec.area(rle)),
                        "iscrowd": int(crowd),
                    }
                )
        for label, score in enumerate(scores, start=1):
            mask = (labels == label) & judged
            if mask.any():
                found.append({"image_id": image_id, "category_id": 1, "segmentation": encode(mask), "score": score})
    coco = COCO()
    coco.dataset = {"images": images, "annotations": true, "categories": [{"id": 1, "name": "object"}]}
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(found), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    ap, ap_50, ap_75 = evaluation.stats[:3]
    return ap, ap_50, ap_75, evaluation.stats[8]


def rankings(scenes: Sequence[Scene]) -> Rankings:
    scores = [score_image(labels, truth, scores, ranking=True) for labels, scores, truth in scenes]
    return Rankings([score.ranking for score in scores if score.ranking is not None])


def four(measures: AveragePrecision) -> tuple[float, ...]:
    return measures.ap, measures.ap_50, measures.ap_75, measures.ar_100


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.needs("pycocotools")
def test_the_numbers_are_those_of_pycocotools(seed: int, ties: bool, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(seed)
    scenes = [scene(rng, ties=ties) for _ in range(12)]
    ours = four(rankings(scenes).average_precision())
    assert 0.05 < ours[0] < 0.95
    np.testing.assert_allclose(ours, coco_itself(scenes, capsys), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.needs("pycocotools")
def test_images_that_are_drawn_more_than_once(ties: bool, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(5)
    scenes = [scene(rng, ties=ties) for _ in range(9)]
    together = rankings(scenes)
    for _ in range(5):
        pick = rng.integers(0, 9, 9)
        again = [scenes[i] for i in np.sort(pick)]
        np.testing.assert_allclose(
            four(together.average_precision(pick)), coco_itself(again, capsys), rtol=0, atol=1e-12
        )


@pytest.mark.needs("pycocotools")
def test_only_the_hundred_best_of_an_image_count(capsys: pytest.CaptureFixture[str]) -> None:
    # 120 objects of one column each; the 20 that are outlined exactly have the lowest scores.
    truth = np.repeat(np.arange(1, 121), 2)[None].repeat(3, axis=0)
    labels = truth.copy()
    labels[:, 0:200:2] = 0
    scores = np.linspace(1, 0.1, 120)
    scenes = [(labels, scores, TrueInstances.from_labels(truth))]
    ours = four(rankings(scenes).average_precision())
    np.testing.assert_allclose(ours, coco_itself(scenes, capsys), rtol=0, atol=1e-12)
    assert ours[3] == pytest.approx(100 / 120 / 10)


def by_definition(images: Sequence[tuple[np.ndarray, np.ndarray]], threshold: float) -> float:
    """AP from IoU matrices and scores, by loops: greedy matching, then precision at 101 recalls."""
    n_true = sum(iou.shape[1] for _, iou in images)
    entries = []
    for scores, iou in images:
        free = set(range(iou.shape[1]))
        for rank in sorted(range(len(scores)), key=lambda i: -scores[i]):
            best = max(free, key=lambda column: iou[rank, column], default=None)
            hit = best is not None and iou[rank, best] >= threshold
            if hit:
                free.remove(best)
            entries.append((-scores[rank], hit))
    entries.sort(key=lambda entry: entry[0])
    points, right = [], 0
    for position, (_, hit) in enumerate(entries, start=1):
        right += hit
        points.append((right / n_true, right / position))
    return float(np.mean([max((p for r, p in points if r >= level), default=0) for level in np.linspace(0, 1, 101)]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.needs("pycocotools")
def test_the_numbers_follow_from_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, ranked = [], []
    for _ in range(6):
        p, t = rng.integers(0, 5), rng.integers(1, 5)
        areas, true_areas = rng.integers(50, 60, p), rng.integers(50, 60, t)
        shared = rng.integers(10, 50, (p, t))
        scores = rng.random(p)
        images.append((scores, shared / (areas[:, None] + true_areas - shared)))
        ranked.append(rank_image(shared, areas, true_areas, np.zeros(t, bool), scores))
    ours = Rankings(ranked).average_precision()
    each = [by_definition(images, threshold) for threshold in THRESHOLDS]
    assert ours.ap_50 == pytest.approx(each[0], abs=1e-12)
    assert ours.ap_75 == pytest.approx(each[5], abs=1e-12)
    assert ours.ap == pytest.approx(np.mean(each), abs=1e-12)


@pytest.mark.needs("pycocotools")
def test_perfect_and_nothing() -> None:
    truth = np.array([[1, 0, 2]])
    nothing = np.zeros_like(truth)
    perfect = summarise([score_image(truth, truth, ranking=True)])
    assert (perfect.ap, perfect.ap_50, perfect.ap_75, perfect.ar_100) == pytest.approx((1, 1, 1, 1))
    missed = summarise([score_image(nothing, truth, ranking=True)])
    assert (missed.ap, missed.ap_50, missed.ap_75, missed.ar_100) == (0, 0, 0, 0)
    for labels in (truth, nothing):
        without = summarise([score_image(labels, nothing, ranking=True)])
        assert without.ap is not None
        assert math.isnan(without.ap)
        assert without.ar_100 is not None
        assert math.isnan(without.ar_100)


@pytest.mark.needs("pycocotools")
def test_the_order_of_the_scores_matters() -> None:
    truth = np.array([[1, 1, 0, 0]])
    labels = np.array([[1, 1, 0, 2]])
    good = score_image(labels, truth, [0.9, 0.1], ranking=True)
    bad = score_image(labels, truth, [0.1, 0.9], ranking=True)
    assert summarise([good]).ap_50 == pytest.approx(1)
    assert summarise([bad]).ap_50 == pytest.approx(0.5)


@pytest.mark.needs("pycocotools")
def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    summarise([score_image(np.eye(3, dtype=int), np.eye(3, dtype=int), ranking=True)])
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_without_pycocotools_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    labels = np.ones((2, 2), int)
    with pytest.raises(MissingPackageError, match=r"pip install 'sparsespec\[eval\]'"):
        score_image(labels, labels, ranking=True)
    assert summarise([score_image(labels, labels)]).ap is None


@pytest.mark.needs("pycocotools")
def test_a_set_in_which_one_image_was_not_ranked_has_none() -> None:
    labels = np.ones((2, 2), int)
    assert summarise([score_image(labels, labels, ranking=True), score_image(labels, labels)]).ap is None


def test_rankings_of_no_image() -> None:
    assert math.isnan(Rankings([]).average_precision().ap)
    empty = ImageRanking(np.zeros(0), np.zeros((10, 0), bool), np.zeros((10, 0), bool), 2)
    assert Rankings([empty]).average_precision() == AveragePrecision(0, 0, 0, 0)
