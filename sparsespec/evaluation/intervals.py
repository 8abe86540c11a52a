"""How far a measure of a set could be off because of the photographs that happen to be in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsespec.evaluation.metrics import ImageScore, ScoreSet, SetScore

Statistic = str | Callable[[Sequence[ImageScore]], float]


@dataclass(frozen=True)
class Interval:
    """A measure and its confidence interval.

    Attributes
    ----------
    value
        Of the set as it is.
    low, high
        Ends of the interval; NaN where the measure has no meaning.
    """

    value: float
    low: float
    high: float


def bootstrap(
    scores: Sequence[ImageScore], statistic: Statistic, *, n: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile confidence interval of a measure, by drawing as many images as there are, with replacement.

    Parameters
    ----------
    scores
        One for each image.
    statistic
        A name of :data:`~sparsespec.evaluation.metrics.MEASURES`, or a function of a list of scores.
    n
        Sets to draw.
    level
        Share of the sets whose measure lies within, between 0 and 1.
    seed
        Same seed, same interval.

    Raises
    ------
    ValueError
        No scores, an unknown measure, one that was not taken, or `n` or `level` out of range.

    References
    ----------
    B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    draws = _draws(len(scores), n, level, seed)
    measure = _picker(scores, statistic)
    return _percentiles(measure(np.arange(len(scores))), np.array([measure(pick) for pick in draws]), level)


def bootstrap_all(
    scores: Sequence[ImageScore], *, n: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """Confidence intervals of all measures that can be taken of these scores, from the same draws.

    Parameters are those of :func:`bootstrap`.
    """
    draws = _draws(len(scores), n, level, seed)
    images = ScoreSet(scores)
    drawn = [images.summary(pick) for pick in draws]
    whole = images.summary()
    return {
        name: _percentiles(_value(whole, name), np.array([_value(one, name) for one in drawn]), level)
        for name in images.measures
    }


def bootstrap_difference(
    first: Sequence[ImageScore],
    second: Sequence[ImageScore],
    statistic: Statistic,
    *,
    n: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Confidence interval of first minus second, two methods measured on the same images.

    Both are measured on the same draws, so that what makes an image easy or hard for both cancels out.

    Parameters
    ----------
    first, second
        Scores of the two methods; the same image at the same position.
    statistic, n, level, seed
        As in :func:`bootstrap`.

    Raises
    ------
    ValueError
        As :func:`bootstrap`, and where the lengths differ.
    """
    if len(first) != len(second):
        raise ValueError(f"first and second must be of the same images, but hold {len(first)} and {len(second)} scores")
    draws = _draws(len(first), n, level, seed)
    one, other = _picker(first, statistic), _picker(second, statistic)

    def difference(pick: npt.NDArray[np.int64]) -> float:
        return one(pick) - other(pick)

    return _percentiles(difference(np.arange(len(first))), np.array([difference(pick) for pick in draws]), level)


def _draws(images: int, n: int, level: float, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    if images == 0:
        raise ValueError("scores is empty: there is no image to draw")
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"n must be an integer of at least 1, not {n!r}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level!r}")
    rng = np.random.default_rng(seed)
    return (rng.integers(0, images, images) for _ in range(n))


def _picker(scores: Sequence[ImageScore], statistic: Statistic) -> Callable[[npt.NDArray[np.int64]], float]:
    if callable(statistic):
        return lambda pick: float(statistic([scores[i] for i in pick]))
    images = ScoreSet(scores)
    if statistic not in images.measures:
        raise ValueError(
            f"statistic must be one of {', '.join(images.measures)} for these scores, or a function, not {statistic!r}"
        )
    return lambda pick: _value(images.summary(pick), statistic)


def _value(score: SetScore, name: str) -> float:
    return float(getattr(score, name))


def _percentiles(value: float, drawn: npt.NDArray[np.float64], level: float) -> Interval:
    # A draw without an image that the measure needs, such as an empty one, says nothing about it.
    drawn = drawn[~np.isnan(drawn)]
    if math.isnan(value) or drawn.size == 0:
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
