"""Fit directions of the token features to photographs, without labels.

The method itself is the teacher. What stands out from the border of a photograph is a first, rough idea of its objects;
a direction that tells those tokens from the others in many photographs at once finds what they have in common, and
repeats the step with what it finds. With it the method cuts the photographs into instances; those that touch no other
teach where in an object a token lies, and, with that known, the step is repeated as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from sparsespec import affinity, channels, foreground
from sparsespec._checks import check_features, check_grid
from sparsespec.backbone import TokenFeatures
from sparsespec.directions import Directions
from sparsespec.pipeline import PLAIN, Settings, find_instances

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

# Smoothed border contrast of the queries, in standard deviations of its image, of the first objects.
_STANDS_OUT = 1.3
# Of the smoothed direction, where objects were fitted to 1 and the rest to -1.
_IS_OBJECT = 0.2
_OBJECT_ROUNDS = 2
_POSITION_ROUNDS = 2
# Ridge, in mean variances of a channel. The directions hardly change between a tenth of these and ten times as much.
_OBJECT_RIDGE = 9.0
_POSITION_RIDGE = 0.3
# The smaller class of an image weighs as if it had at least so many tokens, lest specks count as much as objects.
_FEWEST = 20.0
# Smaller instances say nothing about places within them.
_LEAST_INSTANCE = 8
# Of the squares of the features: what varies less drowns in the rounding of single precision.
_ROUNDING = 1e-4


def fit_directions(
    photographs: Sequence[TokenFeatures],
    *,
    source_sha256: str = "",
    progress: Callable[[str], None] | None = None,
) -> Directions:
    """Fit directions to the features of photographs.

    Twenty photographs will do, a hundred are better; that they show the same kind of things as those to be segmented
    matters little. Photographs must be upright, as positions are told by it. The same photographs in the same order
    give the same directions.

    Parameters
    ----------
    photographs
        Features of one network; float16 is enough, in which 768 tokens of 384 channels take 1.8 MB.
    source_sha256
        Of the network, see :attr:`sparsespec.Backbone.features_sha256`.
    progress
        Called with a line for each step.

    Returns
    -------
    Directions

    Raises
    ------
    ValueError
        There are no photographs, their features aren't finite numbers or don't fit their grids, they have different
        numbers of channels, nothing stands out in any of them or no direction tells it from the rest, or no instance
        was found that touches no other.
    """
    _check(photographs)
    say = progress or (lambda line: None)

    say(f"graphs of {len(photographs)} photographs")
    scenes = [_Scene.of(tokens) for tokens in photographs]
    objects = [scene.stands_out for scene in scenes]
    for number in range(_OBJECT_ROUNDS + 1):
        say(f"objectness, round {number + 1} of {_OBJECT_ROUNDS + 1}")
        weights, offset = _fit_objectness(photographs, objects)
        values = [_stacked(tokens) @ weights + offset for tokens in photographs]
        objects = [
            foreground.smooth(value, scene.graph) > _IS_OBJECT for value, scene in zip(values, scenes, strict=True)
        ]
    deviation = float(np.std(np.concatenate(values)))
    if not deviation > _ROUNDING:
        raise ValueError(f"no direction tells what stands out in the {len(photographs)} photographs from the rest")
    directions = Directions(
        objectness=(weights / deviation).astype(np.float32),
        objectness_offset=offset / deviation,
        position=np.zeros((len(weights), 2), np.float32),
        position_offset=np.zeros(2, np.float32),
        source_sha256=source_sha256,
        photographs=len(photographs),
    )
    settings = dataclasses.replace(Settings(), back_steps=0.0, wholeness=0.0, cut_thresholds=PLAIN.cut_thresholds)
    for number in range(_POSITION_ROUNDS + 1):
        say(f"positions, round {number + 1} of {_POSITION_ROUNDS + 1}")
        position, position_offset = _fit_position(photographs, directions, settings)
        directions = dataclasses.replace(
            directions, position=position.astype(np.float32), position_offset=position_offset.astype(np.float32)
        )
        settings = Settings()
    return directions


def _check(photographs: Sequence[TokenFeatures]) -> None:
    if not len(photographs):
        raise ValueError("photographs is empty: directions need at least one photograph, better a hundred")
    sizes: dict[int, int] = {}
    for number, tokens in enumerate(photographs):
        for name in ("keys", "queries", "values"):
            # Halves can't hold the bound that they are checked against.
            array = check_features(
                np.asarray(getattr(tokens, name), np.float32), name=f"{name} of photographs[{number}]"
            )
            check_grid(tokens.grid, len(array), name=f"grid of photographs[{number}]")
            sizes.setdefault(array.shape[1], number)
    if len(sizes) > 1:
        (size, first), (other, second) = list(sizes.items())[:2]
        raise ValueError(
            f"photographs must be of one network, but features of photographs[{first}] have {size} channels and some "
            f"of photographs[{second}] have {other}"
        )


@dataclass(frozen=True, eq=False)
class _Scene:
    """What the fit of the objectness needs of one photograph beside its features."""

    graph: csr_array
    stands_out: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, tokens: TokenFeatures) -> _Scene:
        settings = Settings()
        kinds = [np.asarray(f, np.float32) for f in (tokens.keys, tokens.queries, tokens.values)]
        reduced = [channels.instance_channels(f, settings.keep, settings.keep_deviation) for f in kinds]
        graph = affinity.local_affinity(reduced, tokens.grid, sharpness=settings.smoothing_sharpness)
        contrast = foreground.border_contrast(kinds[1], tokens.grid, settings.prototypes)
        smoothed = foreground.smooth(foreground.standardise(contrast), graph, settings.smoothing)
        return cls(graph, smoothed > _STANDS_OUT)


def _stacked(tokens: TokenFeatures) -> Float32Array:
    """(N, 3 C): unit keys, unit queries, unit values."""
    kinds = (tokens.keys, tokens.queries, tokens.values)
    return np.hstack([channels.normalize_tokens(np.asarray(f, np.float32)) for f in kinds])


def _fit_objectness(
    photographs: Sequence[TokenFeatures], objects: Sequence[npt.NDArray[np.bool_]]
) -> tuple[Float64Array, float]:
    """Ridge regression of 1 for objects and -1 for the rest, both of the same weight in each photograph."""
    if not any(inside.any() for inside in objects):
        raise ValueError(
            f"nothing stands out in any of the {len(photographs)} photographs: give some that show objects"
        )

    def parts() -> Iterator[tuple[Float32Array, Float64Array, Float64Array]]:
        for tokens, inside in zip(photographs, objects, strict=True):
            objects_here = int(np.count_nonzero(inside))
            weights_of = [1 / max(count, _FEWEST) for count in (objects_here, inside.size - objects_here)]
            share = np.where(inside, *weights_of)
            yield _stacked(tokens), np.where(inside, 1.0, -1.0)[:, None], share

    weights, offset = _ridge(parts(), _OBJECT_RIDGE)
    return weights[:, 0], float(offset[0])


def _fit_position(
    photographs: Sequence[TokenFeatures], directions: Directions, settings: Settings
) -> tuple[Float64Array, Float64Array]:
    """Ridge regression of the places of tokens within the instances found that touch no other."""

    def parts() -> Iterator[tuple[Float32Array, Float64Array, Float64Array]]:
        for stored in photographs:
            tokens = dataclasses.replace(
                stored,
                keys=np.asarray(stored.keys, np.float32),
                queries=np.asarray(stored.queries, np.float32),
                values=np.asarray(stored.values, np.float32),
            )
            found = find_instances(tokens, settings, directions=directions)
            stacked = _stacked(tokens)
            for mask in found.masks:
                members = np.flatnonzero(mask)
                if members.size >= _LEAST_INSTANCE and _stands_alone(mask, found.masks, tokens.grid):
                    share = np.full(members.size, 1 / np.sqrt(members.size))
                    yield stacked[members], _places(members, tokens.grid[1]), share

    try:
        return _ridge(parts(), _POSITION_RIDGE)
    except _NoSamplesError:
        raise ValueError(
            f"no instance of at least {_LEAST_INSTANCE} tokens that touches no other was found in the "
            f"{len(photographs)} photographs: give more of them"
        ) from None


def _stands_alone(mask: npt.NDArray[np.bool_], masks: npt.NDArray[np.bool_], grid: tuple[int, int]) -> bool:
    """Whether no token of another mask is a neighbour: instances that touch may have been cut in the wrong place."""
    around = np.pad(mask.reshape(grid), 1)
    rows, columns = grid
    near = np.zeros(grid, bool)
    # 4-neighbours: corners that meet are no common edge.
    for down, right in ((1, 0), (1, 2), (0, 1), (2, 1)):
        near |= around[down : down + rows, right : right + columns]
    others = masks.any(axis=0) & ~mask
    return not bool((near.ravel() & others).any())


def _places(members: npt.NDArray[np.intp], width: int) -> Float64Array:
    """X and y of tokens in the box of all of them, from -0.5 to 0.5."""
    rows, columns = np.divmod(members, width)
    places = [(v - v.min() + 0.5) / (v.max() - v.min() + 1) - 0.5 for v in (columns, rows)]
    return np.column_stack(places)


class _NoSamplesError(ValueError):
    """There is nothing to fit to."""


def _ridge(
    parts: Iterator[tuple[Float32Array, Float64Array, Float64Array]], ridge: float
) -> tuple[Float64Array, Float64Array]:
    """Least squares over parts (n, C), targets (n, m) and weights (n,), with a penalty on all but the offset."""
    gram = moment = None
    for features, targets, share in parts:
        extended = np.hstack([features, np.ones((len(features), 1), np.float32)])
        weighted = extended * share[:, None].astype(np.float32)
        # In single precision within a photograph, in double across them.
        squares, products = extended.T @ weighted, weighted.T.astype(np.float64) @ targets
        gram = squares.astype(np.float64) if gram is None else gram + squares
        moment = products if moment is None else moment + products
    if gram is None or moment is None:
        raise _NoSamplesError
    # Centred, so that the penalty is on what varies and the offset stays free.
    total = gram[-1, -1]
    mean, target = gram[-1, :-1] / total, moment[-1] / total
    centred = gram[:-1, :-1] - total * np.outer(mean, mean)
    variance = max(np.trace(centred), _ROUNDING * np.trace(gram)) / len(centred)
    centred[np.diag_indices_from(centred)] += ridge * variance
    weights = np.linalg.solve(centred, moment[:-1] - total * np.outer(mean, target))
    return weights, target - mean @ weights
