from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsespec import channels
from tests.reference import channels as reference

FILES = ("FudanPed00017", "FudanPed00035", "PennPed00061")
LAYOUTS: dict[str, Callable[[np.ndarray], Any]] = {
    "float64": lambda features: features.astype(np.float64),
    "read-only": lambda features: np.frombuffer(features.tobytes(), np.float32).reshape(features.shape),
    "not contiguous": lambda features: np.repeat(np.repeat(features, 2, axis=0), 3, axis=1)[::2, ::3],
    "column-major": np.asfortranarray,
    "list": lambda features: features.tolist(),
}
# Kernels are compiled once more for arrays that cannot be written to, which takes longest.
CHANGES = [pytest.param(c, marks=[pytest.mark.slow] * (c == "read-only")) for c in sorted(LAYOUTS)]


@pytest.fixture
def features(rng: np.random.Generator) -> np.ndarray:
    return (rng.standard_normal((90, 12)) ** 3).astype(np.float32)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bins", [1, 7, 30])
def test_entropy_is_that_of_numpy_histogram(features: np.ndarray, bins: int, normalize: bool) -> None:
    found = channels.channel_entropy(features, bins, normalize=normalize)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, reference.channel_entropy(features, bins, normalize=normalize), rtol=1e-12)


@pytest.mark.skipif(np.__version__.startswith("1."), reason="NumPy 1 rounds values on bin edges in another way")
def test_entropy_counts_values_on_bin_edges_as_numpy_does() -> None:
    features = np.repeat(np.arange(31, dtype=np.float32)[:, None] / 10, 2, axis=1)
    found = channels.channel_entropy(features, 30, normalize=False)
    np.testing.assert_allclose(found, reference.channel_entropy(features, 30, normalize=False), rtol=1e-12)


def test_entropy_of_a_uniform_histogram_is_known() -> None:
    features = np.arange(64.0)[:, None] % 8
    np.testing.assert_allclose(channels.channel_entropy(features, 8, normalize=False), [3.0], rtol=1e-6)


def test_a_channel_with_an_empty_bin_ranks_noisiest(rng: np.random.Generator) -> None:
    angle = rng.uniform(0, np.pi / 2, 200)
    two_sided = np.where(angle < np.pi / 4, 0.1, 0.9)
    unit = np.stack([two_sided, *(np.sqrt(1 - two_sided**2) * np.array([np.cos(angle), np.sin(angle)]))], axis=1)
    entropy = channels.channel_entropy(unit, 4)
    np.testing.assert_allclose(entropy, reference.channel_entropy(unit, 4), rtol=1e-12)
    assert entropy[0] == 5.0
    assert np.all(entropy[1:] < 2.0)
    assert channels.noise_channel_reduction(unit, 2 / 3, 4).tolist() == [1, 2]
    # With smoothed counts the same channel is the most structured one.
    assert channels.noise_channel_reduction(unit, 1 / 3, 4, normalize=False).tolist() == [0]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e6])
def test_constant_channels(features: np.ndarray, value: float, normalize: bool) -> None:
    constant = np.full((20, 3), value)
    entropy = channels.channel_entropy(constant, normalize=normalize)
    if normalize:
        assert entropy.tolist() == [5.0] * 3
    else:
        mixed = features.copy()
        mixed[:, 4] = value
        assert np.argmin(channels.channel_entropy(mixed, normalize=False)) == 4
    assert channels.channel_deviation(constant).tolist() == [0.0] * 3


@pytest.mark.parametrize("normalize", [True, False])
def test_one_token_and_one_channel(normalize: bool) -> None:
    one_token = np.array([[1.0, -2.0, 3.0]])
    entropy = channels.channel_entropy(one_token, normalize=normalize)
    assert np.ptp(entropy) == 0
    assert np.isfinite(entropy).all()
    assert channels.noise_channel_reduction(one_token, normalize=normalize).tolist() == [0]
    assert channels.channel_deviation(one_token).tolist() == [0.0, 0.0, 0.0]
    assert channels.deviation_channel_reduction(one_token, 2).tolist() == [0, 1]
    assert channels.noise_channel_reduction(one_token.T, normalize=normalize).tolist() == [0]


@pytest.mark.parametrize("normalize", [True, False])
def test_rows_of_zeros_count_as_zeros(features: np.ndarray, normalize: bool) -> None:
    features[10:20] = 0
    np.testing.assert_allclose(
        channels.channel_entropy(features, normalize=normalize),
        reference.channel_entropy(features, normalize=normalize),
        rtol=1e-12,
    )
    assert not channels.normalize_tokens(features)[10:20].any()


def test_normalize_tokens(features: np.ndarray) -> None:
    found = channels.normalize_tokens(features)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference.unit_tokens(features), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


def test_noise_channel_reduction_keeps_the_lowest_entropies_sorted(features: np.ndarray) -> None:
    entropy = channels.channel_entropy(features, 8)
    kept = channels.noise_channel_reduction(features, 0.5, 8)
    assert kept.tolist() == sorted(kept.tolist())
    assert kept.size == 6
    assert entropy[kept].max() <= np.delete(entropy, kept).min()
    by_entropy = channels.channels_by_entropy(features, 0.5, 8)
    assert np.all(np.diff(entropy[by_entropy]) >= 0)
    assert set(by_entropy) == set(kept)


def test_equal_entropies_keep_the_first_channels(features: np.ndarray) -> None:
    same = np.repeat(features[:, :1], 6, axis=1)
    assert channels.noise_channel_reduction(same, 0.5).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("n_channels", "keep", "count"), [(384, 1 / 3, 128), (7, 1 / 3, 2), (2, 1 / 3, 1), (5, 1.0, 5)]
)
def test_share_of_channels_kept(rng: np.random.Generator, n_channels: int, keep: float, count: int) -> None:
    assert channels.noise_channel_reduction(rng.standard_normal((4, n_channels)), keep).size == count


def test_deviation(features: np.ndarray) -> None:
    features += 1000 * np.arange(12, dtype=np.float32)
    found = channels.channel_deviation(features)
    np.testing.assert_allclose(found, reference.channel_deviation(features), rtol=1e-9)
    order = channels.deviation_channel_reduction(features, 5)
    assert order.tolist() == np.argsort(-reference.channel_deviation(features))[:5].tolist()


def test_deviation_ties_and_more_channels_than_there_are() -> None:
    features = np.array([[0.0, 0.0, 5.0, 1.0], [1.0, 2.0, 5.0, 2.0]])
    assert channels.deviation_channel_reduction(features).tolist() == [1, 0, 3, 2]


@pytest.mark.parametrize("change", CHANGES)
def test_layouts_and_types_give_the_same_answer(features: np.ndarray, change: str) -> None:
    given = LAYOUTS[change](features)
    before = features.copy()
    assert np.array_equal(channels.channel_entropy(given), channels.channel_entropy(features))
    assert np.array_equal(channels.channel_deviation(given), channels.channel_deviation(features))
    assert np.array_equal(channels.normalize_tokens(given), channels.normalize_tokens(features))
    assert np.array_equal(features, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e20])
@pytest.mark.parametrize(
    "function",
    [
        channels.normalize_tokens,
        channels.channel_entropy,
        channels.noise_channel_reduction,
        channels.channel_deviation,
        channels.deviation_channel_reduction,
    ],
)
def test_values_that_are_no_numbers_are_named(features: np.ndarray, function, bad: float) -> None:  # type: ignore[no-untyped-def]
    features[[3, 70], [0, 5]] = bad
    with pytest.raises(ValueError, match=r"features must be finite .* 2 of 90 rows .* rows 3, 70"):
        function(features)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros(4), r"features .*\(4,\)"),
        (np.zeros((0, 4)), r"features .*\(0, 4\)"),
        (np.zeros((4, 0)), r"features .*\(4, 0\)"),
        (np.zeros((2, 2), complex), "real numbers"),
        (np.array([["a"]]), "real numbers"),
    ],
)
def test_features_of_the_wrong_kind(given: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        channels.channel_entropy(given)


@pytest.mark.parametrize("keep", [0, -0.1, 1.5, np.nan])
def test_share_outside_its_range(features: np.ndarray, keep: float) -> None:
    with pytest.raises(ValueError, match="keep"):
        channels.noise_channel_reduction(features, keep)


@pytest.mark.parametrize("count", [0, -3, 2.5, True])
def test_counts_outside_their_range(features: np.ndarray, count: int) -> None:
    with pytest.raises(ValueError, match="keep must be an integer of at least 1"):
        channels.deviation_channel_reduction(features, count)
    with pytest.raises(ValueError, match="bins must be an integer of at least 1"):
        channels.channel_entropy(features, count)


@pytest.mark.parametrize("name", FILES)
def test_parity_with_the_released_reference(shared_dir: Path, name: str) -> None:
    numbers = np.load(shared_dir / "reference" / f"{name}.npz")
    keys = numbers["keys"]
    for normalize, variant in ((True, "foreground"), (False, "instance")):
        entropy = channels.channel_entropy(keys, normalize=normalize)
        np.testing.assert_allclose(entropy, numbers[f"ncr_entropy_{variant}"], rtol=1e-5)
        kept = channels.noise_channel_reduction(keys, normalize=normalize)
        assert np.array_equal(kept, numbers[f"ncr_keep_{variant}"])
    # The reference goes on with the channels in the order of their entropy, where equal entropies may change places.
    by_entropy = channels.channels_by_entropy(keys, normalize=False)
    tokens = channels.normalize_tokens(keys[:, by_entropy])
    deviation = channels.channel_deviation(tokens)
    kept = channels.deviation_channel_reduction(tokens)
    entropy = numbers["ncr_entropy_instance"][by_entropy]
    np.testing.assert_allclose(np.sort(deviation), np.sort(numbers["dcr_std"]), rtol=1e-5)
    np.testing.assert_allclose(deviation[kept], numbers["dcr_std"][numbers["dcr_keep"]], rtol=1e-5)
    assert np.array_equal(entropy[kept], entropy[numbers["dcr_keep"]])


# Both reductions in a row


@pytest.mark.parametrize(("keep", "keep_deviation"), [(1 / 3, 60), (0.5, 3), (1.0, 12), (0.01, 1)])
def test_instance_channels_are_the_quiet_ones_that_vary_most(
    features: np.ndarray, keep: float, keep_deviation: int
) -> None:
    features[11] = 0
    kept = max(1, int(12 * keep + 1e-9))
    quiet = np.sort(np.argsort(reference.channel_entropy(features, normalize=False), kind="stable")[:kept])
    tokens = reference.unit_tokens(features[:, quiet])
    order = np.argsort(-reference.channel_deviation(tokens), kind="stable")[:keep_deviation]
    found = channels.instance_channels(features, keep, keep_deviation)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, tokens[:, order], atol=1e-6)
    assert not found[11].any()
    assert np.all(np.linalg.norm(found, axis=1) <= 1 + 1e-6)


@pytest.mark.parametrize("keep", [1 / 3, 1.0, 0.01])
def test_instance_channels_without_the_second_reduction(features: np.ndarray, keep: float) -> None:
    features[11] = 0
    quiet = channels.noise_channel_reduction(features, keep, normalize=False)
    found = channels.instance_channels(features, keep, None)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    # In their own order, and still of unit length: nothing was taken away after that.
    np.testing.assert_allclose(found, reference.unit_tokens(features[:, quiet]), atol=1e-6)
    np.testing.assert_allclose(np.delete(np.linalg.norm(found, axis=1), 11), 1, atol=1e-6)
    assert not found[11].any()
    as_many = channels.instance_channels(features, keep, quiet.size)
    assert np.array_equal(np.sort(as_many, axis=1), np.sort(found, axis=1))


@pytest.mark.parametrize("layout", CHANGES)
def test_instance_channels_of_any_array(features: np.ndarray, layout: str) -> None:
    before = features.copy()
    assert np.array_equal(channels.instance_channels(LAYOUTS[layout](features)), channels.instance_channels(before))
    assert np.array_equal(features, before)


def test_instance_channels_of_one_token_and_of_equal_tokens() -> None:
    token = np.array([[3.0, 4.0, 0.0]])
    np.testing.assert_allclose(channels.instance_channels(token, 1.0), [[0.6, 0.8, 0.0]])
    np.testing.assert_allclose(channels.instance_channels(token.repeat(4, axis=0), 1.0), [[0.6, 0.8, 0.0]] * 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "keep must be a share"),
        ((1 / 3, 0), "keep_deviation must be an integer"),
        ((1 / 3, True), "keep_deviation must be"),
    ],
)
def test_instance_channels_validate(features: np.ndarray, arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        channels.instance_channels(features, *arguments)  # type: ignore[arg-type]
    features[4, 4] = np.nan
    with pytest.raises(ValueError, match="features must be finite"):
        channels.instance_channels(features)
