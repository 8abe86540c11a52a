from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.linalg import eigh

from sparsespec import paper, refine
from sparsespec.backbone import TokenFeatures
from sparsespec.evaluation.peers import PEERS, PeerResult, maskcut, segment_with_peer, tokencut
from sparsespec.evaluation.peers.maskcut import foreground_side
from sparsespec.evaluation.peers.ncut import Bipartition, bipartition, component

Method = Callable[..., PeerResult]

GRID = (10, 13)
SMALL, LARGE = (slice(1, 3), slice(1, 4)), (slice(4, 9), slice(6, 11))


def _features(truth: np.ndarray, noise: float = 0.1, seed: int = 0) -> np.ndarray:
    """Features of regions that share nothing with each other, and a little noise."""
    rng = np.random.default_rng(seed)
    kinds = np.eye(truth.max() + 1, 24)
    return (kinds[truth.ravel()] + noise * rng.standard_normal((truth.size, 24)) / 5).astype(np.float32)


def _scene(*boxes: tuple[slice, slice], grid: tuple[int, int] = GRID) -> np.ndarray:
    truth = np.zeros(grid, int)
    for number, box in enumerate(boxes, start=1):
        truth[box] = number
    return truth


def _weights(features: np.ndarray, tau: float, gone: set[int]) -> np.ndarray:
    """The affinity by its definition, edge by edge."""
    tokens = features.astype(float)
    weights = np.full((len(tokens), len(tokens)), 1e-5)
    for i, a in enumerate(tokens):
        for j, b in enumerate(tokens):
            if i not in gone and j not in gone and a @ b >= tau * math.sqrt((a @ a) * (b @ b)):
                weights[i, j] = 1.0
    return weights


def _reference_cut(weights: np.ndarray) -> tuple[float, np.ndarray]:
    degrees = np.diag(weights.sum(axis=1))
    values, vectors = eigh(degrees - weights, degrees)
    return float(values[1]), vectors[:, 1]


def _flood(side: np.ndarray, seed: int, grid: tuple[int, int]) -> np.ndarray:
    """Tokens of a side that are reached from the seed by steps up, down, left and right."""
    inside = side.reshape(grid)
    reached, front = set(), [divmod(seed, grid[1])]
    while front:
        i, j = front.pop()
        if (i, j) in reached or not (0 <= i < grid[0] and 0 <= j < grid[1]) or not inside[i, j]:
            continue
        reached.add((i, j))
        front += [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
    mask = np.zeros(grid, bool)
    for place in reached:
        mask[place] = True
    return mask.ravel()


def _reference_tokencut(features: np.ndarray, grid: tuple[int, int], tau: float) -> tuple[np.ndarray, float]:
    value, vector = _reference_cut(_weights(features, tau, set()))
    seed = int(np.argmax(np.abs(vector)))
    side = vector > vector.mean() if vector[seed] > vector.mean() else vector < vector.mean()
    return _flood(side, seed, grid), value


def _reference_maskcut(
    features: np.ndarray, grid: tuple[int, int], tau: float, n_masks: int, rules: bool
) -> list[tuple[np.ndarray, float]]:
    h, w = grid
    taken: set[int] = set()
    found: list[tuple[np.ndarray, float]] = []
    last: set[int] = set()
    for turn in range(n_masks):
        value, vector = _reference_cut(_weights(features, tau, taken))
        seed = int(np.argmax(np.abs(vector)))
        if vector[seed] < 0:
            vector = -vector
        side = vector > vector.mean()
        if sum(bool(side[corner]) for corner in (0, w - 1, (h - 1) * w, h * w - 1)) >= 3:
            side, vector = ~side, -vector
            seed = int(np.argmax(vector))
        mask = _flood(side, seed, grid)
        tokens = set(np.flatnonzero(mask).tolist())
        if rules and turn and (len(tokens) <= 0.01 * h * w or len(tokens & last) > 0.5 * len(tokens | last)):
            break
        new = sorted(tokens - taken)
        if new:
            found.append((np.isin(np.arange(h * w), new), value))
        taken |= tokens
        last = tokens
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tau", [0.0, 0.2])
def test_tokencut_against_the_definition(seed: int, tau: float) -> None:
    truth = _scene((slice(1, 3), slice(1, 3)), (slice(3, 7), slice(4, 8)), grid=(8, 9))
    features = _features(truth, noise=1.0, seed=seed)
    found = tokencut(features, truth.shape, tau=tau)
    mask, value = _reference_tokencut(features, truth.shape, tau)
    np.testing.assert_array_equal(found.masks, [mask])
    np.testing.assert_allclose(found.scores, [1 - value], atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("tau", "rules"), [(0.0, False), (0.15, False), (0.15, True)])
def test_maskcut_against_the_definition(seed: int, tau: float, rules: bool) -> None:
    truth = _scene((slice(1, 3), slice(1, 3)), (slice(3, 7), slice(4, 8)), grid=(8, 9))
    features = _features(truth, noise=1.0, seed=seed)
    found = maskcut(features, truth.shape, tau=tau, n_masks=4, min_area=0.01 * rules, max_overlap=0.5 if rules else 1.0)
    expected = _reference_maskcut(features, truth.shape, tau, 4, rules)
    for mask, score, (expected_mask, value) in zip(found.masks, found.scores, expected, strict=True):
        np.testing.assert_array_equal(mask, expected_mask)
        assert score == pytest.approx(1 - value, abs=1e-12)


def test_the_cut_solves_the_generalised_problem() -> None:
    features = _features(_scene(SMALL, LARGE), noise=1.0)
    unit = features.astype(float) / np.linalg.norm(features.astype(float), axis=1, keepdims=True)
    left_out = np.zeros(len(unit), bool)
    left_out[20:31] = True
    cut = bipartition(unit @ unit.T, 0.1, left_out)
    assert cut is not None
    weights = _weights(features, 0.1, set(np.flatnonzero(left_out).tolist()))
    value, vector = _reference_cut(weights)
    assert cut.value == pytest.approx(value, abs=1e-12)
    degrees = np.diag(weights.sum(axis=1))
    assert abs(cut.vector @ degrees @ vector) == pytest.approx(1, rel=1e-9)
    np.testing.assert_array_equal(cut.side, cut.vector > cut.vector.mean())
    assert cut.side[np.argmax(np.abs(cut.vector))]


def test_tokencut_finds_one_object_and_only_its_connected_part() -> None:
    truth = _scene(LARGE)
    truth[SMALL] = 1
    found = tokencut(_features(truth), GRID)
    assert len(found) == 1
    parts = [_scene(SMALL) > 0, _scene(LARGE) > 0]
    assert any(np.array_equal(found.masks[0].reshape(GRID), part) for part in parts)
    assert 0 < found.scores[0] < 1


def test_maskcut_finds_two_objects() -> None:
    truth = _scene(SMALL, LARGE)
    found = maskcut(_features(truth), GRID, n_masks=2)
    assert found.masks.sum(axis=0).max() == 1
    expected = {tuple(np.flatnonzero(truth == k)) for k in (1, 2)}
    assert {tuple(np.flatnonzero(mask)) for mask in found.masks} == expected
    assert ((found.scores > 0) & (found.scores < 1)).all()


def test_maskcut_stops_at_crumbs_where_asked_to() -> None:
    # One token of 130 is no object, but the first cut is not asked how large it is.
    crumbs = _scene((slice(2, 3), slice(2, 3)), (slice(6, 7), slice(8, 9)))
    found = maskcut(_features(crumbs), GRID, min_area=0.01)
    assert len(found) == 1
    assert found.masks.sum() == 1
    assert len(maskcut(_features(crumbs), GRID)) >= 2


@pytest.mark.parametrize("name", ["min_area", "max_overlap"])
@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_maskcut_rules_are_shares(name: str, share: float) -> None:
    rules: dict[str, Any] = {name: share}
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\]"):
        maskcut(np.eye(4), (2, 2), **rules)


def test_foreground_has_few_corners() -> None:
    side = np.ones(GRID, bool)
    side[LARGE] = False
    vector = np.where(side.ravel(), 2.0, -1.0)
    vector[5 * GRID[1] + 7] = -1.5
    chosen, seed = foreground_side(Bipartition(0.1, vector, side.ravel()), GRID)
    np.testing.assert_array_equal(chosen, ~side.ravel())
    assert seed == 5 * GRID[1] + 7
    # Two corners on either side: the most extreme entry decides.
    half = np.zeros(GRID, bool)
    half[:6] = True
    vector = np.where(half.ravel(), 1.0, -0.5)
    vector[7] = 3.0
    chosen, seed = foreground_side(Bipartition(0.1, vector, half.ravel()), GRID)
    np.testing.assert_array_equal(chosen, half.ravel())
    assert seed == 7


def test_component_has_no_diagonal_steps() -> None:
    side = np.array([[1, 1, 0], [0, 0, 1], [1, 0, 1]], bool)
    assert np.flatnonzero(component(side.ravel(), 1, (3, 3))).tolist() == [0, 1]
    assert np.flatnonzero(component(side.ravel(), 8, (3, 3))).tolist() == [5, 8]


@pytest.mark.parametrize("method", [tokencut, maskcut])
@pytest.mark.parametrize(
    ("features", "tau"),
    [
        (np.ones((12, 5)), 0.2),
        (np.zeros((12, 5)), 0.2),
        (np.arange(1.0, 13.0)[:, None] * np.ones(5), 0.2),
        (np.random.default_rng(0).standard_normal((12, 5)), -1.0),
    ],
)
def test_nothing_where_no_token_is_told_from_another(method: Method, features: np.ndarray, tau: float) -> None:
    found = method(features, (3, 4), tau=tau)
    assert found.masks.shape == (0, 12)
    assert found.scores.shape == (0,)


@pytest.mark.parametrize("method", [tokencut, maskcut])
@pytest.mark.parametrize("n_tokens", [1, 2, 3])
def test_few_tokens(method: Method, n_tokens: int) -> None:
    found = method(np.eye(n_tokens), (1, n_tokens))
    assert found.masks.shape[1] == n_tokens
    assert len(found) == len(found.masks)
    assert len(found) >= int(n_tokens > 1)
    assert found.masks.any(axis=1).all()
    assert found.masks.sum(axis=0).max(initial=0) <= 1


@pytest.mark.parametrize("method", [tokencut, maskcut])
def test_same_features_same_masks(method: Method) -> None:
    features = _features(_scene(SMALL, LARGE), noise=2.0)
    kept = features.copy()
    first, second = method(features, GRID), method(features, GRID)
    np.testing.assert_array_equal(first.masks, second.masks)
    np.testing.assert_array_equal(first.scores, second.scores)
    np.testing.assert_array_equal(features, kept)


@pytest.mark.parametrize("method", [tokencut, maskcut])
def test_scale_of_a_token_does_not_matter(method: Method) -> None:
    features = _features(_scene(SMALL, LARGE), noise=0.5)
    scaled = features * np.random.default_rng(3).uniform(0.1, 10, (len(features), 1)).astype(np.float32)
    np.testing.assert_array_equal(method(features, GRID).masks, method(scaled, GRID).masks)


@pytest.mark.parametrize("method", [tokencut, maskcut])
def test_bad_arguments(method: Method) -> None:
    features = _features(_scene(SMALL))
    broken = features.copy()
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"features must be finite.*rows 3"):
        method(broken, GRID)
    with pytest.raises(ValueError, match=r"grid .* does not hold the 130 tokens"):
        method(features, (10, 12))
    with pytest.raises(ValueError, match=r"features must be an \(N, C\) array"):
        method(features[0], GRID)
    for tau in (1.5, float("nan"), "high", None):
        with pytest.raises(ValueError, match=r"tau must be a cosine in \[-1, 1\]"):
            method(features, GRID, tau=tau)
    with pytest.raises(ValueError, match=r"10001 tokens; the peers .* at most 10000"):
        method(np.ones((10001, 1)), (1, 10001))


@pytest.mark.parametrize("n_masks", [0, -1, 1.5, True])
def test_maskcut_needs_a_number_of_masks(n_masks: Any) -> None:
    with pytest.raises(ValueError, match="n_masks must be an integer of at least 1"):
        maskcut(np.eye(4), (2, 2), n_masks=n_masks)


def _image(truth: np.ndarray, side: int = 8) -> tuple[TokenFeatures, np.ndarray]:
    """A picture of flat colours and features to go with it, a token being 8 pixels wide."""
    colours = np.array([[40, 60, 80], [230, 40, 40], [40, 220, 60]], np.uint8)
    pixels = np.kron(colours[truth], np.ones((side, side, 1), np.uint8))
    rng = np.random.default_rng(5)
    features = _features(truth)
    keys, values = (rng.standard_normal(features.shape).astype(np.float32) for _ in range(2))
    grid = (truth.shape[0], truth.shape[1])
    shape = (pixels.shape[0], pixels.shape[1])
    return TokenFeatures(features, keys, values, grid, 14, shape, 14 / side, {}), pixels


@pytest.mark.parametrize("refined", [True, False])
@pytest.mark.parametrize(("name", "n_instances"), [("maskcut", None), ("maskcut", 2), ("tokencut", None), ("paper", 2)])
def test_labels_are_numbered_by_falling_score(name: str, n_instances: int | None, refined: bool) -> None:
    truth = _scene(SMALL, LARGE)
    tokens, pixels = _image(truth)
    labels, scores = segment_with_peer(
        name, tokens, pixels, n_instances=n_instances, features="queries", refined=refined
    )
    assert labels.shape == pixels.shape[:2]
    assert labels.dtype == np.int32
    assert scores.dtype == np.float32
    assert np.unique(labels[labels > 0]).tolist() == list(range(1, len(scores) + 1))
    assert (np.diff(scores) <= 0).all()
    assert ((scores >= 0) & (scores <= 1)).all()
    if name == "paper":
        assert len(scores) == 2


@pytest.mark.parametrize("refined", [True, False])
def test_maskcut_at_full_resolution(refined: bool) -> None:
    truth = _scene(SMALL, LARGE)
    tokens, pixels = _image(truth)
    labels, scores = segment_with_peer("maskcut", tokens, pixels, n_instances=2, features="queries", refined=refined)
    expected = np.kron(truth, np.ones((8, 8), int))
    for k in (1, 2):
        there = labels[expected == k]
        value = np.bincount(there).argmax()
        assert value > 0
        same = np.count_nonzero((labels == value) & (expected == k))
        assert same >= 0.95 * np.count_nonzero((labels == value) | (expected == k))
    assert len(scores) == 2


def test_unrefined_labels_are_those_of_the_tokens() -> None:
    tokens, pixels = _image(_scene(LARGE))
    labels, _ = segment_with_peer("tokencut", tokens, pixels, features="queries", refined=False)
    mask = tokencut(tokens.queries, tokens.grid).masks[0].reshape(tokens.grid)
    np.testing.assert_array_equal(labels, refine.enlarge_labels(mask.astype(np.int32), GRID, labels.shape))


def test_features_and_threshold_are_those_asked_for() -> None:
    tokens, pixels = _image(_scene(LARGE))
    for name in ("tokencut", "maskcut"):
        peer = PEERS[name]
        usual = segment_with_peer(name, tokens, pixels)
        same = segment_with_peer(name, tokens, pixels, features=peer.features, tau=peer.tau)
        np.testing.assert_array_equal(usual[0], same[0])
    # Values are noise here.
    other, _ = segment_with_peer("tokencut", tokens, pixels, features="values")
    found, _ = segment_with_peer("tokencut", tokens, pixels, features="queries")
    assert not np.array_equal(other, found)


@pytest.mark.parametrize("name", ["tokencut", "maskcut", "paper"])
def test_none_asked_for_none_found(name: str) -> None:
    tokens, pixels = _image(_scene(LARGE))
    labels, scores = segment_with_peer(name, tokens, pixels, n_instances=0)
    assert not labels.any()
    assert scores.shape == (0,)


def test_one_token() -> None:
    one = np.ones((1, 4), np.float32)
    tokens = TokenFeatures(one, one, one, (1, 1), 14, (3, 2), 4.0, {})
    pixels = np.zeros((3, 2, 3), np.uint8)
    for name in ("tokencut", "maskcut"):
        labels, scores = segment_with_peer(name, tokens, pixels)
        assert labels.shape == (3, 2)
        assert not labels.any()
        assert len(scores) == 0


def test_what_segment_with_peer_refuses() -> None:
    tokens, pixels = _image(_scene(LARGE))
    with pytest.raises(ValueError, match="name must be one of 'tokencut', 'maskcut', 'paper', not 'cutler'"):
        segment_with_peer("cutler", tokens, pixels)
    with pytest.raises(ValueError, match="features must be one of 'keys', 'queries', 'values', not 'tokens'"):
        segment_with_peer("maskcut", tokens, pixels, features="tokens")
    with pytest.raises(ValueError, match=r"needs n_instances"):
        segment_with_peer("paper", tokens, pixels)
    with pytest.raises(ValueError, match=r'tau is 0\.2, but name="paper" has no threshold'):
        segment_with_peer("paper", tokens, pixels, n_instances=1, tau=0.2)
    with pytest.raises(ValueError, match=r"pixels are \(79, 104\) high and wide, but .* \(80, 104\)"):
        segment_with_peer("maskcut", tokens, pixels[1:])
    with pytest.raises(ValueError, match="n_instances must be an integer of at least 0, not -1"):
        segment_with_peer("maskcut", tokens, pixels, n_instances=-1)
    with pytest.raises(ValueError, match="steps are those of name=\"paper\", not of 'maskcut'"):
        segment_with_peer("maskcut", tokens, pixels, steps={"keep": 1.0})


def test_the_steps_of_the_paper_can_be_switched() -> None:
    tokens, pixels = _image(_scene(LARGE))
    published = {"keep": paper.NCR_KEEP, "keep_deviation": paper.DCR_KEEP, "weights": "boc"}
    usual = segment_with_peer("paper", tokens, pixels, n_instances=2)
    same = segment_with_peer("paper", tokens, pixels, n_instances=2, steps=published)
    assert np.array_equal(usual[0], same[0])
    assert np.array_equal(usual[1], same[1])
    switched = {"keep": 1.0, "keep_deviation": None, "weights": "cosine"}
    labels, _ = segment_with_peer("paper", tokens, pixels, n_instances=2, steps=switched, refined=False)
    features = getattr(tokens, PEERS["paper"].features)
    front = paper.foreground(features, tokens.grid, keep=1.0).mask
    expected = paper.instances(features, tokens.grid, front, 2, **switched).labels
    assert np.array_equal(labels, refine.enlarge_labels(expected, tokens.extent, tokens.image_shape))


def test_a_result_is_as_long_as_its_masks() -> None:
    assert len(PeerResult(np.zeros((2, 6), bool), np.ones(2))) == 2
