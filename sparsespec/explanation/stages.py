"""What is kept of each stage of one image, to be shown; :mod:`sparsespec.explanation.trace` fills it in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from sparsespec import affinity, channels
from sparsespec.pipeline import ObjectnessMap, Segmentation, Settings

__all__ = [
    "CandidateRegions",
    "ChannelChoice",
    "Crop",
    "Explanation",
    "Foreground",
    "Graph",
    "ScoreParts",
    "Similarity",
    "Spectrum",
]

BoolArray = npt.NDArray[np.bool_]
Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ChannelChoice:
    """Which channels of one kind of features are used, and why.

    Attributes
    ----------
    name
        Of the features: "keys", "queries" or "values"; ``method="paper"`` chooses twice, "keys for the foreground" and
        "keys for the instances".
    entropy
        (C,) float64, bits, see :func:`sparsespec.channels.channel_entropy`.
    deviation
        (C,) float64, of the tokens scaled to unit length over the channels that NCR keeps.
    quiet
        (C,) bool: kept by NCR, for its low entropy.
    kept
        (C,) bool: kept by DCR too, for its high deviation. These are used.
    """

    name: str
    entropy: Float64Array
    deviation: Float64Array
    quiet: BoolArray
    kept: BoolArray

    def entropy_to_show(self) -> tuple[Float64Array, float | None]:
        """Entropies times the number of channels, which brings them near those of the channels' own histograms.

        Returns
        -------
        entropy : (C,) float64 array
        empty : float or None
            Where channels with an empty bin stand, whose entropy is not measured but set: beside the others.
        """
        shown = self.entropy * self.entropy.size
        unmeasured = self.entropy == channels.EMPTY_BIN_ENTROPY
        if not unmeasured.any() or unmeasured.all():
            return shown, None
        low, high = shown[~unmeasured].min(), shown[~unmeasured].max()
        empty = float(high + max(0.15 * (high - low), 1e-3 * high))
        shown[unmeasured] = empty
        return shown, empty


@dataclass(frozen=True, eq=False)
class Similarity:
    """How alike tokens are that need not be neighbours, by the measure that the graph is made of.

    Attributes
    ----------
    weights
        "boc", or "cosine" where the settings say so.
    features
        (N, K) float32 arrays, reduced to the channels kept: of keys, queries and values.
    divisors
        For each, what its affinities are divided by: the largest between neighbours, if that is above 1.
    sharpness
        The weight of an edge is ``exp(sharpness (similarity - 1))``; None for ``method="paper"``, which has the
        similarity itself.
    """

    weights: str
    features: tuple[npt.NDArray[np.float32], ...]
    divisors: tuple[float, ...]
    sharpness: float | None

    def row(self, token: int) -> Float64Array:
        """Similarity of one token to every token, averaged over the kinds of features.

        Parameters
        ----------
        token
            From 0 to N - 1, row by row on the grid.

        Returns
        -------
        (N,) float64 array

        Raises
        ------
        ValueError
            There is no such token.
        """
        size = len(self.features[0])
        if not 0 <= token < size:
            raise ValueError(f"token must be from 0 to {size - 1}, not {token!r}")
        everywhere = np.arange(size)
        total = np.zeros(size)
        for features, divisor in zip(self.features, self.divisors, strict=True):
            if self.weights == "boc":
                total += affinity.boc_edges(features, np.full(size, token), everywhere) / divisor
            else:
                unit = channels.normalize_tokens(features)
                total += unit @ unit[token]
        return total / len(self.features)


@dataclass(frozen=True, eq=False)
class Graph:
    """The affinities of neighbouring tokens.

    Attributes
    ----------
    plain
        (N, N) by the features alone.
    cut
        (N, N) what is cut: weaker where the position within the object steps back. The same without directions.
    position
        (N, 2) float64, x and y of each token in the box of its object, from -0.5 to 0.5; None without directions.
    """

    plain: csr_array
    cut: csr_array
    position: Float64Array | None

    def row(self, token: int) -> tuple[npt.NDArray[np.intp], Float64Array, Float64Array]:
        """Neighbours of a token, and the weights of the edges to them in ``plain`` and in ``cut``."""
        first, last = self.plain.indptr[token], self.plain.indptr[token + 1]
        neighbours = np.asarray(self.plain.indices[first:last], np.intp)
        # Both have the same entries in the same order.
        return neighbours, np.asarray(self.plain.data[first:last]), np.asarray(self.cut.data[first:last])


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The smallest eigenvalues of the normalised Laplacian of the whole graph, and their vectors.

    Attributes
    ----------
    values
        (k,) float64, ascending.
    vectors
        (k, h, w) float64: those of the random walk, D^-1/2 u, each scaled to a largest magnitude of 1.
    """

    values: Float64Array
    vectors: Float64Array

    @property
    def gap(self) -> int | None:
        """How many eigenvalues lie below the largest gap between two of them; None where there are fewer than two."""
        return int(np.diff(self.values).argmax()) + 1 if len(self.values) > 1 else None


@dataclass(frozen=True, eq=False)
class Foreground:
    """Which tokens are object.

    Attributes
    ----------
    share
        (h, w) float64: share of the thresholds on all maps that a token lies above; of ``method="paper"`` 1 or 0.
    maps
        The objectness maps; none for ``method="paper"``.
    contrast, least_contrast
        The largest smoothed border contrast, and below which there is nothing; None for ``method="paper"``.
    anything
        Whether there is something to find.
    fiedler
        (h, w) float64, for ``method="paper"``: its foreground is where this is above 0, cleaned.
    eigenvalues
        Of the graph that ``fiedler`` belongs to, ascending.
    """

    share: Float64Array
    maps: tuple[ObjectnessMap, ...] = ()
    contrast: float | None = None
    least_contrast: float | None = None
    anything: bool = True
    fiedler: Float64Array | None = None
    eigenvalues: Float64Array | None = None


@dataclass(frozen=True, eq=False)
class CandidateRegions:
    """The regions that the partitions hold, and which of them become instances.

    Attributes
    ----------
    votes, merit
        (m,) float64, of each region.
    residuals
        (m,) float64, of the position, see :func:`sparsespec.instances.position_residuals`; None without directions.
    sizes
        (m,) int64, tokens.
    partitions
        How many there were.
    min_merit
        The threshold on the merit.
    taken
        (t,) regions in the order in which they are taken, by falling merit: each is mostly free of those before. Those
        from ``count`` on would be taken if the threshold were lower, or the count higher.
    masks
        (t, N) bool: what each gets.
    count
        How many of them were taken.
    enough
        (count,) bool: whether what it got has votes enough to stay.
    given
        The count that was asked for, if one was: the threshold then says nothing.
    """

    votes: Float64Array
    merit: Float64Array
    residuals: Float64Array | None
    sizes: npt.NDArray[np.int64]
    partitions: int
    min_merit: float
    taken: npt.NDArray[np.intp]
    masks: BoolArray
    count: int
    enough: BoolArray
    given: int | None

    def __len__(self) -> int:
        return len(self.merit)

    @property
    def gap(self) -> tuple[float, float]:
        """Merit of the last region that was taken and of the first that was not: the same are taken in between.

        infinity where none was taken, 0 where no other would be.
        """
        merit = self.merit[self.taken]
        upper = float(merit[self.count - 1]) if self.count else np.inf
        return upper, float(merit[self.count]) if self.count < len(merit) else 0.0


@dataclass(frozen=True)
class Crop:
    """A closer look.

    Attributes
    ----------
    mask
        Number from 0 of the mask that it is around.
    box
        Top, left, bottom and right in pixels of the image.
    regions
        How many were found in it.
    taken
        Pairs of a label, before instances are numbered by score, and the number from 1 of the region that has it now;
        none where the instance stayed, one where it was redrawn, several where it was split.
    scores
        Of the regions.
    """

    mask: int
    box: tuple[int, int, int, int]
    regions: int
    taken: tuple[tuple[int, int], ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class ScoreParts:
    """What the score of one instance is made of.

    Attributes
    ----------
    label
        Of the result, from 1.
    score
        Of the result.
    mask
        Number from 0 of the mask on the tokens that it comes from.
    tokens
        Size of that mask.
    votes, residual, wholeness, merit
        Of that mask: merit is votes times wholeness, ``exp(settings.wholeness (1/8 - residual))``. None for
        ``method="paper"``; the residual is None without directions, and wholeness 1.
    first
        What the merit is worth: :func:`sparsespec.pipeline.likely_overlap`; for ``method="paper"`` the mask's share of
        the foreground's tokens.
    crop
        Number from 0 of the crop that the instance was redrawn or split in, or None.
    second
        Score in the crop of the part that this is, where the instance was split: the score then is the geometric mean
        of both.
    """

    label: int
    score: float
    mask: int
    tokens: int
    votes: float | None
    residual: float | None
    wholeness: float | None
    merit: float | None
    first: float
    crop: int | None
    second: float | None

    def recomputed(self) -> float:
        """Give the score again, from its parts."""
        return float(np.float32(self.first if self.second is None else np.sqrt(self.first * self.second)))


@dataclass(frozen=True, eq=False)
class Explanation:
    """Every stage of one image.

    Attributes
    ----------
    name
        Of the image.
    method
        "sparse" or "paper".
    photograph
        (h, w, 3) uint8: the image, reduced.
    result
        What the segmenter returns.
    settings
        Of the segmenter.
    grid
        (h, w), tokens.
    extent
        How many tokens, high and wide, the image covers.
    token_side
        Side of a token in pixels of the image.
    channels
        For each kind of features.
    similarity
        Of any two tokens.
    graph
        Of neighbours; None for ``method="paper"``, where all are joined to all.
    spectrum
        Of the graph that is cut.
    foreground
        Which tokens are object.
    candidates
        None for ``method="paper"``.
    masks
        (n, h, w) bool, on the tokens, by falling score.
    before, after
        (h, w) labels of the size of the photograph, before and after the closer look. The numbers of the former are
        those of the masks, from 1, of the latter those of the result.
    crops
        Of the closer look.
    scores
        What each is made of, in the order of the result.
    """

    name: str
    method: str
    photograph: npt.NDArray[np.uint8]
    result: Segmentation
    settings: Settings
    grid: tuple[int, int]
    extent: tuple[float, float]
    token_side: float
    channels: tuple[ChannelChoice, ...]
    similarity: Similarity
    graph: Graph | None
    spectrum: Spectrum
    foreground: Foreground
    candidates: CandidateRegions | None
    masks: BoolArray
    before: npt.NDArray[np.intp]
    after: npt.NDArray[np.intp]
    crops: tuple[Crop, ...]
    scores: tuple[ScoreParts, ...]

    def token_at(self, row: int, column: int) -> int:
        """Give the number of the token in a row and column of the grid, both from 0.

        Raises
        ------
        ValueError
            There is no such token; the message says which there are.
        """
        height, width = self.grid
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(
                f"the token must be in row 0 to {height - 1} and column 0 to {width - 1} of the grid, "
                f"not in row {row} and column {column}"
            )
        return row * width + column

    def label_of_region(self) -> list[int | None]:
        """Label of the result for each region of ``candidates.taken``, the first of several; None for what has none."""
        if self.candidates is None:
            return []
        label_of: dict[int, int] = {}
        for part in self.scores:
            label_of.setdefault(part.mask, part.label)
        mask_of = {mask.tobytes(): number for number, mask in enumerate(self.masks)}
        # A region that was cut further, to give as many as were asked for, is none of the masks.
        return [label_of.get(mask_of.get(region.tobytes(), -1)) for region in self.candidates.masks]

    def typical_token(self) -> int:
        """Give a token worth looking at: the one deepest inside the best instance, or else the middle of the grid."""
        from scipy.ndimage import distance_transform_edt

        height, width = self.grid
        if not len(self.masks):
            return (height // 2) * width + width // 2
        depth = distance_transform_edt(np.pad(self.masks[0], 1))[1:-1, 1:-1]
        return int(depth.argmax())
