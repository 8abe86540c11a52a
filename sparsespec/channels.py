"""Which channels of the token features carry objects: noise (NCR) and deviation (DCR) channel reduction.

Both follow the paper on SpecUnIIS: channels whose histogram over the tokens has a high entropy are noise, and of the
channels that stay, those with a high standard deviation tell instances apart.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparsespec._checks import check_count, check_features
from sparsespec._kernels import channels as kernels

FloatArray = npt.NDArray[np.float32]
IndexArray = npt.NDArray[np.intp]

# Above every entropy of a channel without an empty bin, log2(bins C) / C, for any sensible C and number of bins.
EMPTY_BIN_ENTROPY = 5.0
SMOOTHING = 1e-6


def normalize_tokens(features: npt.ArrayLike) -> FloatArray:
    """Scale every token to unit length, x / |x|.

    Parameters
    ----------
    features
        (N, C) real numbers, taken as float32.

    Returns
    -------
    (N, C) float32 array
        A token of zeros stays zero.

    Raises
    ------
    ValueError
        Not an (N, C) array with at least one row and column, or a value that is NaN, infinite or beyond 1e15.
    """
    array = check_features(features)
    return array / _token_norms(array)[:, None]


def channel_entropy(features: npt.ArrayLike, bins: int = 30, *, normalize: bool = True) -> npt.NDArray[np.float64]:
    """Entropy of each channel's histogram over the tokens, in bits.

    With n_b the number of tokens in bin b of ``bins`` equal bins from the channel's smallest to its largest value (the
    last bin holds its right edge), N tokens and C channels:

    - ``normalize=True``, the foreground's variant: the histogram is of tokens scaled to unit length, and
      ``H = -sum_b p_b log2 p_b`` with ``p_b = n_b / (N C)``. A channel with an empty bin gets 5: it ranks noisiest.
    - ``normalize=False``, the instances' variant: the histogram is of the features as they are, and
      ``p_b = (n_b + 1e-6) / (N C)``. An empty bin adds next to nothing.

    Parameters
    ----------
    features
        (N, C) real numbers, one row per token, taken as float32.
    bins
        Number of bins, at least 1.
    normalize
        Which of the two variants.

    Returns
    -------
    (C,) float64 array
        Low is structured, high is noise. A constant channel, and so every channel of a single token, fills one bin: it
        gets 5 with ``normalize=True`` and the lowest entropy there is without. A token of zeros counts as zeros.

    Raises
    ------
    ValueError
        ``features`` isn't an (N, C) array with at least one row and column or holds NaN, infinity or a value beyond
        1e15; ``bins`` is below 1.

    Examples
    --------
    >>> import numpy as np
    >>> spread, flat = np.arange(8.0), np.ones(8)
    >>> channel_entropy(np.stack([spread, flat], axis=1), bins=4, normalize=False).round(3)
    array([1.5, 0.5])
    """
    array = check_features(features)
    bins = check_count(bins, name="bins")
    n_tokens, n_channels = array.shape
    norms = _token_norms(array) if normalize else np.ones(n_tokens, np.float32)
    lowest = np.empty(n_channels, np.float32)
    highest = np.empty(n_channels, np.float32)
    kernels.channel_range(array, norms, lowest, highest)
    counts = np.zeros((n_channels, bins), np.int64)
    kernels.channel_histogram(array, norms, _bin_edges(lowest, highest, bins), counts)

    share = (counts if normalize else counts + SMOOTHING) / (n_tokens * n_channels)
    occupied = share > 0
    entropy = -np.sum(share * np.log2(share, where=occupied, out=np.zeros_like(share)), axis=1)
    entropy[~occupied.all(axis=1)] = EMPTY_BIN_ENTROPY
    return np.asarray(entropy)


def noise_channel_reduction(
    features: npt.ArrayLike, keep: float = 1 / 3, bins: int = 30, *, normalize: bool = True
) -> IndexArray:
    """Keep the channels of lowest entropy (NCR).

    Parameters
    ----------
    features
        (N, C) real numbers, one row per token, taken as float32.
    keep
        Share of the channels to keep, in (0, 1]; rounded down, at least one channel.
    bins, normalize
        See :func:`channel_entropy`.

    Returns
    -------
    (K,) intp array
        Indices of the channels kept, ascending. Of channels with equal entropy the first are kept.

    Raises
    ------
    ValueError
        As :func:`channel_entropy`, or ``keep`` outside (0, 1].
    """
    return np.sort(channels_by_entropy(features, keep, bins, normalize=normalize))


def channels_by_entropy(
    features: npt.ArrayLike, keep: float = 1 / 3, bins: int = 30, *, normalize: bool = True
) -> IndexArray:
    """:func:`noise_channel_reduction` with the channels in the order of their entropy, lowest first."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be a share of the channels in (0, 1], not {keep!r}")
    entropy = channel_entropy(features, bins, normalize=normalize)
    # 384 * (1/3) must be 128 whatever the last bit of the product.
    count = max(1, int(entropy.size * keep + 1e-9))
    return np.argsort(entropy, kind="stable")[:count]


def channel_deviation(features: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Compute the standard deviation of each channel over the tokens, with N - 1 in the denominator.

    Parameters
    ----------
    features
        (N, C) real numbers, one row per token, taken as float32 and as they are: scale the tokens to unit length first
        (:func:`normalize_tokens`) for the deviation that the paper ranks.

    Returns
    -------
    (C,) float64 array
        Zero for constant channels and for a single token.

    Raises
    ------
    ValueError
        ``features`` isn't an (N, C) array with at least one row and column or holds NaN, infinity or a value beyond
        1e15.
    """
    array = check_features(features)
    n_tokens, n_channels = array.shape
    sums = np.empty(n_channels, np.float64)
    squares = np.empty(n_channels, np.float64)
    kernels.channel_moments(array, sums, squares)
    variance = (squares - sums * sums / n_tokens) / max(n_tokens - 1, 1)
    return np.asarray(np.sqrt(np.maximum(variance, 0.0)))


def deviation_channel_reduction(features: npt.ArrayLike, keep: int = 60) -> IndexArray:
    """Keep the channels of highest standard deviation (DCR).

    Parameters
    ----------
    features
        (N, C) real numbers, one row per token, as in :func:`channel_deviation`.
    keep
        Number of channels to keep, at least 1; all of them if there are fewer.

    Returns
    -------
    (min(keep, C),) intp array
        Indices of the channels kept, highest deviation first; of equal deviations the lower index first.

    Raises
    ------
    ValueError
        As :func:`channel_deviation`, or ``keep`` below 1.
    """
    keep = check_count(keep, name="keep")
    return np.argsort(-channel_deviation(features), kind="stable")[:keep]


def instance_channels(features: npt.ArrayLike, keep: float = 1 / 3, keep_deviation: int = 60) -> FloatArray:
    """Restrict features to the channels that tell instances apart: NCR, unit length, then DCR.

    Parameters
    ----------
    features
        (N, C) real numbers, one row per token.
    keep
        See :func:`noise_channel_reduction`, here in its variant before normalisation.
    keep_deviation
        See :func:`deviation_channel_reduction`.

    Returns
    -------
    (N, K) float32 array
        Parts of tokens of unit length.

    Raises
    ------
    ValueError
        As the two reductions.
    """
    array = check_features(features)
    quiet = normalize_tokens(array[:, noise_channel_reduction(array, keep, normalize=False)])
    return np.ascontiguousarray(quiet[:, deviation_channel_reduction(quiet, keep_deviation)])


def _token_norms(features: FloatArray) -> FloatArray:
    """Lengths of the tokens; 1 for tokens of zeros, which are to stay as they are."""
    norms = np.empty(len(features), np.float32)
    # In slices: the squares of all tokens at once would be a second array of the features' size.
    for start in range(0, len(features), 512):
        part = features[start : start + 512]
        norms[start : start + 512] = np.sqrt((part * part).sum(axis=1))
    norms[norms == 0] = 1
    return norms


def _bin_edges(lowest: FloatArray, highest: FloatArray, bins: int) -> FloatArray:
    """(C, bins + 1) edges in float32, rounded as ``numpy.histogram`` does."""
    constant = lowest == highest
    # A constant channel has no width; give it one, so that it fills a single bin.
    half = np.maximum(np.float32(0.5), np.abs(lowest) * np.float32(1e-3))
    lowest = np.where(constant, lowest - half, lowest)
    highest = np.where(constant, highest + half, highest)
    step = (highest - lowest) / np.float32(bins)
    edges = np.arange(bins + 1, dtype=np.float32) * step[:, None] + lowest[:, None]
    edges[:, -1] = highest
    return np.asarray(edges)
