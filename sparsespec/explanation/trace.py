"""What each stage made of one image, kept to be shown: :func:`explain` watches a segmenter at work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from sparsespec import affinity, channels
from sparsespec._checks import check_count
from sparsespec._display import reduced_labels
from sparsespec.backbone import TokenFeatures
from sparsespec.formats.overlay import reduced_copy
from sparsespec.images import PixelSource, as_pixels
from sparsespec.instances import Candidates
from sparsespec.paper import NCR_KEEP, PaperForeground, PaperInstances
from sparsespec.pipeline import ObjectnessMap, Segmentation, Segmenter, Settings

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
    "explain",
]

BoolArray = npt.NDArray[np.bool_]
Float64Array = npt.NDArray[np.float64]

DEFAULT_MAX_SIDE = 1024
DEFAULT_EIGENVALUES = 16
# Regions that would be instances if the threshold were lower, beside those that are.
_MORE_REGIONS = 12
# Of a region's tokens, what no better one may have taken; the default of sparsespec.instances.select.
_MIN_FREE = 0.8


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


def explain(
    segmenter: Segmenter,
    image: npt.ArrayLike | PixelSource,
    *,
    name: str = "image",
    max_side: int = DEFAULT_MAX_SIDE,
    eigenvalues: int = DEFAULT_EIGENVALUES,
) -> Explanation:
    """Segment one image, and keep what each stage made.

    Parameters
    ----------
    segmenter
        Of either method.
    image
        As for :class:`~sparsespec.pipeline.Segmenter`.
    name
        To show.
    max_side
        Longest side in pixels of the photograph and of the labels that are kept to be shown.
    eigenvalues
        How many of the graph's smallest, at least 2; ``method="paper"`` has five.

    Returns
    -------
    Explanation
        Its result is that of ``segmenter(image)``, with the eigenvectors as further layers.

    Raises
    ------
    ValueError
        As the segmenter; a ``max_side`` below 1, fewer than 2 eigenvalues.
    RuntimeError
        The channels that this module finds kept are not those that the method used: an error in this package.

    Examples
    --------
    >>> import sparsespec
    >>> from skimage.data import astronaut
    >>> from sparsespec.explanation.trace import explain
    >>> made = explain(sparsespec.Segmenter(long_side=224), astronaut(), name="astronaut")
    >>> len(made.scores) == len(made.result), made.similarity.row(0).shape
    (True, (256,))
    """
    check_count(max_side, name="max_side")
    check_count(eigenvalues, name="eigenvalues", least=2)
    pixels = as_pixels(image)
    recorder = _Recorder(pixels, max_side, segmenter)
    result = segmenter(pixels, eigenvectors=eigenvalues - 1, watch=recorder)
    return recorder.explanation(name, result)


@dataclass
class _Recorder:
    """Keeps what a segmenter tells: copies of what goes on to change, and references to what doesn't."""

    pixels: PixelSource
    max_side: int
    segmenter: Segmenter
    made: dict[str, Any] = field(default_factory=dict)
    crops: list[Crop] = field(default_factory=list)

    def __call__(self, step: str, made: Mapping[str, Any]) -> None:
        getattr(self, f"_{step}")(made)

    def _features(self, made: Mapping[str, Any]) -> None:
        tokens: TokenFeatures = made["tokens"]
        self.made.update(tokens=tokens, grid=tokens.grid, extent=tokens.extent, token_side=tokens.token_side)

    def _channels(self, made: Mapping[str, Any]) -> None:
        settings, tokens = self.segmenter.settings, self.made["tokens"]
        choices = []
        for kind, reduced in zip(("keys", "queries", "values"), made["reduced"], strict=True):
            features = getattr(tokens, kind)
            choice, order = _choice(kind, features, settings.keep, settings.keep_deviation, normalize=False)
            unit = channels.normalize_tokens(features[:, choice.quiet])
            if not np.array_equal(unit[:, order], reduced):
                raise RuntimeError(f"the channels of the {kind} that are shown are not those that were used")
            choices.append(choice)
        # The features themselves are not needed any more; at high resolution they are most of the memory.
        del self.made["tokens"]
        self.made.update(channels=tuple(choices), reduced=tuple(made["reduced"]))

    def _affinity(self, made: Mapping[str, Any]) -> None:
        settings = self.segmenter.settings
        reduced = self.made.pop("reduced")
        divisors = [1.0] * len(reduced)
        if settings.weights == "boc":
            pairs = affinity.grid_edges(self.made["grid"])
            divisors = [max(1.0, float(affinity.boc_edges(f, *pairs).max(initial=0))) for f in reduced]
        self.made.update(
            similarity=Similarity(settings.weights, reduced, tuple(divisors), settings.sharpness),
            graph=Graph(made["plain"], made["graph"], made["position"]),
        )

    def _eigenpairs(self, made: Mapping[str, Any]) -> None:
        pairs = made["pairs"]
        self.made["spectrum"] = _spectrum(pairs.values, pairs.random_walk_vectors(), self.made["grid"])

    def _foreground(self, made: Mapping[str, Any]) -> None:
        self.made["foreground"] = dict(made)

    def _instances(self, made: Mapping[str, Any]) -> None:
        self.made["instances"] = dict(made)
        self.made["instances"].pop("cutter", None)

    def _refine(self, made: Mapping[str, Any]) -> None:
        photograph, _ = reduced_copy(self.pixels, made["labels"], self.max_side)
        self.made.update(photograph=np.array(photograph), before=reduced_labels(made["labels"], self.max_side))

    def _crop(self, made: Mapping[str, Any]) -> None:
        found = made["found"]
        top, left, bottom, right = (int(side) for side in made["box"])
        self.crops.append(
            Crop(
                int(made["instance"]),
                (top, left, bottom, right),
                len(found.masks),
                tuple((int(label), int(region)) for label, region in made["taken"]),
                tuple(float(score) for score in found.scores),
            )
        )

    def _order(self, made: Mapping[str, Any]) -> None:
        self.made["order"] = np.array(made["order"])

    def explanation(self, name: str, result: Segmentation) -> Explanation:
        """Put it all together."""
        paper = "paper" in self.made["foreground"]
        parts = self._of_paper(result) if paper else self._of_sparse(result)
        frame = {key: self.made[key] for key in ("photograph", "grid", "extent", "token_side", "before")}
        return Explanation(
            name=name,
            method="paper" if paper else "sparse",
            result=result,
            settings=self.segmenter.settings,
            after=reduced_labels(result.labels, self.max_side),
            crops=tuple(self.crops),
            **frame,
            **parts,
        )

    def _of_sparse(self, result: Segmentation) -> dict[str, Any]:
        made, grid = self.made["instances"], self.made["grid"]
        seen = self.made["foreground"]
        settings = self.segmenter.settings
        foreground = Foreground(
            np.asarray(result.layers["foreground"], np.float64),
            tuple(seen["maps"]),
            seen["contrast"],
            settings.min_contrast,
            bool(seen["anything"]),
        )
        return {
            "channels": self.made["channels"],
            "similarity": self.made["similarity"],
            "graph": self.made["graph"],
            "spectrum": self.made["spectrum"],
            "foreground": foreground,
            "candidates": _candidate_regions(made, settings, self.segmenter.n_instances),
            "masks": np.reshape(made["masks"], (-1, *grid)),
            "scores": self._scores(result),
        }

    def _scores(self, result: Segmentation) -> tuple[ScoreParts, ...]:
        made, settings = self.made["instances"], self.segmenter.settings
        residuals = made["mask_residuals"]
        first = made["scores"]
        wholeness = np.ones(len(first)) if residuals is None else np.exp(settings.wholeness * (1 / 8 - residuals))
        scores = []
        for label, source in enumerate(self.made["order"], start=1):
            crop, region = self._seen_in(int(source) + 1)
            # Labels beyond those of the masks were made by a crop.
            mask = int(source) if crop is None else self.crops[crop].mask
            split = crop is not None and len(self.crops[crop].taken) > 1
            scores.append(
                ScoreParts(
                    label=label,
                    score=float(result.scores[label - 1]),
                    mask=mask,
                    tokens=int(made["masks"][mask].sum()),
                    votes=float(made["mask_votes"][mask]),
                    residual=None if residuals is None else float(residuals[mask]),
                    wholeness=float(wholeness[mask]),
                    merit=float(made["mask_merit"][mask]),
                    first=float(first[mask]),
                    crop=crop,
                    second=self.crops[crop].scores[region - 1] if crop is not None and split else None,
                )
            )
        return tuple(scores)

    def _seen_in(self, label: int) -> tuple[int | None, int]:
        """Which crop gave a label its pixels, and the region in it."""
        for number, crop in enumerate(self.crops):
            for taken, region in crop.taken:
                if taken == label:
                    return number, region
        return None, 0

    def _of_paper(self, result: Segmentation) -> dict[str, Any]:
        grid, tokens = self.made["grid"], self.made["tokens"]
        mask: PaperForeground = self.made["foreground"]["paper"]
        found: PaperInstances = self.made["instances"]["paper"]
        keys = tokens.keys
        first, _ = _choice("keys for the foreground", keys, NCR_KEEP, None, normalize=True)
        second, _ = _choice("keys for the instances", keys, NCR_KEEP, len(found.keep), normalize=False)
        for choice, used in ((first, mask.keep), (second, found.keep)):
            if not np.array_equal(np.flatnonzero(choice.kept), np.sort(used)):
                raise RuntimeError(f"the channels of the {choice.name} that are shown are not those that were used")
        norms = channels.token_norms(keys[:, second.quiet])
        reduced = keys[:, found.keep] / norms[:, None] * mask.mask.reshape(-1, 1)
        count = int(found.labels.max(initial=0))
        masks = found.labels[None] == np.arange(1, count + 1)[:, None, None]
        sizes = masks.sum(axis=(1, 2), dtype=np.float64)
        share = sizes / max(sizes.sum(), 1)
        scores = tuple(
            ScoreParts(
                label=label,
                score=float(result.scores[label - 1]),
                mask=int(source),
                tokens=int(sizes[source]),
                votes=None,
                residual=None,
                wholeness=None,
                merit=None,
                first=float(share[source]),
                crop=None,
                second=None,
            )
            for label, source in enumerate(self.made["order"], start=1)
        )
        return {
            "channels": (first, second),
            "similarity": Similarity("boc", (np.asarray(reduced, np.float32),), (1.0,), None),
            "graph": None,
            "spectrum": _spectrum(found.eigenvalues, found.eigenvectors, grid),
            "foreground": Foreground(
                mask.mask.astype(np.float64),
                anything=bool(mask.mask.any()),
                fiedler=mask.fiedler.reshape(grid),
                eigenvalues=mask.eigenvalues,
            ),
            "candidates": None,
            "masks": masks,
            "scores": scores,
        }


def _choice(
    name: str, features: npt.NDArray[np.float32], keep: float, keep_deviation: int | None, *, normalize: bool
) -> tuple[ChannelChoice, npt.NDArray[np.intp]]:
    """Choose channels as :func:`sparsespec.channels.instance_channels`; and their order among the quiet ones."""
    entropy = channels.channel_entropy(features, normalize=normalize)
    chosen = channels.noise_channel_reduction(features, keep, normalize=normalize)
    quiet = np.zeros(entropy.size, bool)
    quiet[chosen] = True
    # The foreground of method="paper" scales tokens over all channels, the rest over those that NCR keeps.
    norms = channels.token_norms(features if normalize else features[:, chosen])
    deviation = channels.channel_deviation(features / norms[:, None])
    unit = channels.normalize_tokens(features[:, chosen])
    if not normalize:
        # To the last bit what the channels are ranked by.
        deviation[chosen] = channels.channel_deviation(unit)
    order = np.arange(chosen.size)
    if keep_deviation is not None:
        order = channels.deviation_channel_reduction(unit, keep_deviation)
    kept = np.zeros(entropy.size, bool)
    kept[chosen[order]] = True
    return ChannelChoice(name, entropy, deviation, quiet, kept), order


def _spectrum(values: Float64Array, vectors: Float64Array, grid: tuple[int, int]) -> Spectrum:
    shown = np.array(vectors.T, np.float64)
    for vector in shown:
        largest = vector[np.abs(vector).argmax()]
        if largest:
            vector /= largest
    return Spectrum(np.asarray(values, np.float64), shown.reshape(-1, *grid))


def _candidate_regions(made: Mapping[str, Any], settings: Settings, given: int | None) -> CandidateRegions:
    """Take regions again as :func:`sparsespec.instances.select` does, and go on below the threshold."""
    candidates: Candidates = made["candidates"]
    merit = np.asarray(made["merit"], np.float64)
    begins = candidates.ends - np.diff(candidates.ends, prepend=0)
    free = np.ones(candidates.n_tokens, bool)
    taken: list[int] = []
    masks: list[BoolArray] = []
    count = 0
    for region in np.argsort(-merit, kind="stable"):
        wanted = merit[region] >= settings.min_merit if given is None else count < given
        if not wanted and len(taken) - count >= _MORE_REGIONS:
            break
        tokens = candidates.tokens[begins[region] : candidates.ends[region]]
        if free[tokens].sum() < _MIN_FREE * tokens.size:
            continue
        mask = np.zeros(candidates.n_tokens, bool)
        mask[tokens[free[tokens]]] = True
        free &= ~mask
        taken.append(int(region))
        masks.append(mask)
        count += bool(wanted)
    stacked = np.array(masks, bool).reshape(-1, candidates.n_tokens)
    enough = np.ones(count, bool)
    if given is None:
        enough = candidates.votes(stacked[:count]) >= settings.min_votes_left
    return CandidateRegions(
        votes=np.asarray(made["votes"], np.float64),
        merit=merit,
        residuals=made["residuals"],
        sizes=np.diff(candidates.ends, prepend=0),
        partitions=candidates.partitions,
        min_merit=settings.min_merit,
        taken=np.array(taken, np.intp),
        masks=stacked,
        count=count,
        enough=enough,
        given=given,
    )
