"""Which channels of the token features carry objects: noise (NCR) and deviation (DCR) channel reduction.

Both follow the paper on SpecUnIIS: channels whose histogram over the tokens has a high entropy are noise, and of the
channels that stay, those with a high standard deviation tell instances apart.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparsespec._checks import check_count, check_features
from sparsespec._kernels import channels as kernels
from sparsespec._threads import Team

FloatArray = npt.NDArray[np.float32]
IndexArray = npt.NDArray[np.intp]

# Above every entropy of a channel without an empty bin, log2(bins C) / C, for any sensible C and number of bins.
EMPTY_BIN_ENTROPY = 5.0
SMOOTHING = 1e-6

# What a thread takes at a time: channels in whole cache lines, tokens worth more than the start of a thread.
_CHANNELS = 64
_ROWS = 2048


def normalize_tokens(features: npt.ArrayLike) -> FloatArray:
    """Scale every token to unit length, ``x / |x|``.

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
    return _unit_tokens(array, np.arange(array.shape[1]))


def token_norms(features: npt.ArrayLike) -> FloatArray:
    """Euclidean length of every token; 1 for a token of zeros, which dividing is to leave as it is.

    Parameters
    ----------
    features
        (N, C) real numbers, taken as float32.

    Returns
    -------
    (N,) float32 array

    Raises
    ------
    ValueError
        As :func:`normalize_tokens`.
    """
    array = check_features(features)
    norms = np.empty(len(array), np.float32)
    Team().share(lambda first, last: kernels.token_norms(array, first, last, norms), 0, len(array), _ROWS)
    return norms


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
    norms = token_norms(array) if normalize else np.ones(n_tokens, np.float32)
    counts = np.zeros((n_channels, bins), np.int64)

    def count(first: int, last: int) -> None:
        kernels.channel_histogram(array, norms, first, last, counts)

    Team().share(count, 0, n_channels, _CHANNELS)

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
    return _deviation(check_features(features))


def _unit_tokens(array: FloatArray, kept: IndexArray) -> FloatArray:
    out = np.empty((len(array), kept.size), np.float32)
    Team().share(lambda first, last: kernels.unit_tokens(array, kept, first, last, out), 0, len(array), _ROWS)
    return out


def _deviation(array: FloatArray) -> npt.NDArray[np.float64]:
    n_tokens, n_channels = array.shape
    sums = np.empty(n_channels, np.float64)
    squares = np.empty(n_channels, np.float64)

    def add(first: int, last: int) -> None:
        kernels.channel_moments(array, first, last, sums, squares)

    Team().share(add, 0, n_channels, _CHANNELS)
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


def instance_channels(features: npt.ArrayLike, keep: float = 1 / 3, keep_deviation: int | None = 60) -> FloatArray:
    """Restrict features to the channels that tell instances apart: NCR, unit length, then DCR.

    Parameters
    ----------
    features
        (N, C) real numbers, one row per token.
    keep
        See :func:`noise_channel_reduction`, here in its variant before normalisation.
    keep_deviation
        See :func:`deviation_channel_reduction`; None leaves that step out.

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
    kept = noise_channel_reduction(array, keep, normalize=False)
    quiet = _unit_tokens(array, kept)
    if keep_deviation is None:
        return quiet
    loud = np.argsort(-_deviation(quiet), kind="stable")[: check_count(keep_deviation, name="keep_deviation")]
    return np.take(quiet, loud, axis=1)
