from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.ndimage import label
from scipy.sparse import csr_array

from sparsespec import instances
from sparsespec._threads import Team
from sparsespec.affinity import grid_edges
from sparsespec.instances import Candidates, RegionCutter, position_residuals, propose, select, split_until
from tests.reference import cuts as reference
from tests.reference import positions as plain

EXACT = 1e-9


def grid_graph(grid: tuple[int, int], seed: int | None = 0, low: float = 0.05) -> np.ndarray:
    """Dense affinity of the 8-neighbour graph: random weights, or ones without a seed."""
    first, second = grid_edges(grid)
    n = grid[0] * grid[1]
    weights = np.zeros((n, n))
    weights[first, second] = 1 if seed is None else np.random.default_rng(seed).uniform(low, 1, first.size)
    return weights + weights.T


def blocks_graph(owner: np.ndarray) -> np.ndarray:
    """Weights near 1 inside blocks of a token grid, and weak ones of differing strength between them."""
    weights = grid_graph(owner.shape, 4, low=0.9)
    flat = owner.ravel()
    across = flat[:, None] != flat
    weights[across] *= 1e-3 * (1 + np.minimum(flat[:, None], flat))[across]
    return weights


def cutter_of(weights: np.ndarray, grid: tuple[int, int], **options: float) -> RegionCutter:
    return RegionCutter(csr_array(weights), grid, **options)  # type: ignore[arg-type]


def transposed(weights: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    order = np.arange(grid[0] * grid[1]).reshape(grid).T.ravel()
    return weights[np.ix_(order, order)]


def tokens_in(cutter: RegionCutter, tokens: np.ndarray) -> frozenset[int]:
    return frozenset(np.flatnonzero(cutter.mask_of(tokens)).tolist())


Tree = dict[frozenset[int], tuple[float, float]]


def tree_of(cutter: RegionCutter, region: np.ndarray, largest_cut: float) -> Tree:
    mask = np.zeros(cutter.grid[0] * cutter.grid[1], bool)
    mask[region] = True
    rows = [
        (tokens_in(cutter, tokens), birth, cut)
        for piece in cutter.components(cutter.tokens_of(mask))
        for tokens, birth, cut in cutter.tree(piece, largest_cut)
    ]
    assert len({row[0] for row in rows}) == len(rows)
    return {tokens: (birth, cut) for tokens, birth, cut in rows}


def assert_same_tree(found: Tree, expected: Tree, tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for tokens, (birth, cut) in expected.items():
        assert found[tokens] == (pytest.approx(birth, abs=tolerance), pytest.approx(cut, abs=tolerance))


def one_partition(weights: np.ndarray, region: np.ndarray, threshold: float) -> list[frozenset[int]]:
    """Cut a region for one threshold, part by part, without any of the bookkeeping of births and values."""
    parts: list[frozenset[int]] = []
    waiting = [np.sort(region)]
    while waiting:
        tokens = waiting.pop()
        inner = weights[np.ix_(tokens, tokens)]
        reached = {0}
        while True:
            more = reached | set(np.flatnonzero(inner[sorted(reached)].any(axis=0)).tolist())
            if more == reached:
                break
            reached = more
        if len(reached) < tokens.size:
            inside = np.isin(np.arange(tokens.size), sorted(reached))
            waiting += [tokens[inside], tokens[~inside]]
            continue
        if tokens.size > 1:
            vectors = reference.fiedler_plane(inner)[1].T
            cut, side = min((reference.best_sweep(inner, v) for v in vectors), key=lambda c: c[0])
            if cut <= threshold:
                waiting += [tokens[side], tokens[~side]]
                continue
        parts.append(frozenset(tokens.tolist()))
    return parts


# The cutter


@pytest.mark.parametrize("grid", [(5, 7), (7, 5), (6, 6), (1, 12), (12, 1)])
def test_cut_is_that_of_the_plain_reference(grid: tuple[int, int]) -> None:
    weights = grid_graph(grid, 1)
    cutter = cutter_of(weights, grid, tolerance=EXACT)
    everything = cutter.tokens_of(np.ones(len(weights), bool))
    value, left, right = cutter.cut(everything)
    _, vectors = reference.fiedler_plane(weights)
    expected, side = min((reference.best_sweep(weights, v) for v in vectors.T), key=lambda cut: cut[0])
    assert value == pytest.approx(expected, abs=1e-9)
    sides = {frozenset(np.flatnonzero(s).tolist()) for s in (side, ~side)}
    assert {tokens_in(cutter, left), tokens_in(cutter, right)} == sides
    assert left.dtype == right.dtype == np.int32


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("grid", [(5, 7), (7, 5)])
def test_tree_is_that_of_the_plain_reference(grid: tuple[int, int], seed: int) -> None:
    weights = grid_graph(grid, seed)
    region = np.flatnonzero(np.random.default_rng(seed).random(35) < 0.85)
    expected = {t: (birth, cut) for t, birth, cut in reference.split_tree(weights, region, 0.8)}
    assert len(expected) > 5
    assert_same_tree(tree_of(cutter_of(weights, grid, tolerance=EXACT), region, 0.8), expected)


def test_large_regions_are_cut_like_small_ones() -> None:
    owner = np.zeros((9, 13), int)
    owner[:4, 6:] = 1
    owner[4:, :5] = 2
    owner[4:, 5:] = 3
    weights = blocks_graph(owner)
    region = np.arange(owner.size)
    small = cutter_of(weights, owner.shape, tolerance=EXACT)
    large = cutter_of(weights, owner.shape, large_region=4)
    found = tree_of(large, region, 0.05)
    assert_same_tree(found, tree_of(small, region, 0.05), tolerance=1e-6)
    leaves = {tokens for tokens, (_, cut) in found.items() if cut > 0.05}
    assert leaves == {frozenset(np.flatnonzero(owner.ravel() == k).tolist()) for k in range(4)}
    assert large.record.large == large.record.cuts == small.record.cuts == 7
    assert small.record.large == 0
    assert 0 <= small.record.largest_residual <= 1e-6
    assert 0 <= large.record.largest_residual <= 1e-4


def test_the_parts_of_a_large_regions_sides_are_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    cutter = cutter_of(grid_graph((6, 1)), (6, 1), large_region=2)
    middle = np.array([2, 3], np.int32)
    monkeypatch.setattr(cutter, "cut", lambda tokens: (0.25, middle, np.setdiff1d(tokens, middle)))
    rows = [(tokens.tolist(), birth) for tokens, birth, _ in cutter.tree(np.arange(6, dtype=np.int32), 0.3, 0.1)]
    assert rows[0] == ([0, 1, 2, 3, 4, 5], 0.1)
    assert sorted(rows[1:]) == [([0, 1], 0.25), ([2, 3], 0.25), ([4, 5], 0.25)]


def test_a_region_that_becomes_small_goes_on_in_the_kernel() -> None:
    owner = np.repeat(np.arange(4), 3)[None, :].repeat(4, axis=0)
    weights = blocks_graph(owner)
    mixed = cutter_of(weights, owner.shape, large_region=24, tolerance=EXACT)
    small = cutter_of(weights, owner.shape, tolerance=EXACT)
    assert_same_tree(tree_of(mixed, np.arange(48), 0.05), tree_of(small, np.arange(48), 0.05), tolerance=1e-6)
    assert 0 < mixed.record.large < mixed.record.cuts
    assert mixed.record.cuts == small.record.cuts


def test_thousands_of_cuts_in_a_row_of_a_large_region(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 1500
    first = np.arange(n - 1)
    graph = csr_array((np.ones(n - 1), (first, first + 1)), shape=(n, n))
    cutter = RegionCutter(csr_array(graph + graph.T), (1, n), large_region=1)
    calls = 0

    def peel(tokens: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        nonlocal calls
        calls += 1
        return 0.0, tokens[:1], tokens[1:]

    monkeypatch.setattr(cutter, "cut", peel)
    rows = list(cutter.tree(np.arange(n, dtype=np.int32), 0.5))
    assert calls == n - 1
    assert len(rows) == 2 * n - 1


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiny_regions_by_either_path(size: int) -> None:
    weights = grid_graph((1, 3), 2)
    for large_region in (1, 100):
        found = tree_of(cutter_of(weights, (1, 3), large_region=large_region), np.arange(size), np.inf)
        leaves = {tokens for tokens, (_, cut) in found.items() if cut == np.inf}
        assert leaves == {frozenset({i}) for i in range(size)}


def test_masks_and_token_numbers_are_each_others_inverse() -> None:
    rng = np.random.default_rng(0)
    for grid in ((4, 7), (7, 4)):
        cutter = cutter_of(grid_graph(grid), grid)
        mask = rng.random(28) < 0.4
        tokens = cutter.tokens_of(mask)
        assert np.all(np.diff(tokens) > 0)
        assert np.array_equal(cutter.mask_of(tokens), mask)


def test_components_are_those_of_the_grid() -> None:
    mask = np.array([[1, 0, 0, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0]], bool)
    cutter = cutter_of(grid_graph((3, 5)), (3, 5))
    parts = {tokens_in(cutter, part) for part in cutter.components(cutter.tokens_of(mask.ravel()))}
    assert parts == {frozenset({0, 6}), frozenset({3, 4}), frozenset({13})}


@pytest.mark.parametrize("bad", [0.0, -0.5, np.nan, np.inf])
def test_weights_that_are_not_positive(bad: float) -> None:
    graph = csr_array(grid_graph((3, 4)))
    graph.data[5] = bad
    with pytest.raises(ValueError, match="affinity must have positive weights"):
        RegionCutter(graph, (3, 4))


@pytest.mark.parametrize("grid", [(3, 5), (12, 2), (0, 12), (-3, -4)])
def test_grids_that_do_not_hold_the_tokens(grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="grid"):
        RegionCutter(csr_array(grid_graph((3, 4))), grid)


def test_the_callers_graph_stays_as_it_was() -> None:
    graph = csr_array(grid_graph((3, 8)))
    before = graph.copy()
    cutter = RegionCutter(graph, (3, 8))
    cutter.cut(cutter.tokens_of(np.ones(24, bool)))
    for name in ("data", "indices", "indptr"):
        assert np.array_equal(getattr(graph, name), getattr(before, name))


@pytest.mark.parametrize("grid", [(13, 18), (18, 13)])
def test_any_number_of_threads_gives_the_same_bytes(grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = csr_array(grid_graph(grid, 7))
    maps = some_maps(grid[0] * grid[1], 7)
    found = []
    # Parts of more than this are shared out anew, and so few tokens are left to one thread otherwise.
    for threads, whole, alone in ((1, 4096, 512), (2, 4096, 0), (4, 4096, 0), (1, 30, 0), (2, 30, 0), (4, 2, 0)):
        monkeypatch.setattr(instances, "_WHOLE_UP_TO", whole)
        monkeypatch.setattr(instances, "_ALONE_UP_TO", alone)
        cutter = RegionCutter(weights, grid, threads=threads)
        candidates = propose(maps, cutter, cut_thresholds=[0.1, 0.3])
        found.append((candidates, cutter.record, select(candidates, min_merit=0.1)))
    assert len(found[0][0]) > 20
    for candidates, record, chosen in found[1:]:
        assert candidates.tokens.tobytes() == found[0][0].tokens.tobytes()
        assert candidates.ends.tobytes() == found[0][0].ends.tobytes()
        assert candidates.multiplicity.tobytes() == found[0][0].multiplicity.tobytes()
        assert candidates.own_votes().tobytes() == found[0][0].own_votes().tobytes()
        assert record == found[0][1]
        assert np.array_equal(chosen, found[0][2])


def test_regions_that_several_thresholds_share_are_cut_once() -> None:
    grid = (8, 9)
    values = np.random.default_rng(0).standard_normal(72)
    once, thrice = (cutter_of(grid_graph(grid, 2), grid) for _ in range(2))
    one = propose([(values, [0.0])], once, cut_thresholds=[0.4])
    three = propose([(values, [0.0, 0.0]), (values.copy(), [0.0])], thrice, cut_thresholds=[0.4])
    assert thrice.record == once.record
    assert once.record.cuts > 3
    assert as_counter(three) == {region: 3 * times for region, times in as_counter(one).items()}
    assert three.partitions == 3


@pytest.mark.parametrize("grid", [(4, 9), (9, 4)])
def test_marks_that_coincide_dont_make_regions_the_same(grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weights, maps = grid_graph(grid, 3), some_maps(36, 3)
    expected = propose(maps, cutter_of(weights, grid), cut_thresholds=[0.3, 0.8])
    cutter = cutter_of(weights, grid)
    monkeypatch.setattr(cutter, "_salts", np.zeros(36, np.int64))
    found = propose(maps, cutter, cut_thresholds=[0.3, 0.8])
    assert as_counter(found) == as_counter(expected)
    assert len({int(mask.sum()) for mask in found.masks}) < len(found)


def test_edges_beyond_the_neighbouring_tokens_dont_join_parts_of_the_foreground() -> None:
    grid = (6, 7)
    flat = np.arange(42)
    apart = np.maximum(
        np.abs(flat[:, None] // 7 - flat // 7), np.abs(flat[:, None] % 7 - flat % 7)
    )  # Chebyshev distance on the grid
    weights = np.where((apart > 0) & (apart <= 2), 1.0, 0.0)
    values = np.zeros(42)
    values[flat % 7 != 3] = 1
    found = propose([(values, [0.5])], cutter_of(weights, grid), cut_thresholds=[1e-6])
    assert as_counter(found) == {
        frozenset(flat[flat % 7 < 3].tolist()): 1,
        frozenset(flat[flat % 7 > 3].tolist()): 1,
    }


def test_the_bands_of_all_threads_stay_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, everything = csr_array(grid_graph((8, 10), 1)), np.arange(80, dtype=np.int32)
    whole = RegionCutter(weights, (8, 10)).cut(everything)
    monkeypatch.setattr(instances, "_ALONE_UP_TO", 0)
    # Room for one region of all tokens, and not for two.
    monkeypatch.setattr(instances, "_BAND_BYTES", 80 * 8 * 25)
    alone = RegionCutter(weights, (8, 10), threads=4)
    assert alone.cut(everything)[0] == whole[0]
    assert alone.record.large == 0
    maps = [(np.ones(80), [0.0]), (np.arange(80.0), [0.0])]
    teams: list[int | None] = []
    monkeypatch.setattr(instances, "Team", lambda threads: teams.append(threads) or Team(threads))
    assert len(propose(maps, alone, cut_thresholds=[0.0])) == 2
    assert set(teams) == {1}
    monkeypatch.setattr(instances, "_BAND_BYTES", 79 * 8 * 25)
    none = RegionCutter(weights, (8, 10))
    assert none.cut(everything)[0] == pytest.approx(whole[0], rel=1e-2)
    assert none.record.large == 1


def test_a_graph_in_read_only_arrays() -> None:
    graph = csr_array(grid_graph((5, 6)))
    for part in (graph.data, graph.indices, graph.indptr):
        part.flags.writeable = False
    values = np.random.default_rng(0).standard_normal(30)
    values.flags.writeable = False
    cutter = RegionCutter(graph, (5, 6))
    found = propose([(values, (0.0,))], cutter, cut_thresholds=[0.3])
    masks = found.masks
    masks.flags.writeable = False
    assert found.votes(masks).tolist() == pytest.approx(found.own_votes().tolist())


def test_no_maps_at_all() -> None:
    found = propose([], cutter_of(grid_graph((3, 4)), (3, 4)), cut_thresholds=[0.1])
    assert len(found) == found.partitions == 0
    assert select(found).shape == (0, 12)


def test_what_holds_one_token_or_none_together() -> None:
    cutter = cutter_of(grid_graph((3, 4)), (3, 4))
    for tokens in ([], [5]):
        assert cutter.fiedler_value(np.array(tokens, np.int32)) == (2.0, 0.0)


def test_maps_with_nan_are_background_there() -> None:
    values = np.ones(12)
    values[[0, 1, 4, 5]] = np.nan
    found = propose([(values, [0.0])], cutter_of(grid_graph((3, 4)), (3, 4)), cut_thresholds=[0.0])
    assert as_counter(found) == {frozenset({2, 3, 6, 7, 8, 9, 10, 11}): 1}


# Proposals


def two_discs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A map that is 1 on two discs and on the one token that joins them, and the discs."""
    y, x = np.mgrid[:11, :21]
    left, right = ((y - 5) ** 2 + (x - c) ** 2 <= 20 for c in (5, 15))
    values = (left | right).astype(float)
    values[5, 10] = 1
    return values, left.ravel(), right.ravel()


def test_two_discs_that_touch_are_two_where_such_a_cut_is_allowed() -> None:
    values, left, right = two_discs()
    cutter = cutter_of(grid_graph((11, 21), None), (11, 21))
    whole = values.ravel() > 0
    one = propose([(values.ravel(), [0.5])], cutter, cut_thresholds=[1e-3])
    assert np.array_equal(one.masks, whole[None])
    assert one.multiplicity.tolist() == [1]
    two = propose([(values.ravel(), [0.5])], cutter, cut_thresholds=[0.04])
    assert len(two.masks) == 2
    assert np.array_equal(two.masks[0] ^ two.masks[1], whole)
    for disc in (left, right):
        best = max(two.masks, key=lambda mask: np.count_nonzero(mask & disc))
        assert np.all(best[disc])
        assert np.count_nonzero(best & ~disc) <= 1
    both = propose([(values.ravel(), [0.5])], cutter, cut_thresholds=[0.04, 1e-3])
    assert sorted(both.multiplicity.tolist()) == [1, 1, 1]
    assert both.partitions == 2


def by_loops(
    weights: np.ndarray,
    grid: tuple[int, int],
    maps: Sequence[tuple[np.ndarray, Sequence[float]]],
    levels: Sequence[float],
    min_tokens: int,
) -> Counter[frozenset[int]]:
    count: Counter[frozenset[int]] = Counter()
    for values, thresholds in maps:
        for threshold in thresholds:
            parts, n_parts = label((values > threshold).reshape(grid), np.ones((3, 3)))
            for level in levels:
                for part in range(1, n_parts + 1):
                    region = np.flatnonzero(parts.ravel() == part)
                    count.update(p for p in one_partition(weights, region, level) if len(p) >= min_tokens)
    return count


def as_counter(candidates: Candidates) -> Counter[frozenset[int]]:
    keys = [frozenset(np.flatnonzero(mask).tolist()) for mask in candidates.masks]
    assert len(set(keys)) == len(keys)
    return Counter(dict(zip(keys, candidates.multiplicity.tolist(), strict=True)))


def some_maps(n: int, seed: int) -> list[tuple[np.ndarray, list[float]]]:
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(n), [-1.5, -0.4, 0.3]), (rng.standard_normal(n), [-3.0, 0.0, 9.0])]


@pytest.mark.parametrize("min_tokens", [1, 2, 4])
@pytest.mark.parametrize(("grid", "seed"), [((5, 6), 0), ((4, 8), 1)])
def test_every_region_of_every_partition_is_counted(grid: tuple[int, int], seed: int, min_tokens: int) -> None:
    weights = grid_graph(grid, seed)
    maps = some_maps(len(weights), seed)
    levels = [0.7, 0.2, 0.45, 1.1]
    found = propose(maps, cutter_of(weights, grid, tolerance=EXACT), cut_thresholds=levels, min_tokens=min_tokens)
    assert found.partitions == 4 * 6
    expected = by_loops(weights, grid, maps, levels, min_tokens)
    assert max(expected.values()) > 1
    assert as_counter(found) == expected
    assert found.masks.dtype == bool


def test_a_picture_on_its_side_has_the_same_regions_on_their_side() -> None:
    grid = (5, 8)
    weights = grid_graph(grid, 3)
    maps = some_maps(40, 3)
    turned = [(values.reshape(grid).T.ravel(), thresholds) for values, thresholds in maps]
    found = propose(maps, cutter_of(weights, grid), cut_thresholds=[0.3, 0.6])
    other = propose(turned, cutter_of(transposed(weights, grid), grid[::-1]), cut_thresholds=[0.3, 0.6])
    other_masks = other.masks.reshape(-1, 8, 5).transpose(0, 2, 1).reshape(-1, 40)
    assert as_counter(found) == as_counter(Candidates.from_masks(other_masks, other.multiplicity, other.partitions))
    np.testing.assert_allclose(np.sort(found.votes(found.masks)), np.sort(other.votes(other.masks)), rtol=1e-12)


@pytest.mark.parametrize("values", [np.zeros(12), np.full(12, np.nan)])
def test_maps_without_anything_above_the_threshold(values: np.ndarray) -> None:
    found = propose([(values, [0.0, 1.0])], cutter_of(grid_graph((3, 4)), (3, 4)), cut_thresholds=[0.1])
    assert found.masks.shape == (0, 12)
    assert found.multiplicity.shape == (0,)
    assert found.partitions == 2
    assert found.votes(np.ones((2, 12), bool)).tolist() == [0, 0]
    assert select(found).shape == (0, 12)
    assert select(found, n_instances=3).shape == (0, 12)


def test_single_token_image() -> None:
    cutter = RegionCutter(csr_array((1, 1)), (1, 1))
    found = propose([(np.ones(1), [0.0])], cutter, cut_thresholds=[0.1])
    assert found.masks.shape == (0, 1)
    alone = propose([(np.ones(1), [0.0])], cutter, cut_thresholds=[0.1], min_tokens=1)
    assert alone.masks.tolist() == [[True]]
    assert alone.votes(alone.masks).tolist() == [1]
    assert split_until(found.masks, 1, cutter).tolist() == [[True]]


# Consensus


def test_votes_are_the_mean_over_partitions_of_summed_overlap() -> None:
    rng = np.random.default_rng(5)
    candidates = Candidates.from_masks(rng.random((9, 30)) < 0.3, rng.integers(1, 4, 9), 25)
    masks = rng.random((4, 30)) < 0.4
    masks[3] = False
    expected = [
        sum(
            times * np.count_nonzero(mask & region) / np.count_nonzero(mask | region)
            for region, times in zip(candidates.masks, candidates.multiplicity, strict=True)
        )
        / 25
        for mask in masks
    ]
    np.testing.assert_allclose(candidates.votes(masks), expected, rtol=1e-6)
    assert candidates.votes(masks)[3] == 0
    assert candidates.votes(np.zeros((0, 30), bool)).shape == (0,)


def test_a_region_of_every_partition_has_all_the_votes() -> None:
    masks = np.eye(2, 6, dtype=bool)
    found = Candidates.from_masks(masks, np.array([7, 3]), 7).votes(masks)
    np.testing.assert_allclose(found, [1, 3 / 7])


def spans(*ends: tuple[int, int]) -> np.ndarray:
    masks = np.zeros((len(ends), 20), bool)
    for mask, (start, stop) in zip(masks, ends, strict=True):
        mask[start:stop] = True
    return masks


def test_regions_are_taken_by_falling_votes_and_lose_what_is_taken() -> None:
    candidates = Candidates.from_masks(spans((9, 20), (0, 10), (4, 8)), np.array([6, 8, 1]), 10)
    votes = candidates.votes(candidates.masks)
    assert np.argsort(-votes).tolist() == [1, 0, 2]
    chosen = select(candidates, min_merit=0.5)
    assert np.array_equal(chosen, spans((0, 10), (10, 20)))
    assert chosen.dtype == bool
    assert len(select(candidates, min_merit=(votes[0] + votes[1]) / 2)) == 1
    assert select(candidates, min_merit=0.99).shape == (0, 20)


@pytest.mark.parametrize(("min_free", "count"), [(0.9, 2), (0.91, 1), (0.0, 2)])
def test_regions_must_be_mostly_free(min_free: float, count: int) -> None:
    candidates = Candidates.from_masks(spans((0, 10), (9, 19)), np.array([9, 8]), 10)
    assert len(select(candidates, min_free=min_free)) == count


def test_a_count_takes_regions_whatever_their_votes() -> None:
    candidates = Candidates.from_masks(spans((0, 10), (10, 15), (15, 20), (0, 5)), np.array([9, 2, 1, 1]), 10)
    assert len(select(candidates)) == 1
    for count in (1, 2, 3):
        assert np.array_equal(select(candidates, n_instances=count), candidates.masks[:count])
    # The fourth lies in the first: there are no four.
    assert len(select(candidates, n_instances=4)) == 3


def test_merit_takes_the_place_of_votes() -> None:
    candidates = Candidates.from_masks(spans((0, 10), (9, 20), (4, 8)), np.array([8, 6, 1]), 10)
    merit = np.array([0.2, 0.5, 0.9])
    # The third is best, the first no longer free enough then; the second is, and too little merit is none.
    assert np.array_equal(select(candidates, merit=merit, min_merit=0.1), spans((4, 8), (9, 20)))
    assert np.array_equal(select(candidates, merit=merit, min_merit=0.5), spans((4, 8), (9, 20)))
    assert np.array_equal(select(candidates, merit=merit, min_merit=0.51), spans((4, 8)))
    assert select(candidates, merit=merit, min_merit=1.0).shape == (0, 20)
    assert np.array_equal(select(candidates, merit=merit, min_merit=1.0, n_instances=1), spans((4, 8)))
    assert merit.tolist() == [0.2, 0.5, 0.9]


def test_of_equal_merit_the_first_is_taken() -> None:
    candidates = Candidates.from_masks(spans((0, 10), (0, 9), (10, 20)), np.array([1, 5, 2]), 10)
    assert np.array_equal(select(candidates, merit=np.ones(3)), spans((0, 10), (10, 20)))


@pytest.mark.parametrize("merit", [np.ones(2), np.ones(4), np.ones((3, 1)), np.array([0.5, np.nan, 1])])
def test_merit_that_does_not_fit(merit: np.ndarray) -> None:
    candidates = Candidates.from_masks(spans((0, 10), (9, 20), (4, 8)), np.array([8, 6, 1]), 10)
    with pytest.raises(ValueError, match=r"merit must be .*\(3,\)"):
        select(candidates, merit=merit)


# Positions within the object


def boxed(grid: tuple[int, int], *boxes: tuple[int, int, int, int]) -> np.ndarray:
    """One mask for each (top, left, bottom, right) box of tokens."""
    masks = np.zeros((len(boxes), *grid), bool)
    for mask, (top, left, bottom, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return masks.reshape(len(boxes), -1)


def said_in(grid: tuple[int, int], *boxes: tuple[int, int, int, int]) -> np.ndarray:
    """(N, 2) positions of objects that fill boxes of tokens, and noise beside them."""
    said = np.random.default_rng(3).uniform(-0.5, 0.5, (*grid, 2))
    for top, left, bottom, right in boxes:
        said[top:bottom, left:right, 0] = (np.arange(right - left) + 0.5) / (right - left) - 0.5
        said[top:bottom, left:right, 1] = ((np.arange(bottom - top) + 0.5) / (bottom - top) - 0.5)[:, None]
    return said.reshape(-1, 2)


def test_a_whole_object_has_no_residual_and_parts_and_pairs_have_one() -> None:
    grid, one, other = (10, 16), (2, 3, 8, 8), (2, 8, 8, 14)
    said = said_in(grid, one, other)
    whole, second, left_half, lower_half, both, beside = position_residuals(
        boxed(grid, one, other, (2, 3, 8, 5), (5, 3, 8, 8), (2, 3, 8, 14), (0, 0, 2, 16)), said, grid
    )
    assert whole == pytest.approx(0, abs=1e-15)
    assert second == pytest.approx(0, abs=1e-15)
    assert min(left_half, lower_half, both, beside) > 0.02
    # By hand: the lower half says 1/12, 3/12 and 5/12 down, where its own box has -1/3, 0 and 1/3.
    assert lower_half == pytest.approx(np.mean((np.array([1, 3, 5]) / 12 - np.array([-4, 0, 4]) / 12) ** 2))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (4, 1), (3, 5), (9, 12)])
def test_tokens_that_say_nothing_leave_the_variance_of_the_box(height: int, width: int) -> None:
    grid = (9, 12)
    found = position_residuals(boxed(grid, (0, 0, height, width)), np.zeros((108, 2)), grid)
    expected = (1 - 1 / height**2) / 12 + (1 - 1 / width**2) / 12
    np.testing.assert_allclose(found, expected, atol=1e-15)
    assert found[0] < 1 / 6


def test_a_single_token_lies_in_the_middle() -> None:
    said = np.array([[0.3, -0.4], [0, 0]])
    np.testing.assert_allclose(position_residuals(np.eye(2, dtype=bool), said, (1, 2)), [0.25, 0])


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (6, 7)])
@pytest.mark.parametrize("spread", [0.0, 0.4])
def test_residuals_are_those_of_plain_loops(grid: tuple[int, int], spread: float) -> None:
    rng = np.random.default_rng(8)
    n = grid[0] * grid[1]
    masks = rng.random((12, n)) < rng.random((12, 1))
    masks[3] = False
    said = 0.1 + spread * rng.standard_normal((n, 2))
    expected = plain.residuals(masks, said, grid)
    np.testing.assert_allclose(position_residuals(masks, said, grid), expected, rtol=1e-12)
    assert position_residuals(masks, said, grid)[3] == 0
    candidates = Candidates.from_masks(masks, np.ones(12), 12)
    np.testing.assert_allclose(candidates.own_residuals(said, grid), expected, rtol=1e-12)
    assert position_residuals(np.zeros((0, n), bool), said, grid).shape == (0,)


def test_residuals_of_any_array() -> None:
    grid, rng = (5, 6), np.random.default_rng(2)
    masks, said = rng.random((4, 30)) < 0.5, rng.uniform(-0.5, 0.5, (30, 2))
    expected = position_residuals(masks, said, grid)
    masks.flags.writeable = said.flags.writeable = False
    assert np.array_equal(position_residuals(masks, said, grid), expected)
    assert np.array_equal(position_residuals(np.asfortranarray(masks), np.asfortranarray(said), grid), expected)
    assert np.array_equal(position_residuals(masks.astype(np.uint8), said, grid), expected)
    np.testing.assert_allclose(position_residuals(masks, said.astype(np.float32), grid), expected, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_positions_that_do_not_fit(bad: float) -> None:
    masks, said = np.ones((2, 30), bool), np.zeros((30, 2))
    candidates = Candidates.from_masks(masks, [1, 1], 2)
    for wrong in (said[:, :1], said[:, 0], np.zeros((30, 3))):
        with pytest.raises(ValueError, match=r"position must be .*\(30, 2\)"):
            position_residuals(masks, wrong, (5, 6))
    for grid in ((5, 5), (30, 2)):
        with pytest.raises(ValueError, match="grid"):
            position_residuals(masks, said, grid)
    # Masks of another image.
    with pytest.raises(ValueError, match=r"position must be .*\(30, 2\)"):
        position_residuals(masks, said[:20], (4, 5))
    with pytest.raises(ValueError, match=r"position must be .*\(30, 2\)"):
        candidates.own_residuals(np.zeros((42, 2)), (6, 7))
    said[7, 1] = bad
    with pytest.raises(ValueError, match="position must be finite"):
        position_residuals(masks, said, (5, 6))


# Exact counts


STARTS = {
    "nothing": [],
    "one": [[0, 1, 4, 5]],
    "in two parts": [[0, 1, 10, 11]],
    "single tokens": [[0], [7]],
    "several": [[0, 1, 2], [5, 6], [11]],
    "everything": [list(range(12))],
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("grid", [(3, 4), (4, 3)])
def test_splitting_gives_any_count_exactly(grid: tuple[int, int], start: str) -> None:
    cutter = cutter_of(grid_graph(grid, 6), grid)
    masks = np.zeros((len(STARTS[start]), 12), bool)
    for mask, tokens in zip(masks, STARTS[start], strict=True):
        mask[tokens] = True
    room = int(masks.sum())
    for count in range(max(1, len(masks)), 13):
        found = split_until(masks, count, cutter)
        assert found.shape == (count, 12)
        assert found.dtype == bool
        assert found.any(axis=1).all()
        assert found.sum(axis=0).max() == 1
        if count <= room:
            # What is split stays within the masks, and none of it is lost.
            assert np.array_equal(found.any(axis=0), masks.any(axis=0))
        else:
            assert found.any(axis=0).all()
        for piece in found:
            assert sum(np.any(piece & mask) for mask in masks) <= 1
            assert all(not np.any(piece & mask) or np.all(mask[piece]) for mask in masks)


def test_enough_masks_are_left_alone() -> None:
    masks = spans((0, 5), (9, 20))
    assert np.array_equal(split_until(masks, 2, cutter_of(grid_graph((4, 5)), (4, 5))), masks)


def test_the_cheapest_cut_comes_first() -> None:
    owner = np.repeat(np.arange(3), 4)[None, :].repeat(5, axis=0)
    cutter = cutter_of(blocks_graph(owner), owner.shape)
    masks = owner.ravel() == np.arange(3)[:, None]
    together = np.array([masks[0] | masks[1], masks[2]])
    found = split_until(together, 3, cutter)
    assert {m.tobytes() for m in found} == {m.tobytes() for m in masks}


def test_more_instances_than_tokens() -> None:
    with pytest.raises(ValueError, match="n_instances is 13, but the image has only 12 tokens"):
        split_until(np.zeros((0, 12), bool), 13, cutter_of(grid_graph((3, 4)), (3, 4)))
