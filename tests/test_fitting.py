from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sparsespec import fitting, pipeline
from sparsespec.backbone import TokenFeatures
from sparsespec.directions import Directions
from sparsespec.fitting import fit_directions

C = 48
GRID = (18, 24)


@dataclasses.dataclass
class World:
    """Photographs of rectangles whose features are known.

    There are kinds of background, a direction that all objects share, one of each object's own, and two along which the
    place in the object is written.
    """

    seed: int = 0
    noise: float = 0.35

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        axes = [np.linalg.qr(rng.normal(size=(C, C)))[0] for _ in range(3)]
        self.grounds = [axis[:4] for axis in axes]
        self.shared = [axis[4] for axis in axes]
        self.across = [axis[5] for axis in axes]
        self.down = [axis[6] for axis in axes]
        self.own = [axis[7:19] for axis in axes]

    def photograph(self, number: int) -> tuple[TokenFeatures, np.ndarray, np.ndarray]:
        """Features, which object each token is of (0 for none), and its place in that object."""
        rng = np.random.default_rng([self.seed, number])
        rows, columns = np.mgrid[: GRID[0], : GRID[1]]
        objects, place = np.zeros(GRID, int), np.zeros((*GRID, 2))
        for k in range(rng.integers(1, 3)):
            high, wide = rng.integers(5, 10), rng.integers(4, 8)
            top = rng.integers(2, GRID[0] - high - 1)
            left = rng.integers(2, 11 - wide) + 11 * k
            box = (rows >= top) & (rows < top + high) & (columns >= left) & (columns < left + wide)
            objects[box] = k + 1
            place[box] = np.column_stack(
                [(columns[box] - left + 0.5) / wide - 0.5, (rows[box] - top + 0.5) / high - 0.5]
            )
        objects, place = objects.ravel(), place.reshape(-1, 2)
        horizon, ground = rng.integers(6, 12), rng.permutation(4)
        below = np.repeat(np.arange(GRID[0]) >= horizon, GRID[1]).astype(int)
        kind = rng.permutation(12)
        features = []
        for number in range(3):
            tokens = self.grounds[number][ground[below]]
            thing = self.shared[number] + self.own[number][kind[objects]]
            thing += 1.2 * (place[:, :1] * self.across[number] + place[:, 1:] * self.down[number])
            tokens = np.where(objects[:, None] > 0, thing, tokens) + self.noise * rng.normal(size=(len(place), C)) / 4
            features.append((rng.uniform(5, 9, (len(place), 1)) * tokens).astype(np.float32))
        keys, queries, values = features
        size = (GRID[0] * 14, GRID[1] * 14)
        return TokenFeatures(queries, keys, values, GRID, 14, size, 1.0, {}), objects, place


def kinds(tokens: TokenFeatures) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tokens.keys, tokens.queries, tokens.values


@pytest.fixture(scope="module")
def photographs() -> list[TokenFeatures]:
    world = World()
    return [world.photograph(k)[0] for k in range(12)]


@pytest.fixture(scope="module")
def fitted(photographs: list[TokenFeatures]) -> Directions:
    return fit_directions(photographs, source_sha256="ab" * 32)


def same(one: Directions, other: Directions) -> bool:
    return one.to_bytes() == other.to_bytes()


# The fit


def test_what_was_planted_is_found_in_photographs_not_fitted_on(fitted: Directions) -> None:
    world = World()
    for number in range(100, 106):
        tokens, objects, place = world.photograph(number)
        inside = objects > 0
        objectness = fitted.objectness_of(*kinds(tokens))
        assert objectness[inside].min() > objectness[~inside].max()
        position = fitted.position_of(*kinds(tokens))
        for axis in (0, 1):
            assert np.corrcoef(position[inside, axis], place[inside, axis])[0, 1] > 0.95
            # One does not stand for the other.
            assert abs(np.corrcoef(position[inside, axis], place[inside, 1 - axis])[0, 1]) < 0.3
        assert 0.6 < position[inside].std() / place[inside].std() < 1.4


def test_the_method_sees_the_objects_with_them(fitted: Directions) -> None:
    for number in range(100, 106):
        tokens, objects, _ = World().photograph(number)
        found = pipeline.find_instances(tokens, directions=fitted)
        assert len(found.masks) == objects.max()
        for mask in found.masks:
            likeness = [(mask & (objects == k)).sum() / (mask | (objects == k)).sum() for k in (1, 2)]
            assert max(likeness) > 0.8


def test_things_never_seen_are_objects_too(fitted: Directions) -> None:
    world = World()
    # Another seed for what each object has of its own: of the directions, the shared one is left to know it by.
    strange = dataclasses.replace(world, seed=1).own
    for number in range(3):
        known = np.vstack([world.grounds[number], world.shared[number], world.across[number], world.down[number]])
        rest = strange[number] - strange[number] @ known.T @ known
        world.own[number] = rest / np.linalg.norm(rest, axis=1, keepdims=True)
    for number in range(100, 104):
        tokens, objects, _ = world.photograph(number)
        objectness = fitted.objectness_of(*kinds(tokens))
        assert objectness[objects > 0].mean() - objectness[objects == 0].mean() > 1.5


def test_on_one_scale_whatever_the_photographs(photographs: list[TokenFeatures], fitted: Directions) -> None:
    objectness = np.concatenate([fitted.objectness_of(*kinds(tokens)) for tokens in photographs])
    assert objectness.std() == pytest.approx(1, abs=1e-4)
    assert fitted.photographs == len(photographs)
    assert fitted.source_sha256 == "ab" * 32
    assert fitted.channels == C


def test_same_photographs_same_directions(photographs: list[TokenFeatures], fitted: Directions) -> None:
    assert same(fit_directions(photographs, source_sha256="ab" * 32), fitted)
    assert same(fit_directions(tuple(photographs), source_sha256="ab" * 32), fitted)


def test_their_order_hardly_matters(photographs: list[TokenFeatures], fitted: Directions) -> None:
    turned = fit_directions(photographs[::-1])
    np.testing.assert_allclose(turned.objectness, fitted.objectness, atol=1e-3 * np.abs(fitted.objectness).max())
    np.testing.assert_allclose(turned.position, fitted.position, atol=1e-3 * np.abs(fitted.position).max())


def test_halves_are_enough_and_stay_as_they_are(photographs: list[TokenFeatures], fitted: Directions) -> None:
    halves = [
        dataclasses.replace(t, **{n: getattr(t, n).astype(np.float16) for n in ("keys", "queries", "values")})
        for t in photographs
    ]
    kept = halves[0].keys.copy()
    found = fit_directions(halves)
    assert halves[0].keys.dtype == np.float16
    np.testing.assert_array_equal(halves[0].keys, kept)
    for tokens in photographs:
        for told, expected in (
            (found.objectness_of(*kinds(tokens)), fitted.objectness_of(*kinds(tokens))),
            (found.position_of(*kinds(tokens)).ravel(), fitted.position_of(*kinds(tokens)).ravel()),
        ):
            assert np.corrcoef(told, expected)[0, 1] > 0.999


def test_photographs_of_different_sizes(photographs: list[TokenFeatures], fitted: Directions) -> None:
    rows = 15
    cut = [
        dataclasses.replace(
            t,
            grid=(rows, GRID[1]),
            image_shape=(rows * 14, GRID[1] * 14),
            **{n: getattr(t, n)[: rows * GRID[1]] for n in ("keys", "queries", "values")},
        )
        for t in photographs[:4]
    ]
    found = fit_directions([*cut, *photographs[4:]])
    tokens, objects, _ = World().photograph(100)
    objectness = found.objectness_of(*kinds(tokens))
    assert objectness[objects > 0].min() > objectness[objects == 0].max()


def test_progress_names_each_step(photographs: list[TokenFeatures]) -> None:
    said: list[str] = []
    fit_directions(photographs[:6], progress=said.append)
    assert said == [
        "graphs of 6 photographs",
        *(f"objectness, round {k} of 3" for k in (1, 2, 3)),
        *(f"positions, round {k} of 3" for k in (1, 2, 3)),
    ]


@pytest.mark.slow
def test_photographs_teach_what_others_taught() -> None:
    from sparsespec import Backbone
    from sparsespec.directions import find_directions
    from sparsespec.images import read_image

    backbone = Backbone()
    examples = sorted((Path(__file__).parents[1] / "docs" / "examples").glob("*.jpg"))
    photographs = [backbone.features(read_image(path)) for path in examples]
    found = fit_directions(photographs, source_sha256=backbone.features_sha256)
    shipped = find_directions("default", source_sha256=backbone.features_sha256, channels=backbone.channels)
    assert shipped is not None
    for tokens in photographs:
        told, expected = found.objectness_of(*kinds(tokens)), shipped.objectness_of(*kinds(tokens))
        assert np.corrcoef(told, expected)[0, 1] > 0.8


# What can't be fitted to


def changed(tokens: TokenFeatures, **changes: np.ndarray) -> TokenFeatures:
    return dataclasses.replace(tokens, **changes)  # type: ignore[arg-type]


def test_no_photographs() -> None:
    with pytest.raises(ValueError, match="photographs is empty: directions need at least one photograph"):
        fit_directions([])


def test_photographs_of_two_networks(photographs: list[TokenFeatures]) -> None:
    narrow = {name: getattr(photographs[0], name)[:, :40] for name in ("keys", "queries", "values")}
    with pytest.raises(ValueError, match=r"photographs\[0\] have 48 channels and some of photographs\[2\] have 40"):
        fit_directions([*photographs[:2], changed(photographs[0], **narrow)])
    with pytest.raises(ValueError, match=r"photographs\[0\] have 48 channels and some of photographs\[0\] have 40"):
        fit_directions([changed(photographs[0], values=narrow["values"])])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_features_that_are_no_numbers(photographs: list[TokenFeatures], bad: float, dtype: type) -> None:
    values = photographs[3].values.astype(dtype)
    values[17, 2] = bad
    with pytest.raises(ValueError, match=r"values of photographs\[3\] must be finite .* rows 17$"):
        fit_directions([*photographs[:3], changed(photographs[3], values=values)])


def test_features_that_do_not_fill_their_grid(photographs: list[TokenFeatures]) -> None:
    tokens = photographs[0]
    with pytest.raises(ValueError, match=r"grid of photographs\[1\] \(18, 24\) does not hold the 431 tokens given"):
        fit_directions([tokens, changed(tokens, queries=tokens.queries[1:])])
    with pytest.raises(ValueError, match=r"keys of photographs\[0\] must be an \(N, C\) array"):
        fit_directions([changed(tokens, keys=tokens.keys.ravel())])


def blank(seed: int = 0) -> TokenFeatures:
    row = np.random.default_rng(seed).normal(size=C).astype(np.float32)
    tokens = np.repeat(row[None], GRID[0] * GRID[1], axis=0)
    return TokenFeatures(tokens, tokens, tokens, GRID, 14, (252, 336), 1.0, {})


def test_photographs_of_nothing() -> None:
    with pytest.raises(ValueError, match="nothing stands out in any of the 3 photographs: give some that show objects"):
        fit_directions([blank(seed) for seed in range(3)])


def test_a_photograph_of_nothing_does_no_harm(photographs: list[TokenFeatures]) -> None:
    found = fit_directions([*photographs, blank()])
    tokens, objects, _ = World().photograph(100)
    objectness = found.objectness_of(*kinds(tokens))
    assert objectness[objects > 0].min() > objectness[objects == 0].max()


def test_directions_that_tell_nothing(photographs: list[TokenFeatures], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_fit_objectness", lambda *_: (np.zeros(3 * C), 1.0))
    with pytest.raises(ValueError, match="no direction tells what stands out in the 12 photographs from the rest"):
        fit_directions(photographs)


def test_no_instance_by_itself(photographs: list[TokenFeatures], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_stands_alone", lambda *_: False)
    with pytest.raises(
        ValueError, match="no instance of at least 8 tokens that touches no other was found in the 4 photographs"
    ):
        fit_directions(photographs[:4])


def test_instances_too_small_to_have_places() -> None:
    world = World()
    photographs = []
    for number in range(4):
        tokens, objects, _ = world.photograph(number)
        # Of each object 2 x 2 tokens stay, the rest becomes background.
        features = {}
        keep = np.zeros(GRID, bool)
        for k in range(1, objects.max() + 1):
            row, column = np.argwhere(objects.reshape(GRID) == k)[0] + 1
            keep[row : row + 2, column : column + 2] = True
        gone = np.flatnonzero((objects > 0) & ~keep.ravel())
        for name in ("keys", "queries", "values"):
            array = getattr(tokens, name).copy()
            array[gone] = array[gone // GRID[1] * GRID[1]]
            features[name] = array
        photographs.append(changed(tokens, **features))
    with pytest.raises(ValueError, match="no instance of at least 8 tokens"):
        fit_directions(photographs)


# Its parts


def parts(seed: int, sizes: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        (
            rng.normal(0.5, 1, (n, 7)).astype(np.float32),
            rng.normal(2, 1, (n, 2)),
            rng.uniform(0.1, 2, n),
        )
        for n in sizes
    ]


@pytest.mark.parametrize("ridge", [0.0, 0.03, 9.0])
def test_ridge_is_least_squares_with_more_equations(ridge: float) -> None:
    given = parts(0, (30, 1, 50))
    weights, offset = fitting._ridge(iter(given), ridge)
    features, targets, share = (np.concatenate(arrays).astype(np.float64) for arrays in zip(*given, strict=True))
    mean = np.average(features, axis=0, weights=share)
    # A penalty of so many mean variances of a channel, written as equations that want each weight to be zero.
    penalty = ridge * (share[:, None] * (features - mean) ** 2).sum() / 7
    root = np.sqrt(share)[:, None]
    left = np.vstack([root * np.hstack([features, np.ones((81, 1))]), np.sqrt(penalty) * np.eye(7, 8)])
    right = np.vstack([root * targets, np.zeros((7, 2))])
    expected = np.linalg.lstsq(left, right, rcond=None)[0]
    np.testing.assert_allclose(weights, expected[:7], atol=1e-5)
    np.testing.assert_allclose(offset, expected[7], atol=1e-5)


def test_ridge_does_not_depend_on_how_samples_are_parted() -> None:
    given = parts(1, (40, 25))
    one = [tuple(np.concatenate(arrays) for arrays in zip(*given, strict=True))]
    weights, offset = fitting._ridge(iter(given), 0.5)
    expected, expected_offset = fitting._ridge(iter(one), 0.5)  # type: ignore[arg-type]
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    np.testing.assert_allclose(offset, expected_offset, atol=1e-6)


def test_ridge_on_features_that_hardly_vary() -> None:
    features = np.full((20, 5), 0.3, np.float32)
    weights, offset = fitting._ridge(iter([(features, np.ones((20, 1)), np.ones(20))]), 0.03)
    np.testing.assert_allclose(features @ weights + offset, 1, atol=1e-3)
    assert np.abs(weights).max() < 1


def test_ridge_without_samples() -> None:
    with pytest.raises(fitting._NoSamplesError):
        fitting._ridge(iter([]), 1.0)


def test_places_in_the_box() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        members = np.sort(rng.choice(7 * 11, rng.integers(1, 30), replace=False))
        rows, columns = members // 11, members % 11
        expected = []
        for row, column in zip(rows, columns, strict=True):
            wide, high = columns.max() + 1 - columns.min(), rows.max() + 1 - rows.min()
            x = (column + 0.5 - columns.min()) / wide - 0.5
            y = (row + 0.5 - rows.min()) / high - 0.5
            expected.append((x, y))
        places = fitting._places(members, 11)
        np.testing.assert_allclose(places, expected, atol=1e-12)
        assert np.abs(places).max() < 0.5
    np.testing.assert_array_equal(fitting._places(np.array([5]), 11), [[0, 0]])


def neighbours(token: int, grid: tuple[int, int]) -> Iterator[int]:
    row, column = divmod(token, grid[1])
    for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        if 0 <= row + down < grid[0] and 0 <= column + right < grid[1]:
            yield (row + down) * grid[1] + column + right


def test_standing_alone() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for grid in ((6, 9), (1, 12), (12, 1)):
        for _ in range(60):
            owner = rng.choice(4, grid[0] * grid[1], p=[0.76, 0.08, 0.08, 0.08])
            masks = np.array([owner == k for k in (1, 2, 3)])
            for k, mask in enumerate(masks, start=1):
                touched = {
                    int(owner[other]) for token in np.flatnonzero(mask) for other in neighbours(int(token), grid)
                }
                alone = touched <= {0, k}
                assert fitting._stands_alone(mask, masks, grid) == alone
                seen.add(alone)
    assert seen == {True, False}


def test_standing_alone_beside_the_border_and_at_corners() -> None:
    masks = np.zeros((2, 4, 5), bool)
    masks[0, :2, 3:] = True
    masks[1, 2:, :3] = True
    # They meet at a corner, and the end of one row is no neighbour of the beginning of the next.
    assert fitting._stands_alone(masks[0].ravel(), masks.reshape(2, -1), (4, 5))
    masks[1, 1, 2] = True
    assert not fitting._stands_alone(masks[0].ravel(), masks.reshape(2, -1), (4, 5))
    assert fitting._stands_alone(masks[0].ravel(), masks[:1].reshape(1, -1), (4, 5))
