"""What each part of the method is worth: the method, its peers, its steps and its upper bounds on the same features.

Images are taken one after the other. Features of an image, and of the crops of it that are looked at more closely, are
computed once for each model and size; every :class:`Variant` makes its masks of them, and what is kept is no more than
the scores. Before that, where directions are fitted on other sets, those photographs go through the network once more.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from sparsespec import instances, refine
from sparsespec._threads import limited_threads
from sparsespec.backbone import DEFAULT_LONG_SIDE, Backbone, TokenFeatures
from sparsespec.directions import Directions, find_directions
from sparsespec.evaluation.average_precision import is_available
from sparsespec.evaluation.intervals import Interval, bootstrap_difference
from sparsespec.evaluation.metrics import ImageScore, score_image, summarise
from sparsespec.evaluation.peers import segment_with_peer
from sparsespec.evaluation.report import Report
from sparsespec.evaluation.truth import Dataset, Example, TrueInstances
from sparsespec.fitting import fit_directions
from sparsespec.images import PixelSource, read_image
from sparsespec.pipeline import Segmenter, Settings, TokenInstances, find_instances, paint

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.integer[Any]]
Masks = tuple[IntArray, npt.NDArray[np.floating[Any]]]
Say = Callable[[str], None]

PEER_METHODS = ("tokencut", "maskcut", "paper")
METHODS = ("ours", *PEER_METHODS, "truth", "candidates")
SEEN = ("default", "none", "others")
LONG_SIDES = (448, 560, 640)
"""Sizes of the network's input that the table of resolutions has, pixels along the longer side."""
MAX_FITTED = 60
"""Photographs of each set that directions are fitted on where one set is left out."""
COMPARED = ("mean_iou", "f1_50")
"""Measures whose difference from the first row of a table is taken, paired image by image."""


@dataclass(frozen=True)
class Variant:
    """One way from an image to its masks.

    Attributes
    ----------
    method
        "ours"; "tokencut", "maskcut" or "paper" (:mod:`sparsespec.evaluation.peers`); "truth", the token grid filled in
        by what is true; "candidates", of the regions that ours chooses from those that fit the true instances best.
    directions
        Of ours: "default", those that come with the model; "none"; "others", fitted on the other sets only.
    settings
        Of ours; None for those that go with the directions. Of "paper" no more than ``keep``, ``keep_deviation`` and
        ``weights`` matter.
    told_count, told_foreground
        Whether the true number of instances is given, or which tokens lie mostly in one.
    refined
        Of "truth" and "candidates": whether edges follow the photograph; if not, every pixel has the label of its
        token.
    long_side
        Of the network's input, pixels.
    model
        A registry name or the path of a model file.
    """

    method: str = "ours"
    directions: str = "default"
    settings: Settings | None = None
    told_count: bool = False
    told_foreground: bool = False
    refined: bool = True
    long_side: int = DEFAULT_LONG_SIDE
    model: str = "default"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, not {self.method!r}")
        if self.directions not in SEEN:
            raise ValueError(f"directions must be one of {', '.join(map(repr, SEEN))}, not {self.directions!r}")


@dataclass(frozen=True)
class Plan:
    """A table that is to be measured.

    Attributes
    ----------
    key
        Short name.
    title
        Heading.
    rows
        Titles of the rows and what is measured for each. All others are compared with the first.
    """

    key: str
    title: str
    rows: Mapping[str, Variant]


PEER_ROWS: Mapping[str, Variant] = {
    "TokenCut": Variant("tokencut"),
    "MaskCut": Variant("maskcut"),
    "paper, told the count": Variant("paper", told_count=True),
}

# With the dot product neighbours differ more than with BoC, so that the weights need less of a slope: of 5, 10, 15, 20
# and 30 this one served it best.
_COSINE_SHARPNESS = 10.0
# The published table, and BoC alone: which channels are kept, and how two tokens are compared.
PAPER_ROWS: Mapping[str, Mapping[str, Any]] = {
    "NCR + DCR + BoC": {"keep": 1 / 3, "keep_deviation": 60, "weights": "boc"},
    "dot product": {"keep": 1.0, "keep_deviation": None, "weights": "cosine"},
    "NCR": {"keep": 1 / 3, "keep_deviation": None, "weights": "cosine"},
    "NCR + DCR": {"keep": 1 / 3, "keep_deviation": 60, "weights": "cosine"},
    "NCR + BoC": {"keep": 1 / 3, "keep_deviation": None, "weights": "boc"},
    "BoC": {"keep": 1.0, "keep_deviation": None, "weights": "boc"},
}
_WHOLE = PAPER_ROWS["NCR + DCR + BoC"]

STEPS: Mapping[str, Mapping[str, Any]] = {
    "without the direction of objectness": {"learned_weight": 0},
    "without the direction of position": {"back_steps": 0.0, "wholeness": 0.0},
    "edges don't know the position": {"back_steps": 0.0},
    "merit doesn't know the position": {"wholeness": 0.0},
    "without smoothing": {"smoothing": 0.0},
    "one prototype of the background": {"prototypes": 1},
    "without NCR": {"keep": 1.0},
    "without DCR": {"keep_deviation": None},
    "dot product in place of BoC": {"weights": "cosine", "sharpness": _COSINE_SHARPNESS},
    "graph without features": {"sharpness": 1e-9, "smoothing_sharpness": 20e-9},
    "no cuts, connected regions only": {"cut_thresholds": (1e-12,)},
    "one threshold for cuts": {"cut_thresholds": (0.032,)},
    "whatever is left counts": {"min_votes_left": 0.0},
    "texture counts": {"min_contrast": 0.0},
    "no closer look": {"closer_margin": 0.0},
    "specks stay": {"min_speck": 0.0},
    "edges don't follow the photograph": {"filter_radius": 0.0},
}
"""What each step earns: the settings of ours with these changes. Another row is another line here."""


def plans(
    *, models: Sequence[str | os.PathLike[str]] = (), long_sides: Sequence[int] = LONG_SIDES, several_sets: bool = True
) -> tuple[Plan, ...]:
    """List the tables of an ablation.

    Parameters
    ----------
    models
        Files of other models to compare with the embedded one.
    long_sides
        Of the table of resolutions.
    several_sets
        Whether there are other sets to fit directions on.
    """
    ours = Variant()
    shipped = {"ours": ours, "ours, told the count": Variant(told_count=True)}
    plain = {"ours, nothing learned": Variant(directions="none")}
    others = {"ours, learned on the other sets": Variant(directions="others")} if several_sets else {}
    reference = {
        name: Variant("paper", told_count=True, settings=None if changes == _WHOLE else Settings(**changes))
        for name, changes in PAPER_ROWS.items()
    }
    switched = {name: _changed(_switched(changes)) for name, changes in PAPER_ROWS.items()}
    steps = {name: _changed(dataclasses.replace(Settings(), **changes)) for name, changes in STEPS.items()}
    once = dataclasses.replace(Settings(), closer_margin=0.0)
    sizes = {f"{side} pixels": Variant(long_side=side) for side in long_sides if side != DEFAULT_LONG_SIDE}
    other_models = {
        f"{DEFAULT_LONG_SIDE} pixels, {os.path.basename(os.fspath(file))}": Variant(model=os.fspath(file))
        for file in models
    }
    return (
        Plan("peers", "The method and its peers", {**shipped, **plain, **others, **PEER_ROWS}),
        Plan("paper", "The paper's steps by the reference's rule, told the count", reference),
        Plan("paper-ours", "The paper's steps in ours", switched),
        Plan(
            "steps",
            "What each step of ours earns",
            {"ours": ours, **plain, **steps},
        ),
        Plan(
            "bounds",
            "Upper bounds",
            {
                "ours, no closer look": Variant(settings=once),
                "told the count": Variant(settings=once, told_count=True),
                "told the foreground": Variant(settings=once, told_foreground=True),
                "told the foreground and the count": Variant(settings=once, told_foreground=True, told_count=True),
                "told which regions to choose": Variant("candidates"),
                "true tokens": Variant("truth"),
                "true tokens, edges don't follow the photograph": Variant("truth", refined=False),
            },
        ),
        Plan(
            "resolution",
            "Resolution and precision",
            {f"{DEFAULT_LONG_SIDE} pixels, embedded model": ours, **sizes, **other_models},
        ),
    )


def _changed(settings: Settings) -> Variant:
    """Ours with other settings; without any of its own where they are the usual ones, so that it is run once."""
    return Variant() if settings == Settings() else Variant(settings=settings)


def _switched(changes: Mapping[str, Any]) -> Settings:
    if changes["weights"] == "cosine":
        changes = {**changes, "sharpness": _COSINE_SHARPNESS}
    return dataclasses.replace(Settings(), **changes)


@dataclass(frozen=True)
class MeasuredRow:
    """What was measured for one row of a table.

    Attributes
    ----------
    title
        As in the plan.
    variant
        What was run.
    reports
        Measures with confidence intervals, by the name of the set.
    differences
        By the name of the set and the measure: this row minus the first one, with its confidence interval; empty for
        the first.
    """

    title: str
    variant: Variant
    reports: Mapping[str, Report]
    differences: Mapping[str, Mapping[str, Interval]]


@dataclass(frozen=True)
class MeasuredTable:
    """A table with its figures."""

    key: str
    title: str
    rows: Sequence[MeasuredRow]


@dataclass(frozen=True)
class Ablation:
    """All that was measured.

    Attributes
    ----------
    sets
        As they were measured.
    tables
        In the order of the plan.
    fitted_on
        For each set, the sets and the numbers of their photographs that directions were fitted on without it.
    notes
        What to know when reading the figures, a sentence each.
    draws
        Of the bootstrap.
    """

    sets: Sequence[Dataset]
    tables: Sequence[MeasuredTable]
    fitted_on: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    notes: Sequence[str] = field(default_factory=tuple)
    draws: int = 1000


def run_ablation(
    sets: Sequence[Dataset],
    tables: Sequence[Plan],
    *,
    average_precision: bool | None = None,
    draws: int = 1000,
    say: Say = lambda text: None,
) -> Ablation:
    """Measure every row of every table on every set.

    Parameters
    ----------
    sets
        With at least one image each and different names.
    tables
        Of :func:`plans`. What occurs in several rows is run once.
    average_precision
        Take COCO's average precision, for which pycocotools must be installed. None: if it is.
    draws
        Of the bootstrap.
    say
        Called with a line about what is done now.

    Returns
    -------
    Ablation
        The same for the same sets, whatever else is in the tables.

    Raises
    ------
    ValueError
        No set, one without images, two of one name; directions of the other sets where there is no other; an image or
        truth that can't be read or of which the sizes differ, named.
    MissingPackageError
        ``average_precision`` is True and pycocotools is not installed.
    """
    _check_sets(sets)
    variants = list(dict.fromkeys(variant for table in tables for variant in table.rows.values()))
    ranking = is_available() if average_precision is None else average_precision
    runner = _Runner(ranking)
    fitted_on: dict[str, dict[str, int]] = {}
    if any(variant.directions == "others" for variant in variants):
        if len(sets) < 2:
            raise ValueError("directions can be fitted on other sets only where there are at least two sets")
        fitted_on = _fit_without_each(runner, sets, say)

    scores: dict[Variant, dict[str, dict[str, ImageScore]]] = {variant: {} for variant in variants}
    for dataset in sets:
        for variant in variants:
            scores[variant][dataset.name] = {}
        for number, example in enumerate(dataset, start=1):
            say(f"{dataset.name}: image {number} of {len(dataset)}")
            for variant, score in runner.scores(dataset, example, variants):
                scores[variant][dataset.name][example.name] = score

    say("confidence intervals")
    reports = {
        variant: {name: _report(images, draws) for name, images in by_set.items()} for variant, by_set in scores.items()
    }
    measured = []
    for table in tables:
        say(f"confidence intervals of the differences: {table.title}")
        first = next(iter(table.rows.values()))
        rows = [
            MeasuredRow(
                title,
                variant,
                reports[variant],
                {} if variant == first else _differences(scores, variant, first, draws),
            )
            for title, variant in table.rows.items()
        ]
        measured.append(MeasuredTable(table.key, table.title, rows))
    notes = () if ranking else ("AP is left out: average precision needs pycocotools: pip install 'sparsespec[eval]'",)
    return Ablation(tuple(sets), tuple(measured), fitted_on, notes, draws)


def minus_best(
    table: MeasuredTable, ours: str, peers: Sequence[str], measures: Sequence[str], *, draws: int = 1000
) -> dict[str, dict[str, tuple[str, Interval]]]:
    """Difference of a row from the best of others, for each set and measure.

    Parameters
    ----------
    table
        That holds the rows.
    ours, peers
        Titles of rows.
    measures
        Of :data:`~sparsespec.evaluation.metrics.MEASURES`, larger being better; those that were not taken are left out.
    draws
        Of the bootstrap.

    Returns
    -------
    dict
        By set and measure, the title of the best peer and how much it is surpassed, paired image by image.
    """
    rows = {row.title: row for row in table.rows}
    result: dict[str, dict[str, tuple[str, Interval]]] = {}
    for name, report in rows[ours].reports.items():
        result[name] = {}
        for measure in measures:
            values = {peer: getattr(rows[peer].reports[name].summary, measure) for peer in peers}
            if None in values.values():
                continue
            best = max(values, key=lambda peer: -math.inf if math.isnan(values[peer]) else values[peer])
            mine, theirs = (list(one.images.values()) for one in (report, rows[best].reports[name]))
            result[name][measure] = best, bootstrap_difference(mine, theirs, measure, n=draws)
    return result


def limited(dataset: Dataset, limit: int | None) -> Dataset:
    """The first so many images of a set; all of them if None."""
    return dataset if limit is None else dataclasses.replace(dataset, examples=tuple(dataset.examples)[:limit])


def _check_sets(sets: Sequence[Dataset]) -> None:
    if not sets:
        raise ValueError("sets is empty: there is nothing to measure on")
    names = [dataset.name for dataset in sets]
    for dataset in sets:
        if names.count(dataset.name) > 1:
            raise ValueError(f"two sets are called '{dataset.name}': rename a folder")
        if not len(dataset):
            raise ValueError(f"the set '{dataset.name}' holds no image with a truth")


def _report(images: Mapping[str, ImageScore], draws: int) -> Report:
    report = Report(summary=summarise(list(images.values())), images=dict(images))
    return report.with_intervals(n=draws)


def _differences(
    scores: Mapping[Variant, Mapping[str, Mapping[str, ImageScore]]], variant: Variant, first: Variant, draws: int
) -> dict[str, dict[str, Interval]]:
    result: dict[str, dict[str, Interval]] = {}
    for name, images in scores[variant].items():
        # Average precision is not compared, and summing it up for every draw would take most of the time.
        mine, theirs = (
            [dataclasses.replace(score, ranking=None) for score in one.values()]
            for one in (images, scores[first][name])
        )
        result[name] = {measure: bootstrap_difference(mine, theirs, measure, n=draws) for measure in COMPARED}
    return result


@dataclass(frozen=True, eq=False)
class _Scene:
    """One image with what is true of it."""

    pixels: npt.NDArray[Any]
    truth: TrueInstances

    @cached_property
    def true_count(self) -> int:
        """Instances that have a pixel that somebody judged."""
        judged = self.truth.masks[~self.truth.crowd]
        if self.truth.void is not None:
            judged = judged & ~self.truth.void
        return int(judged.any(axis=(1, 2)).sum())


class _Remembering(Backbone):
    """A backbone that computes the features of each picture once, until it is told to forget them.

    Variants look at the same picture, and most of them at the same crops of it.
    """

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self._remembered: dict[tuple[Any, ...], TokenFeatures] = {}

    def features(self, image: Any, **size: Any) -> TokenFeatures:
        """As :meth:`Backbone.features`, which this calls for pictures that it hasn't seen at that size."""
        pixels = image.read(0, 0, *image.shape[:2]) if isinstance(image, PixelSource) else np.asarray(image)
        key = (pixels.shape, pixels.dtype.str, hashlib.sha256(pixels.tobytes()).digest(), tuple(sorted(size.items())))
        if key not in self._remembered:
            self._remembered[key] = super().features(pixels, **size)
        return self._remembered[key]

    def forget(self) -> None:
        """Start anew."""
        self._remembered.clear()


class _Runner:
    """Runs variants, with the models and the directions they need."""

    def __init__(self, ranking: bool) -> None:
        self._ranking = ranking
        self._backbones: dict[str, _Remembering] = {}
        self.without: dict[str, Directions] = {}

    def backbone(self, model: str) -> _Remembering:
        if model not in self._backbones:
            self._backbones[model] = _Remembering(model)
        return self._backbones[model]

    def scores(
        self, dataset: Dataset, example: Example, variants: Sequence[Variant]
    ) -> Iterator[tuple[Variant, ImageScore]]:
        """Score each variant on an image."""
        scene = _Scene(read_image(example.image), example.load())
        if scene.truth.shape != scene.pixels.shape[:2]:
            (height, width), (tall, wide) = scene.truth.shape, scene.pixels.shape[:2]
            raise ValueError(
                f"the sizes differ: the truth of '{example.name}' is {width} x {height} pixels, and the image "
                f"'{example.image}' is {wide} x {tall}"
            )
        for variant in variants:
            backbone = self.backbone(variant.model)
            directions = None
            if variant.directions == "others":
                directions = self.without[dataset.name]
            elif variant.directions == "default":
                directions = find_directions(
                    "default", source_sha256=backbone.features_sha256, channels=backbone.channels
                )
            labels, confidence = _run_variant(variant, scene, backbone, directions)
            yield variant, score_image(labels, scene.truth, confidence, ranking=self._ranking)
        for backbone in self._backbones.values():
            backbone.forget()


def _fit_without_each(runner: _Runner, sets: Sequence[Dataset], say: Say) -> dict[str, dict[str, int]]:
    """Fit directions for each set to photographs of the others; tells how many of which."""
    backbone = runner.backbone("default")
    features: dict[str, list[TokenFeatures]] = {}
    for dataset in sets:
        chosen = fitted_examples(dataset)
        features[dataset.name] = []
        for number, example in enumerate(chosen, start=1):
            say(f"{dataset.name}: features of image {number} of {len(chosen)}")
            tokens = backbone.features(read_image(example.image), long_side=DEFAULT_LONG_SIDE)
            features[dataset.name].append(tokens.halved())
            backbone.forget()
    fitted_on = {}
    for dataset in sets:
        others = {name: of_set for name, of_set in features.items() if name != dataset.name}
        photographs = [one for of_set in others.values() for one in of_set]
        say(f"directions without {dataset.name}, from {len(photographs)} photographs")
        runner.without[dataset.name] = fit_directions(photographs, source_sha256=backbone.features_sha256)
        fitted_on[dataset.name] = {name: len(of_set) for name, of_set in others.items()}
    return fitted_on


def fitted_examples(dataset: Dataset) -> list[Example]:
    """Images of a set that directions for other sets are fitted on: all of them, or so many in even steps."""
    examples = list(dataset)
    count = min(len(examples), MAX_FITTED)
    return [examples[number] for number in np.arange(count) * len(examples) // count]


def _run_variant(variant: Variant, scene: _Scene, backbone: Backbone, directions: Directions | None) -> Masks:
    """Labels of the pixels, 1..n by falling score, and the scores."""
    tokens = backbone.features(scene.pixels, long_side=variant.long_side)
    told = min(scene.true_count, tokens.grid[0] * tokens.grid[1]) if variant.told_count else None
    with limited_threads(backbone.threads):
        if variant.method in PEER_METHODS:
            return _peer(variant, scene, tokens, told)
        if told == 0:
            return np.zeros(tokens.image_shape, np.int32), np.zeros(0)
        if variant.method == "ours" and not variant.told_foreground:
            segmenter = Segmenter(
                backbone,
                told,
                long_side=variant.long_side,
                directions=directions,
                settings=variant.settings,
            )
            result = segmenter(scene.pixels)
            return result.labels, result.scores
        found = _on_the_grid(variant, scene, tokens, directions, told)
        if variant.refined:
            return paint(scene.pixels, found, tokens, variant.settings)
        return _nearest(found.masks, tokens), found.scores


def _on_the_grid(
    variant: Variant, scene: _Scene, tokens: TokenFeatures, directions: Directions | None, told: int | None
) -> TokenInstances:
    """What is found when the truth takes the place of a stage."""
    if variant.method == "truth":
        labels = true_tokens(scene.truth, tokens)
        masks = np.arange(1, labels.max(initial=0) + 1)[:, None] == labels
        masks = masks[masks.any(axis=1)]
        return _found(masks, np.ones(len(masks)))
    foreground = true_foreground(scene.truth, tokens) if variant.told_foreground else None
    found = find_instances(
        tokens, variant.settings, directions=directions, n_instances=told, foreground_mask=foreground
    )
    if variant.method == "candidates":
        return _found(*_best_choice(found.candidates.masks, true_tokens(scene.truth, tokens)))
    return found


def _peer(variant: Variant, scene: _Scene, tokens: TokenFeatures, told: int | None) -> Masks:
    settings = variant.settings
    steps = None
    if settings is not None:
        steps = {"keep": settings.keep, "keep_deviation": settings.keep_deviation, "weights": settings.weights}
    return segment_with_peer(variant.method, tokens, scene.pixels, n_instances=told, steps=steps)


def _found(masks: BoolArray, scores: npt.NDArray[np.float64]) -> TokenInstances:
    candidates = instances.Candidates.from_masks(masks, np.ones(len(masks), np.int64), 1)
    return TokenInstances(masks, scores, candidates, {}, {})


def _nearest(masks: BoolArray, tokens: TokenFeatures) -> IntArray:
    numbers = np.arange(1, len(masks) + 1, dtype=np.int32)
    labels = (masks * numbers[:, None]).sum(axis=0, dtype=np.int32).reshape(tokens.grid)
    return refine.enlarge_labels(labels, tokens.extent, tokens.image_shape)


def _pixels_of_tokens(masks: BoolArray, tokens: TokenFeatures) -> npt.NDArray[np.float64]:
    """(n, N): how many pixels of each mask lie in each token."""
    down, across = (
        (
            np.minimum((np.arange(pixels) + 0.5) * (covered / pixels), count - 1).astype(np.intp)
            == np.arange(count)[:, None]
        )
        for pixels, covered, count in zip(tokens.image_shape, tokens.extent, tokens.grid, strict=True)
    )
    summed = down.astype(np.float32) @ masks.astype(np.float32) @ across.T.astype(np.float32)
    return summed.reshape(len(masks), -1).astype(np.float64)


def true_tokens(truth: TrueInstances, tokens: TokenFeatures) -> npt.NDArray[np.intp]:
    """What holds most of each token's pixels: no more can be known on the token grid.

    Parameters
    ----------
    truth
        Of the image.
    tokens
        Of the same image.

    Returns
    -------
    (N,) intp array
        0 is background, k the k-th instance that is no crowd. Void pixels don't count; of equal shares the first wins,
        the background before all.
    """
    masks, judged = _judged(truth)
    shares = _pixels_of_tokens(np.concatenate([(judged & ~masks.any(axis=0))[None], masks]), tokens)
    return np.argmax(shares, axis=0)


def true_foreground(truth: TrueInstances, tokens: TokenFeatures) -> BoolArray:
    """(N,) bool: tokens of whose judged pixels more than half lie in true instances."""
    masks, judged = _judged(truth)
    inside, outside = _pixels_of_tokens(np.stack([masks.any(axis=0), judged & ~masks.any(axis=0)]), tokens)
    return inside > outside


def _judged(truth: TrueInstances) -> tuple[BoolArray, BoolArray]:
    """Masks of the instances that count, and all pixels, without those that are void."""
    judged = np.ones(truth.shape, bool) if truth.void is None else ~truth.void
    return truth.masks[~truth.crowd] & judged, judged


def _best_choice(candidates: BoolArray, labels: npt.NDArray[np.intp]) -> tuple[BoolArray, npt.NDArray[np.float64]]:
    """Pair candidates with true instances on the token grid so that the summed IoU is largest; disjoint masks.

    A token that two of them want goes to the one that fits better.
    """
    true = np.arange(1, labels.max(initial=0) + 1)[:, None] == labels
    shared = candidates.astype(np.float64) @ true.T.astype(np.float64)
    sizes = candidates.sum(axis=1)[:, None] + true.sum(axis=1)
    iou = shared / np.maximum(sizes - shared, 1)
    rows, columns = linear_sum_assignment(iou, maximize=True)
    fits = iou[rows, columns]
    order = np.argsort(-fits, kind="stable")
    order = order[fits[order] > 0]
    masks = candidates[rows[order]]
    free = np.cumsum(masks, axis=0) == 1
    return masks & free, fits[order]
