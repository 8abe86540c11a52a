from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from skimage import data

from sparsespec.backbone import Backbone
from sparsespec.explanation import Explanation, explain
from sparsespec.explanation import trace as module
from sparsespec.explanation.texts import of_stage, summary
from sparsespec.pipeline import Segmenter, Settings, likely_overlap

from .conftest import SIDE

# Plain versions of what is shown


def plain_entropy(features: np.ndarray) -> np.ndarray:
    n, c = features.shape
    shares = np.array([np.histogram(f, 30)[0] + 1e-6 for f in features.T]) / (n * c)
    return -(shares * np.log2(shares)).sum(axis=1)


def plain_boc(u: np.ndarray, v: np.ndarray) -> float:
    apart = np.abs(u - v)
    return (1 + apart.max()) / (1 + apart.sum() / np.abs(u + v).sum())


def plain_laplacian(weights: Any) -> np.ndarray:
    dense = weights.toarray()
    scale = 1 / np.sqrt(dense.sum(axis=1))
    return np.eye(len(dense)) - dense * scale[:, None] * scale


# The result


def test_the_result_is_that_of_the_segmenter(segmenter: Segmenter, made: Explanation, astronaut: np.ndarray) -> None:
    result = segmenter(astronaut)
    assert made.result.labels.tobytes() == result.labels.tobytes()
    assert made.result.scores.tobytes() == result.scores.tobytes()
    assert np.array_equal(made.after, result.labels)
    assert np.array_equal(made.photograph, astronaut)
    assert list(made.grid) == result.info["grid"]
    assert list(made.extent) == result.info["extent"]


def test_a_large_photograph_is_reduced(segmenter: Segmenter, astronaut: np.ndarray) -> None:
    made = explain(segmenter, astronaut, max_side=100)
    assert made.photograph.shape == (100, 100, 3)
    assert made.before.shape == made.after.shape == (100, 100)
    assert made.result.labels.shape == astronaut.shape[:2]
    assert set(np.unique(made.after)) <= set(range(len(made.result) + 1))


# Channels


def test_entropy_deviation_and_what_is_kept_are_those_of_plain_numpy(
    backbone: Backbone, made: Explanation, astronaut: np.ndarray
) -> None:
    tokens = backbone.features(astronaut, long_side=SIDE)
    assert [choice.name for choice in made.channels] == ["keys", "queries", "values"]
    for choice, reduced in zip(made.channels, made.similarity.features, strict=True):
        features = getattr(tokens, choice.name).astype(np.float64)
        np.testing.assert_allclose(choice.entropy, plain_entropy(features), rtol=1e-4)
        assert choice.quiet.sum() == features.shape[1] // 3
        assert choice.entropy[choice.quiet].max() <= choice.entropy[~choice.quiet].min()
        unit = features / np.linalg.norm(features[:, choice.quiet], axis=1, keepdims=True)
        np.testing.assert_allclose(choice.deviation, unit.std(axis=0, ddof=1), rtol=1e-4)
        assert choice.kept.sum() == 60
        dropped = choice.quiet & ~choice.kept
        assert choice.deviation[choice.kept].min() >= choice.deviation[dropped].max()
        assert not choice.kept[~choice.quiet].any()
        # The graph was made of these and no others.
        assert sorted(reduced.sum(axis=0)) == pytest.approx(sorted(unit[:, choice.kept].sum(axis=0)), rel=1e-4)


def test_other_channels_than_those_used_are_not_shown(
    segmenter: Segmenter, astronaut: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another(features: np.ndarray, keep: int) -> np.ndarray:
        return np.arange(keep)

    monkeypatch.setattr(module.channels, "deviation_channel_reduction", another)
    with pytest.raises(RuntimeError, match="the channels of the keys that are shown are not those that were used"):
        explain(segmenter, astronaut)


# Affinity


def test_a_row_is_the_mean_boc_of_the_three_kinds(made: Explanation) -> None:
    token = made.typical_token()
    row = made.similarity.row(token)
    for other in (0, 17, token, 255):
        wanted = np.mean(
            [
                plain_boc(f[token].astype(float), f[other].astype(float)) / divisor
                for f, divisor in zip(made.similarity.features, made.similarity.divisors, strict=True)
            ]
        )
        assert row[other] == pytest.approx(wanted, rel=1e-5)


def test_the_edges_are_what_the_similarity_says(made: Explanation, plain: Explanation) -> None:
    for explanation in (made, plain):
        graph = explanation.graph
        assert graph is not None
        for token in (0, 100, 255):
            neighbours, before, after = graph.row(token)
            similar = explanation.similarity.row(token)[neighbours]
            np.testing.assert_allclose(before, np.exp(25 * (similar - 1)), rtol=1e-4)
            assert (after <= before).all()
    assert made.graph is not None
    assert plain.graph is not None
    assert made.graph.cut.sum() < made.graph.plain.sum()
    assert plain.graph.cut.sum() == plain.graph.plain.sum()
    assert plain.graph.position is None


def test_the_cosine_where_the_settings_say_so(backbone: Backbone, astronaut: np.ndarray) -> None:
    settings = Settings(weights="cosine", sharpness=10.0)
    made = explain(Segmenter(backbone, long_side=SIDE, settings=settings), astronaut)
    assert made.graph is not None
    neighbours, before, _ = made.graph.row(40)
    np.testing.assert_allclose(before, np.exp(10 * (made.similarity.row(40)[neighbours] - 1)), rtol=1e-4)


def test_a_token_that_is_not_there(made: Explanation) -> None:
    assert made.token_at(2, 3) == 2 * made.grid[1] + 3
    with pytest.raises(ValueError, match="row 0 to 15 and column 0 to 15 of the grid, not in row 16 and column 0"):
        made.token_at(16, 0)
    with pytest.raises(ValueError, match="token must be from 0 to 255, not 256"):
        made.similarity.row(256)


def test_the_typical_token_lies_in_the_best_instance(made: Explanation) -> None:
    assert made.masks[0].ravel()[made.typical_token()]


# Spectrum


def test_eigenvalues_are_those_of_the_dense_matrix(made: Explanation) -> None:
    assert made.graph is not None
    values = np.linalg.eigvalsh(plain_laplacian(made.graph.cut))
    np.testing.assert_allclose(made.spectrum.values, values[:16], atol=1e-6)
    gap = made.spectrum.gap
    assert gap == 1 + int(np.diff(values[:16]).argmax())
    assert np.abs(made.spectrum.vectors).max(axis=(1, 2)) == pytest.approx(np.ones(16))
    assert made.result.layers["eigenvector 1"] == pytest.approx(made.spectrum.vectors[1], abs=1e-6)


def test_as_many_eigenvalues_as_are_asked_for(segmenter: Segmenter, astronaut: np.ndarray) -> None:
    assert len(explain(segmenter, astronaut, eigenvalues=4).spectrum.values) == 4
    with pytest.raises(ValueError, match="eigenvalues"):
        explain(segmenter, astronaut, eigenvalues=1)
    with pytest.raises(ValueError, match="max_side"):
        explain(segmenter, astronaut, max_side=0)


# Candidates and the count


def test_the_regions_taken_are_the_masks(made: Explanation) -> None:
    regions = made.candidates
    assert regions is not None
    kept = regions.masks[: regions.count][regions.enough]
    assert {mask.tobytes() for mask in kept} == {mask.tobytes() for mask in made.masks.reshape(len(made.masks), -1)}
    assert (np.diff(regions.merit[regions.taken]) <= 0).all()
    assert regions.masks.sum(axis=0).max() <= 1
    labels = made.label_of_region()
    assert sorted(label for label in labels if label) == sorted({part.label for part in made.scores})
    assert labels[regions.count :] == [None] * (len(labels) - regions.count)


def test_any_threshold_in_the_gap_gives_the_same_and_none_outside(
    backbone: Backbone, made: Explanation, astronaut: np.ndarray
) -> None:
    regions = made.candidates
    assert regions is not None
    upper, lower = regions.gap
    assert lower < regions.min_merit <= upper

    def count(threshold: float) -> int:
        settings = dataclasses.replace(made.settings, min_merit=threshold)
        other = explain(Segmenter(backbone, long_side=SIDE, settings=settings), astronaut).candidates
        assert other is not None
        return other.count

    assert count(lower + 1e-6) == count(upper) == regions.count
    assert count(lower) == regions.count + 1
    assert count(upper + 1e-6) == regions.count - 1


def test_merit_is_votes_times_wholeness(made: Explanation, plain: Explanation) -> None:
    regions = made.candidates
    assert regions is not None
    assert regions.residuals is not None
    wholeness = np.exp(made.settings.wholeness * (1 / 8 - regions.residuals))
    np.testing.assert_allclose(regions.merit, regions.votes * wholeness, rtol=1e-12)
    assert plain.candidates is not None
    assert plain.candidates.residuals is None
    assert np.array_equal(plain.candidates.merit, plain.candidates.votes)


def test_a_count_that_was_given(backbone: Backbone, astronaut: np.ndarray) -> None:
    for count in (1, 12):
        made = explain(Segmenter(backbone, long_side=SIDE, n_instances=count), astronaut)
        regions = made.candidates
        assert regions is not None
        assert regions.given == count
        assert len(made.masks) == len(made.scores) == count
        assert regions.count <= count
        assert f"{count} were asked for" in " ".join(of_stage(made, "candidates").paragraphs)


# Scores


@pytest.mark.parametrize("which", ["made", "plain", "paper"])
def test_the_parts_make_the_score_exactly(which: str, request: pytest.FixtureRequest) -> None:
    made: Explanation = request.getfixturevalue(which)
    assert [part.label for part in made.scores] == list(range(1, len(made.result) + 1))
    for part, score in zip(made.scores, made.result.scores, strict=True):
        assert np.float32(part.recomputed()) == score
        assert part.tokens == made.masks[part.mask].sum()
        if which == "paper":
            assert part.first == part.tokens / made.masks.sum()
            continue
        assert part.votes is not None
        assert part.wholeness is not None
        assert part.merit == pytest.approx(part.votes * part.wholeness, rel=1e-12)
        assert part.first == pytest.approx(float(likely_overlap(np.array([part.merit]))[0]), rel=1e-12)


def test_instances_that_a_crop_split(backbone: Backbone) -> None:
    # Coins that the first look joins, since it hardly cuts, and the closer look takes apart.
    settings = Settings(cut_thresholds=(0.0005,), closer_cuts=4.0, back_steps=0.0, closer_margin=0.1)
    made = explain(Segmenter(backbone, long_side=SIDE, settings=settings), data.coins()[:150, :200])
    split = [part for part in made.scores if part.second is not None]
    assert len(split) > 1
    for part in made.scores:
        assert np.float32(part.recomputed()) == made.result.scores[part.label - 1]
    for part in split:
        assert part.crop is not None
        crop = made.crops[part.crop]
        assert crop.mask == part.mask
        assert len(crop.taken) > 1
        top, left, bottom, right = crop.box
        rows, columns = np.nonzero(made.result.labels == part.label)
        assert (top <= rows.min(), left <= columns.min(), rows.max() < bottom, columns.max() < right) == (True,) * 4
    assert f"{sum(len(crop.taken) > 1 for crop in made.crops)} split" in of_stage(made, "edges").paragraphs[1]


# The published method


def test_the_published_method(paper: Explanation) -> None:
    assert paper.method == "paper"
    assert paper.graph is None
    assert paper.candidates is None
    assert [choice.name for choice in paper.channels] == ["keys for the foreground", "keys for the instances"]
    assert [int(choice.kept.sum()) for choice in paper.channels] == [128, 60]
    assert paper.foreground.fiedler is not None
    inside = paper.foreground.share > 0
    assert (paper.masks.any(axis=0) == inside).all()
    # The affinity of a token of the background, which was set to zero, by the formula.
    token, other = int(np.flatnonzero(~inside.ravel())[0]), paper.typical_token()
    features = paper.similarity.features[0]
    assert paper.similarity.row(other)[token] == pytest.approx((1 + np.abs(features[other]).max()) / 2, rel=1e-5)
    assert len(paper.spectrum.values) == 5


# Images with little in them


@pytest.mark.parametrize("which", ["nothing", "one_pixel", "one_token"])
def test_images_with_nothing(which: str, request: pytest.FixtureRequest) -> None:
    made: Explanation = request.getfixturevalue(which)
    assert made.scores == ()
    assert len(made.masks) == 0
    assert made.foreground.anything is False
    assert made.candidates is not None
    assert made.candidates.gap == (np.inf, 0.0)
    assert made.label_of_region() == []
    assert not made.after.any()
    assert 0 <= made.typical_token() < made.grid[0] * made.grid[1]
    assert summary(made).startswith("No instances")
    assert "too little for there to be anything" in of_stage(made, "foreground").paragraphs[1]
