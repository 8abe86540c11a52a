from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsespec import Segmenter
from sparsespec.backbone import Backbone, TokenFeatures
from sparsespec.directions import Directions
from sparsespec.evaluation import Dataset, Example, TrueInstances, bootstrap_difference, measure
from sparsespec.evaluation import ablation as module
from sparsespec.evaluation.ablation import (
    MAX_FITTED,
    PAPER_ROWS,
    PEER_ROWS,
    STEPS,
    Ablation,
    Plan,
    Variant,
    fitted_examples,
    limited,
    minus_best,
    plans,
    run_ablation,
    true_foreground,
    true_tokens,
)
from sparsespec.evaluation.peers import segment_with_peer
from sparsespec.images import PixelSource
from sparsespec.models import resolve
from sparsespec.pipeline import Settings

PATCH = 56
BOXES = ((slice(8, 34), slice(6, 26)), (slice(14, 44), slice(40, 66)))
KEYS = ("peers", "paper", "paper-ours", "steps", "bounds", "resolution")


def fake_features(backbone: Backbone, image: Any, *, long_side: int = 448) -> TokenFeatures:
    """Tokens that know no more than the colour in their middle, a fourth of the usual number along each side."""
    pixels = image.read(0, 0, *image.shape[:2]) if isinstance(image, PixelSource) else image
    height, width = pixels.shape[:2]
    scale = long_side / max(height, width)
    grid = max(1, -(-int(height * scale) // PATCH)), max(1, -(-int(width * scale) // PATCH))
    rows, columns = ((np.arange(n) + 0.5) * PATCH / scale for n in grid)
    colours = pixels[np.ix_(rows.astype(int).clip(0, height - 1), columns.astype(int).clip(0, width - 1))]
    rng = np.random.default_rng(len(backbone.name))
    kinds = []
    for _ in range(3):
        mixed = (colours.reshape(-1, 3) / 255) @ rng.standard_normal((3, backbone.channels)) + 0.3
        kinds.append((mixed + 0.05 * rng.standard_normal(mixed.shape)).astype(np.float32))
    info = {"model": backbone.name, "provider": "none", "tiles": 1, "views": 0}
    return TokenFeatures(*kinds, grid, PATCH, (height, width), scale, info)


def picture(boxes: Sequence[tuple[slice, slice]], seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    pixels = np.full((60, 80, 3), 60.0)
    labels = np.zeros((60, 80), int)
    for number, box in enumerate(boxes, start=1):
        pixels[box] = (220, 200 - 60 * number, 40 * number)
        labels[box] = number
    return (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8), labels


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., Dataset]:
    def make(name: str, *scenes: Sequence[tuple[slice, slice]]) -> Dataset:
        examples = []
        (tmp_path / name).mkdir()
        for number, boxes in enumerate(scenes):
            pixels, labels = picture(boxes, seed=sum(map(ord, name)) + number)
            file = tmp_path / name / f"{number}.png"
            Image.fromarray(pixels).save(file)
            examples.append(Example(str(number), file, lambda labels=labels: TrueInstances.from_labels(labels)))
        return Dataset(name, examples)

    return make


@pytest.fixture
def sets(make_set: Callable[..., Dataset]) -> list[Dataset]:
    return [make_set("two", BOXES, BOXES[:1]), make_set("mixed", BOXES[1:], (), BOXES)]


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[list[TokenFeatures]]:
    """Put small networks in the place of large ones; the list has what each fit was given."""
    calls: list[list[TokenFeatures]] = []

    def fit(photographs: Sequence[TokenFeatures], *, source_sha256: str) -> Directions:
        calls.append(list(photographs))
        rng = np.random.default_rng(len(calls))
        channels = 3 * photographs[0].keys.shape[1]
        weights = rng.standard_normal(channels).astype(np.float32)
        position = rng.standard_normal((channels, 2)).astype(np.float32) / 10
        return Directions(weights, 0.0, position, np.zeros(2, np.float32), source_sha256)

    monkeypatch.setattr(Backbone, "features", fake_features)
    monkeypatch.setattr(module, "fit_directions", fit)
    return calls


def plan(**rows: Variant) -> list[Plan]:
    return [Plan("some", "Some rows", rows)]


def figures(result: Ablation, row: int = 0) -> dict[str, Any]:
    return {name: report.summary for name, report in result.tables[0].rows[row].reports.items()}


def by_hand(dataset: Dataset, segment: Callable[..., Any]) -> Any:
    def predictions() -> Iterator[Any]:
        for example in dataset:
            pixels, truth = np.asarray(Image.open(example.image)), example.load()
            labels, scores = segment(pixels, truth)
            yield example.name, labels, scores, truth

    return measure(predictions()).summary


def same(first: Any, second: Any) -> bool:
    return all(
        np.array_equal(a, b, equal_nan=True) for a, b in zip(*map(dataclasses.astuple, (first, second)), strict=True)
    )


@pytest.mark.needs("pycocotools")
def test_every_row_of_every_table_is_measured_on_every_set(
    sets: list[Dataset], fitted: list[Any], tmp_path: Path
) -> None:
    other = tmp_path / "other.onnx"
    other.symlink_to(resolve("default"))
    wanted = plans(models=(other,), long_sides=(448, 336))
    result = run_ablation(sets, wanted, draws=5)
    assert tuple(table.key for table in result.tables) == KEYS
    rows = {table.key: [row.title for row in table.rows] for table in result.tables}
    assert {"ours", "ours, told the count", "ours, learned on the other sets", *PEER_ROWS} <= set(rows["peers"])
    assert rows["paper"] == rows["paper-ours"] == list(PAPER_ROWS)
    assert set(STEPS) < set(rows["steps"])
    assert len(rows["bounds"]) == 7
    assert rows["resolution"] == ["448 pixels, embedded model", "336 pixels", "448 pixels, other.onnx"]
    for table in result.tables:
        for row in table.rows:
            assert list(row.reports) == ["two", "mixed"]
            assert [list(report.images) for report in row.reports.values()] == [["0", "1"], ["0", "1", "2"]]
            assert {"mean_iou", "ap_50"} < set(row.reports["two"].intervals)
        assert not table.rows[0].differences
        for row in table.rows[1:]:
            assert (row.differences == {}) == (row.variant == table.rows[0].variant)


@pytest.mark.needs("pycocotools")
def test_the_same_is_measured_twice(sets: list[Dataset], fitted: list[Any]) -> None:
    wanted = plan(ours=Variant(), others=Variant(directions="others"), paper=Variant("paper", told_count=True))
    first, second = (run_ablation(sets, wanted, draws=20) for _ in range(2))
    for row in range(3):
        assert all(same(a, b) for a, b in zip(figures(first, row).values(), figures(second, row).values(), strict=True))
    assert first.tables[0].rows[1].differences == second.tables[0].rows[1].differences


@pytest.mark.parametrize("name", ["tokencut", "maskcut", "paper"])
@pytest.mark.needs("pycocotools")
def test_peers_score_what_measure_says_of_them(sets: list[Dataset], fitted: list[Any], name: str) -> None:
    told = name == "paper"
    result = run_ablation(sets, plan(peer=Variant(name, told_count=told)), draws=1)
    for dataset in sets:

        def segment(pixels: np.ndarray, truth: TrueInstances) -> Any:
            tokens = Backbone().features(pixels)
            return segment_with_peer(name, tokens, pixels, n_instances=len(truth) if told else None)

        assert same(figures(result)[dataset.name], by_hand(dataset, segment))


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.needs("pycocotools")
def test_ours_scores_what_measure_says_of_the_segmenter(sets: list[Dataset], fitted: list[Any], told: bool) -> None:
    result = run_ablation(sets, plan(ours=Variant(told_count=told)), draws=1)

    def segment(pixels: np.ndarray, truth: TrueInstances) -> Any:
        if told and not len(truth):
            return np.zeros(truth.shape, int), []
        found = Segmenter(n_instances=len(truth) if told else None)(pixels)
        return found.labels, found.scores

    for dataset in sets:
        assert same(figures(result)[dataset.name], by_hand(dataset, segment))


@pytest.mark.slow
@pytest.mark.needs("pycocotools")
def test_the_embedded_model(sets: list[Dataset]) -> None:
    changed = Settings(keep=1.0, closer_margin=0.0)
    variants = plan(ours=Variant(), plain=Variant(directions="none"), changed=Variant(settings=changed))
    result = run_ablation(sets[:1], variants, draws=1)
    for row, options in enumerate(({}, {"directions": None}, {"settings": changed})):
        segmenter = Segmenter(**options)

        def segment(pixels: np.ndarray, truth: TrueInstances, segmenter: Segmenter = segmenter) -> Any:
            found = segmenter(pixels)
            return found.labels, found.scores

        assert same(figures(result, row)["two"], by_hand(sets[0], segment))


def test_directions_for_a_set_have_seen_none_of_its_images(
    sets: list[Dataset], make_set: Callable[..., Dataset], fitted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FITTED", 2)
    all_sets = [*sets, make_set("third", BOXES)]
    result = run_ablation(all_sets, plan(others=Variant(directions="others")), draws=1)
    assert result.fitted_on == {
        "two": {"mixed": 2, "third": 1},
        "mixed": {"two": 2, "third": 1},
        "third": {"two": 2, "mixed": 2},
    }
    keys = {
        dataset.name: [
            Backbone().features(np.asarray(Image.open(one.image))).keys.astype(np.float16) for one in dataset
        ]
        for dataset in all_sets
    }
    for dataset, given in zip(all_sets, fitted, strict=True):
        known = [keys[other.name][i] for other in all_sets if other is not dataset for i in (0, 1)[: len(other)]]
        assert len(given) == len(known)
        assert all(np.array_equal(one.keys, other) for one, other in zip(given, known, strict=True))
        assert not any(np.array_equal(one.keys, own) for one in given for own in keys[dataset.name])


def test_features_are_computed_once(sets: list[Dataset], fitted: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def features(backbone: Backbone, image: Any, *, long_side: int = 448) -> TokenFeatures:
        asked.append((image.tobytes(), long_side))
        return fake_features(backbone, image, long_side=long_side)

    monkeypatch.setattr(Backbone, "features", features)
    tables = plans(long_sides=(448, 336), several_sets=False)
    run_ablation(sets, tables, draws=1)
    assert len(asked) == len(set(asked))
    pictures = [np.asarray(Image.open(example.image)).tobytes() for dataset in sets for example in dataset]
    assert {(picture, side) for picture in pictures for side in (448, 336)} <= set(asked)
    assert len(asked) > 2 * len(pictures), "crops are looked at as well"


def test_large_sets_lend_photographs_in_even_steps() -> None:
    examples = [Example(str(k), Path(), lambda: TrueInstances.from_labels(np.eye(2, dtype=int))) for k in range(150)]
    chosen = fitted_examples(Dataset("large", examples))
    assert [one.name for one in chosen[:4]] == ["0", "2", "5", "7"]
    assert len(chosen) == MAX_FITTED
    assert fitted_examples(Dataset("small", examples[:5])) == examples[:5]
    assert len(limited(Dataset("large", examples), 7)) == 7
    assert len(limited(Dataset("large", examples), None)) == 150


# The truth on the token grid


def tokens_of(shape: tuple[int, int], grid: tuple[int, int], scale: float = 1.0, patch: int = 4) -> TokenFeatures:
    features = np.ones((grid[0] * grid[1], 3), np.float32)
    return TokenFeatures(features, features, features, grid, patch, shape, scale, {})


def test_a_token_belongs_to_what_holds_most_of_it() -> None:
    labels = np.zeros((8, 8), int)
    labels[:4, :3] = 5  # three quarters of a token
    labels[:4, 4:6] = 7  # half of one: the background has as much
    labels[4:, 4:] = 7
    labels[6:, 4:] = 9  # half of the last token
    truth = TrueInstances.from_labels(labels)
    assert true_tokens(truth, tokens_of((8, 8), (2, 2))).tolist() == [1, 0, 0, 2]
    assert true_foreground(truth, tokens_of((8, 8), (2, 2))).tolist() == [True, False, False, True]


def test_several_instances_together_can_be_most_of_a_token() -> None:
    labels = np.zeros((4, 5), int)
    labels[:, 0], labels[:, 1], labels[:, 2] = 1, 2, 3
    truth = TrueInstances.from_labels(labels)
    tokens = tokens_of((4, 5), (1, 1), scale=0.8)
    assert true_tokens(truth, tokens).tolist() == [0]
    assert true_foreground(truth, tokens).tolist() == [True]


def test_void_and_crowds_don_t_count() -> None:
    masks = np.zeros((2, 4, 8), bool)
    masks[0, :, :4], masks[1, :, 4:] = True, True
    void = np.zeros((4, 8), bool)
    void[:, 1:4] = True
    truth = TrueInstances(masks, np.array([False, True]), void)
    assert true_tokens(truth, tokens_of((4, 8), (1, 2))).tolist() == [1, 0]
    assert true_foreground(truth, tokens_of((4, 8), (1, 2))).tolist() == [True, False]


def test_tokens_reach_beyond_the_image() -> None:
    labels = np.zeros((6, 6), int)
    labels[4:, 4:] = 1
    assert true_tokens(TrueInstances.from_labels(labels), tokens_of((6, 6), (2, 2))).tolist() == [0, 0, 0, 1]


def test_true_tokens_are_right_where_objects_are_made_of_tokens(
    make_set: Callable[..., Dataset], fitted: list[Any]
) -> None:
    # A token of the fake network is 10 pixels wide.
    dataset = make_set("whole", ((slice(10, 30), slice(10, 40)), (slice(30, 50), slice(40, 70))))
    rows = plan(
        truth=Variant("truth", refined=False),
        both=Variant(told_foreground=True, told_count=True, refined=False, settings=Settings(closer_margin=0.0)),
        choice=Variant("candidates"),
        plain=Variant(settings=Settings(closer_margin=0.0)),
    )
    result = run_ablation([dataset], rows, draws=1)
    assert figures(result)["whole"].mean_iou == 1
    assert figures(result, 1)["whole"].foreground_f == 1
    assert figures(result, 1)["whole"].count_error == 0
    assert figures(result, 2)["whole"].mean_iou >= figures(result, 3)["whole"].mean_iou


def test_the_best_choice_takes_each_candidate_once_and_makes_them_disjoint() -> None:
    truth = np.array([1, 1, 1, 2, 2, 0, 0])
    candidates = np.array(
        [[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1]], bool
    )
    masks, scores = module._best_choice(candidates, truth)
    # Both fit as well as each other, but only the second can be had with the other.
    assert masks.astype(int).tolist() == [[0, 0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]]
    np.testing.assert_allclose(scores, [2 / 3, 2 / 3])
    masks, scores = module._best_choice(candidates[:0], truth)
    assert masks.shape == (0, 7)
    assert scores.size == 0


def test_nothing_is_found_where_there_is_nothing_and_the_count_is_told(
    make_set: Callable[..., Dataset], fitted: list[Any]
) -> None:
    rows = {name: Variant(name, told_count=True) for name in ("ours", "paper", "maskcut", "truth")}
    result = run_ablation([make_set("empty", ())], plan(**rows), draws=1)
    for row in range(len(rows)):
        assert figures(result, row)["empty"].n_predicted == 0
        assert figures(result, row)["empty"].foreground_f == 1


# Differences


def test_differences_are_paired(sets: list[Dataset], fitted: list[Any]) -> None:
    rows = {"ours": Variant(), **PEER_ROWS}
    result = run_ablation(sets, [Plan("peers", "Peers", rows)], draws=50)
    table = result.tables[0]
    images = {row.title: list(row.reports["two"].images.values()) for row in table.rows}
    expected = bootstrap_difference(images["TokenCut"], images["ours"], "f1_50", n=50)
    assert table.rows[1].differences["two"]["f1_50"] == expected
    best = minus_best(table, "ours", list(PEER_ROWS), ("mean_iou", "ap_50"), draws=50)
    for name in ("two", "mixed"):
        values = {peer: row.reports[name].summary.mean_iou for peer, row in zip(rows, table.rows, strict=True)}
        peer, interval = best[name]["mean_iou"]
        assert values[peer] == max(values[one] for one in PEER_ROWS)
        assert interval.value == pytest.approx(values["ours"] - values[peer])


def test_average_precision_can_be_left_out(sets: list[Dataset], fitted: list[Any]) -> None:
    result = run_ablation(sets, [Plan("peers", "", {"ours": Variant(), **PEER_ROWS})], average_precision=False, draws=1)
    assert figures(result)["two"].ap_50 is None
    assert "pip install 'sparsespec[eval]'" in result.notes[0]
    best = minus_best(result.tables[0], "ours", list(PEER_ROWS), ("ap_50", "f1_50"), draws=1)
    assert list(best["two"]) == ["f1_50"]


# Bad input


def test_what_can_t_be_measured_is_named(make_set: Callable[..., Dataset], fitted: list[Any], tmp_path: Path) -> None:
    dataset = make_set("one", BOXES)
    with pytest.raises(ValueError, match="sets is empty"):
        run_ablation([], plan(ours=Variant()))
    with pytest.raises(ValueError, match="two sets are called 'one'"):
        run_ablation([dataset, dataset], plan(ours=Variant()))
    with pytest.raises(ValueError, match="the set 'none' holds no image"):
        run_ablation([Dataset("none", [])], plan(ours=Variant()))
    with pytest.raises(ValueError, match="at least two sets"):
        run_ablation([dataset], plan(ours=Variant(directions="others")))
    wrong = Example("a/x", dataset.examples[0].image, lambda: TrueInstances.from_labels(np.eye(7, 9, dtype=int)))
    with pytest.raises(ValueError, match=r"the truth of 'a/x' is 9 x 7 pixels, and the image '.*0.png' is 80 x 60"):
        run_ablation([Dataset("wrong", [wrong])], plan(ours=Variant()))
    gone = dataclasses.replace(dataset.examples[0], image=tmp_path / "gone.jpg")
    with pytest.raises(ValueError, match=r"gone\.jpg"):
        run_ablation([Dataset("gone", [gone])], plan(ours=Variant()))
    with pytest.raises(ValueError, match="method must be one of 'ours'"):
        Variant("cutler")
    with pytest.raises(ValueError, match="directions must be one of 'default'"):
        Variant(directions="mine")


def test_without_other_sets_nothing_is_learned_on_them() -> None:
    rows = plans(several_sets=False)[0].rows
    assert not any(variant.directions == "others" for variant in rows.values())
    assert any(variant.directions == "others" for variant in plans()[0].rows.values())
