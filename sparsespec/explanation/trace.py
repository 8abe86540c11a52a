"""What each stage made of one image, kept to be shown: :func:`explain` watches a segmenter at work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec import affinity, channels
from sparsespec._checks import check_count
from sparsespec._display import reduced_labels
from sparsespec.backbone import TokenFeatures
from sparsespec.explanation.stages import (
    BoolArray,
    CandidateRegions,
    ChannelChoice,
    Crop,
    Explanation,
    Float64Array,
    Foreground,
    Graph,
    ScoreParts,
    Similarity,
    Spectrum,
)
from sparsespec.formats.overlay import reduced_copy
from sparsespec.images import PixelSource, as_pixels
from sparsespec.instances import Candidates
from sparsespec.paper import NCR_KEEP, PaperForeground, PaperInstances
from sparsespec.pipeline import Segmentation, Segmenter, Settings

__all__ = ["explain"]

DEFAULT_MAX_SIDE = 1024
DEFAULT_EIGENVALUES = 16
# Regions that would be instances if the threshold were lower, beside those that are.
_MORE_REGIONS = 12
# Of a region's tokens, what no better one may have taken; the default of sparsespec.instances.select.
_MIN_FREE = 0.8


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
        if pairs is None:
            raise made["error"]
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
