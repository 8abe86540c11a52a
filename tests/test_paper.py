from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.linalg import eigh

from sparsespec import channels, paper
from tests.reference import affinity as reference

FILES = ("FudanPed00017", "FudanPed00035", "PennPed00061")


def _scene(
    grid: tuple[int, int], boxes: list[tuple[slice, slice]], noise: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """Keys of a background and of boxes that share some channels and differ in others, and which box is where."""
    rng = np.random.default_rng(1)
    truth = np.zeros(grid, int)
    for number, box in enumerate(boxes, start=1):
        truth[box] = number
    kinds = rng.standard_normal((len(boxes) + 1, 96)) + 0.5
    kinds[1:, :24] = kinds[-1, :24]
    keys = kinds[truth.ravel()] + noise * rng.standard_normal((truth.size, 96))
    return keys.astype(np.float32), truth


TWO_BOXES = [(slice(2, 9), slice(1, 4)), (slice(2, 9), slice(7, 11))]


def test_foreground_is_the_minority() -> None:
    keys, truth = _scene((12, 14), TWO_BOXES[:1])
    found = paper.foreground(keys, (12, 14))
    # The median rounds the corners of the box.
    corners = np.zeros((12, 14), bool)
    corners[np.ix_((2, 8), (1, 3))] = True
    assert np.array_equal(found.mask, (truth > 0) & ~corners)
    assert np.array_equal(found.fiedler > 0, truth.ravel() > 0)
    assert np.array_equal(found.keep, channels.noise_channel_reduction(keys))


def test_foreground_solves_the_generalized_problem() -> None:
    keys, _ = _scene((6, 7), TWO_BOXES[:1], noise=0.5)
    found = paper.foreground(keys, (6, 7))
    kept = channels.normalize_tokens(keys)[:, found.keep].astype(np.float64)
    weights = np.maximum(kept @ kept.T, 0)
    weights /= weights.max()
    degrees = np.diag(weights.sum(axis=1))
    values, vectors = eigh(degrees - weights, degrees, subset_by_index=[0, 4])
    np.testing.assert_allclose(found.eigenvalues, values, atol=1e-12)
    np.testing.assert_allclose(np.abs(found.fiedler @ degrees @ vectors[:, 1]), 1, rtol=1e-9)
    assert np.count_nonzero(found.fiedler > 0) <= found.fiedler.size / 2


@pytest.mark.parametrize("keys", [np.ones((12, 6)), np.zeros((12, 6)), np.arange(1.0, 13.0)[:, None] * np.ones(6)])
def test_nothing_stands_out_where_all_tokens_are_alike(keys: np.ndarray) -> None:
    found = paper.foreground(keys, (3, 4))
    assert not found.mask.any()
    assert not found.fiedler.any()


@pytest.mark.parametrize("n_tokens", [1, 2, 3])
def test_few_tokens(n_tokens: int) -> None:
    keys = np.random.default_rng(0).standard_normal((n_tokens, 9))
    front = paper.foreground(keys, (1, n_tokens))
    assert front.mask.shape == (1, n_tokens)
    assert front.eigenvalues.size == n_tokens
    back = paper.instances(keys, (1, n_tokens), np.ones((1, n_tokens), bool), 2)
    assert back.labels.max() == min(2, n_tokens)


def test_tokens_of_zeros_are_no_obstacle() -> None:
    keys, truth = _scene((12, 14), TWO_BOXES[:1])
    keys[:5] = 0
    found = paper.foreground(keys, (12, 14))
    assert np.isfinite(found.eigenvalues).all()
    np.testing.assert_allclose(found.fiedler[:5], 0, atol=1e-9)
    assert np.array_equal(found.fiedler > 1e-9, truth.ravel() > 0)


def test_a_mask_on_two_borders_is_inverted() -> None:
    mask = np.ones((10, 10), bool)
    mask[3:7, 3:8] = False
    cleaned = paper.clean_mask(mask)
    assert cleaned[4, 5]
    assert not cleaned[[0, -1]].any()
    one_border = np.zeros((10, 10), bool)
    one_border[6:] = True
    assert np.array_equal(paper.clean_mask(one_border), one_border)


def test_small_parts_go_and_holes_are_filled() -> None:
    mask = np.zeros((14, 14), bool)
    mask[2:8, 2:8] = True
    mask[4:6, 4:6] = False
    mask[11:13, 11] = True
    cleaned = paper.clean_mask(mask)
    expected = np.zeros((14, 14), bool)
    expected[2:8, 2:8] = True
    expected[np.ix_((2, 7), (2, 7))] = False
    assert np.array_equal(cleaned, expected)
    mask[10:13, 11:13] = True
    # 6 of 32 tokens is no small part; the median leaves its middle.
    assert paper.clean_mask(mask)[11, 11]


@pytest.mark.parametrize("mask", [np.zeros((4, 5), bool), np.ones((4, 5), bool), np.zeros((1, 1), bool)])
def test_clean_mask_of_nothing(mask: np.ndarray) -> None:
    assert not paper.clean_mask(mask).any()


def test_instances_are_the_boxes_largest_first() -> None:
    keys, truth = _scene((12, 14), TWO_BOXES)
    found = paper.instances(keys, (12, 14), truth > 0, 2)
    assert found.labels.dtype == np.int32
    expected = np.array([0, 2, 1])[truth]
    assert np.array_equal(found.labels, expected)
    again = paper.instances(keys, (12, 14), truth > 0, 2, rng=np.random.default_rng(7))
    assert np.array_equal(again.labels, expected)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_instances_as_many_as_asked_for(count: int) -> None:
    keys, truth = _scene((12, 14), TWO_BOXES)
    found = paper.instances(keys, (12, 14), truth > 0, count)
    assert np.unique(found.labels[truth > 0]).tolist() == (list(range(1, count + 1)) or [0])
    assert not found.labels[truth == 0].any()
    sizes = np.bincount(found.labels.ravel())[1:]
    assert np.all(np.diff(sizes) <= 0)


def test_the_same_seed_gives_the_same_labels() -> None:
    keys, truth = _scene((12, 14), TWO_BOXES, noise=1.0)
    first, second = (paper.instances(keys, (12, 14), truth > 0, 4, rng=3) for _ in range(2))
    assert first.labels.tobytes() == second.labels.tobytes()
    assert first.eigenvectors.tobytes() == second.eigenvectors.tobytes()


@pytest.mark.parametrize("inside", [slice(2, 9), slice(0, 12), slice(3, 3)])
def test_instance_eigenpairs_solve_the_whole_dense_problem(inside: slice) -> None:
    keys, _ = _scene((12, 14), TWO_BOXES)
    mask = np.zeros((12, 14), bool)
    mask[inside] = True
    found = paper.instances(keys, (12, 14), mask, 2)
    tokens = channels.normalize_tokens(keys[:, channels.channels_by_entropy(keys, normalize=False)])
    kept = tokens[:, channels.deviation_channel_reduction(tokens)] * mask.reshape(-1, 1)
    weights = reference.boc(kept)
    weights /= weights.max()
    degrees = np.diag(weights.sum(axis=1))
    np.testing.assert_allclose(found.eigenvalues, eigh(degrees - weights, degrees, eigvals_only=True)[:5], atol=1e-6)
    gram = found.eigenvectors.T @ degrees @ found.eigenvectors
    np.testing.assert_allclose(gram, np.eye(5), atol=1e-6)
    residual = (degrees - weights - found.eigenvalues[:, None, None] * degrees) @ found.eigenvectors.T[:, :, None]
    np.testing.assert_allclose(residual, 0, atol=1e-5)


@pytest.mark.parametrize("keep", [1.0, 1 / 3])
@pytest.mark.parametrize("keep_deviation", [None, 20])
@pytest.mark.parametrize("weights", ["boc", "cosine"])
def test_steps_can_be_left_out(keep: float, keep_deviation: int | None, weights: str) -> None:
    keys, truth = _scene((12, 14), TWO_BOXES)
    mask = truth > 0
    found = paper.instances(keys, (12, 14), mask, 2, keep=keep, keep_deviation=keep_deviation, weights=weights)
    quiet = channels.channels_by_entropy(keys, keep, normalize=False)
    tokens = channels.normalize_tokens(keys[:, quiet])
    loud = slice(None) if keep_deviation is None else channels.deviation_channel_reduction(tokens, keep_deviation)
    assert np.array_equal(found.keep, quiet[loud])
    kept = tokens[:, loud].astype(np.float64) * mask.reshape(-1, 1)
    matrix = reference.boc(kept) if weights == "boc" else np.maximum(kept @ kept.T, 0)
    # A token of zeros has no product with anything: it is not part of that graph.
    nodes = np.arange(mask.size) if weights == "boc" else np.flatnonzero(mask)
    matrix = (matrix / matrix.max())[np.ix_(nodes, nodes)]
    degrees = np.diag(matrix.sum(axis=1))
    np.testing.assert_allclose(found.eigenvalues, eigh(degrees - matrix, degrees, eigvals_only=True)[:5], atol=1e-6)
    assert not found.eigenvectors[np.setdiff1d(np.arange(mask.size), nodes)].any()
    assert np.array_equal(found.labels > 0, mask)
    assert found.labels.max() == 2


def test_the_foreground_can_do_without_ncr() -> None:
    keys, truth = _scene((12, 14), TWO_BOXES[:1])
    found = paper.foreground(keys, (12, 14), keep=1.0)
    assert found.keep.size == keys.shape[1]
    assert np.array_equal(found.fiedler > 0, truth.ravel() > 0)


@pytest.mark.parametrize("inside", [0, 1, 2])
def test_products_of_few_tokens(inside: int) -> None:
    keys = np.random.default_rng(0).standard_normal((6, 9))
    found = paper.instances(keys, (2, 3), np.arange(6).reshape(2, 3) < inside, 2, weights="cosine")
    assert found.labels.max() == inside
    assert np.isfinite(found.eigenvectors).all()


def test_an_empty_foreground_has_no_instances() -> None:
    keys, _ = _scene((12, 14), TWO_BOXES)
    assert not paper.instances(keys, (12, 14), np.zeros((12, 14), bool), 3).labels.any()


def test_arguments_are_named() -> None:
    keys, _ = _scene((6, 7), TWO_BOXES[:1])
    mask = np.ones((6, 7), bool)
    with pytest.raises(ValueError, match='method="paper" needs n_instances'):
        paper.instances(keys, (6, 7), mask, None)
    with pytest.raises(ValueError, match="n_instances must be an integer of at least 0, not -1"):
        paper.instances(keys, (6, 7), mask, -1)
    with pytest.raises(ValueError, match=r"foreground_mask must have the shape of the grid, \(6, 7\), not \(7, 6\)"):
        paper.instances(keys, (6, 7), mask.T, 1)
    with pytest.raises(ValueError, match="grid"):
        paper.foreground(keys, (7, 7))
    with pytest.raises(ValueError, match="10001 tokens"):
        paper.foreground(np.ones((10001, 1)), (1, 10001))
    with pytest.raises(ValueError, match="weights must be one of 'boc', 'cosine', not 'dot'"):
        paper.instances(keys, (6, 7), mask, 1, weights="dot")
    with pytest.raises(ValueError, match="keep"):
        paper.foreground(keys, (6, 7), keep=0.0)
    keys[3] = np.nan
    with pytest.raises(ValueError, match="keys must be finite"):
        paper.foreground(keys, (6, 7))
    with pytest.raises(ValueError, match="keys must be finite"):
        paper.instances(keys, (6, 7), mask, 1)


@pytest.mark.parametrize("name", FILES)
def test_parity_with_the_released_reference(shared_dir: Path, name: str) -> None:
    numbers = np.load(shared_dir / "reference" / f"{name}.npz")
    keys, (height, width) = numbers["keys"], numbers["grid"]
    grid = int(height), int(width)
    front = paper.foreground(keys, grid)
    np.testing.assert_allclose(front.eigenvalues, numbers["foreground_eigenvalues"], atol=1e-5)
    fiedler = numbers["foreground_fiedler"].astype(np.float64)
    cosine = front.fiedler @ fiedler / np.linalg.norm(front.fiedler) / np.linalg.norm(fiedler)
    assert cosine > 0.9999, "the sign is part of it"
    assert np.array_equal(front.mask, numbers["foreground_mask"] > 0)

    mask = numbers["foreground_mask"] > 0
    found = paper.instances(keys, grid, mask, int(numbers["instance_count"]))
    np.testing.assert_allclose(found.eigenvalues, numbers["instance_eigenvalues"], atol=1e-5)
    # The eigenvalue shared by all contrasts between background tokens leaves its vectors open: compare the others.
    values, theirs = numbers["instance_eigenvalues"], numbers["instance_eigenvectors"].astype(np.float64)
    single = [i for i in range(5) if np.sum(np.abs(values - values[i]) < 1e-6) == 1]
    assert 0 in single
    for i in single:
        cosine = (
            found.eigenvectors[:, i] @ theirs[i] / np.linalg.norm(found.eigenvectors[:, i]) / np.linalg.norm(theirs[i])
        )
        assert abs(cosine) > 0.9999
    shared = np.setdiff1d(np.arange(5), single)
    assert np.abs(theirs[shared][:, mask.ravel()]).max() < 1e-8, "contrasts are zero in the foreground"
    assert not found.eigenvectors[np.ix_(mask.ravel(), shared)].any()
    labels = numbers["instance_labels"]
    assert np.array_equal(found.labels > 0, labels > 0)
    if numbers["instance_count"] == 1:
        assert np.array_equal(found.labels, labels)
