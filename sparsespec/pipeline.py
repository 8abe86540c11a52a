"""The stages in order: image, features, channels, affinity, foreground, instances, pixels."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from sparsespec import __version__, affinity, channels, foreground, instances, paper, refine
from sparsespec._checks import check_count
from sparsespec._threads import limited_threads
from sparsespec.backbone import DEFAULT_LONG_SIDE, Backbone, TokenFeatures
from sparsespec.images import PixelSource, as_pixels

METHODS = ("sparse", "paper")


@dataclass(frozen=True)
class Settings:
    """What ``method="sparse"`` can be tuned by; the defaults were chosen on all development photographs together.

    Attributes
    ----------
    keep, keep_deviation
        NCR and DCR for the graph, see :func:`sparsespec.channels.instance_channels`.
    sharpness, smoothing_sharpness
        Of :func:`sparsespec.affinity.local_affinity`, for cutting and for smoothing the objectness maps.
    smoothing
        Strength of :func:`sparsespec.foreground.smooth`.
    prototypes
        Of the background, see :func:`sparsespec.foreground.background_prototypes`.
    thresholds
        On the objectness maps, in standard deviations above their mean.
    cut_thresholds
        Largest normalised cut that is still made, for a token grid of 32 along its longer side; it falls
        as one over that side.
    min_votes
        Consensus below which a region is no instance, in [0, 1].
    min_votes_left
        The same for what a region has left after better ones took their part of it.
    min_contrast
        Objectness above the background's below which a region is texture, as a difference of cosines.
    filter_radius, filter_eps
        Of the guided filter, see :func:`sparsespec.refine.refine_masks`.
    min_speck
        Islands and holes smaller than this are absorbed, in areas of a token.
    """

    keep: float = 1 / 3
    keep_deviation: int = 60
    sharpness: float = 25.0
    smoothing_sharpness: float = 20.0
    smoothing: float = 3.0
    prototypes: int = 4
    thresholds: tuple[float, ...] = tuple(float(t) for t in np.linspace(-0.5, 2.0, 9))
    cut_thresholds: tuple[float, ...] = (0.02, 0.04, 0.08)
    min_votes: float = 0.36
    min_votes_left: float = 0.3
    min_contrast: float = 0.04
    filter_radius: float = 2.0
    filter_eps: float = 1e-4
    min_speck: float = 0.5

    def __post_init__(self) -> None:
        for name in ("sharpness", "smoothing_sharpness"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)!r}")
        for name in ("thresholds", "cut_thresholds"):
            if not getattr(self, name):
                raise ValueError(f"{name} must hold at least one number")


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The instances of one image.

    Attributes
    ----------
    labels
        (H, W) int32, or the array given as ``out``; 0 is background, 1..n are the instances by falling score.
    scores
        (n,) float32 in [0, 1], descending: how sure we are that this is one object.
    boxes
        (n, 4) float32: x, y, width and height in pixels, of the smallest box around the instance's pixels.
    info
        How the result came about: model, grid, tokens, channels kept, solver, eigenvalues, residuals and seconds per
        stage, as plain values that JSON can hold. The eigenvalues are the Fiedler values of the masks, in the order of
        the instances: one near 0 falls apart easily.
    """

    labels: npt.NDArray[np.integer[Any]]
    scores: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.float32]
    info: dict[str, Any]

    def __len__(self) -> int:
        return len(self.scores)


class Segmenter:
    """Cuts images into object instances; made once, called for every image.

    Thread-safe, and cheap to send to other processes: the model is opened on first use, once in each.

    Parameters
    ----------
    model
        A registry name, the path of an .onnx file made by :mod:`sparsespec.models.build`, or a
        :class:`~sparsespec.backbone.Backbone`.
    n_instances
        None decides from the image, and 0 is a valid answer; an int gives exactly so many (``method="paper"`` fewer,
        where its foreground has fewer tokens that differ).
    method
        "sparse", or "paper" for the published method step by step on dense matrices, which needs ``n_instances``.
    rng
        Seed or generator for k-means of ``method="paper"``; the sparse method does not depend on it. A generator is
        used up to make a seed, once: every image is then segmented as if it were the first.
    long_side, scale, megapixels
        Size of the network's input, one of: pixels along the image's longer side (448 where nothing is given), network
        pixels per pixel of the image (1 for its own resolution), or at most so many million network pixels. Labels have
        the size of the image in any case.
    providers, threads
        See :class:`~sparsespec.backbone.Backbone`; not with a Backbone as the model.
    settings
        Of the sparse method.

    Raises
    ------
    ValueError
        For an unknown model or method, a count below 1, ``method="paper"`` without a count, and the like; the message
        names the argument and what is valid.

    Examples
    --------
    >>> import sparsespec
    >>> from skimage.data import astronaut
    >>> segmenter = sparsespec.Segmenter()
    >>> result = segmenter(astronaut())
    >>> result.labels.shape, len(result) > 0
    ((512, 512), True)
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Backbone = "default",
        n_instances: int | None = None,
        method: str = "sparse",
        rng: int | np.random.Generator = 0,
        *,
        long_side: int | None = None,
        scale: float | None = None,
        megapixels: float | None = None,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        settings: Settings | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, not {method!r}")
        if n_instances is not None:
            n_instances = check_count(n_instances, name="n_instances")
        elif method == "paper":
            raise ValueError('method="paper" needs n_instances: the published method has to be told the count')
        if isinstance(model, Backbone):
            if providers is not None or threads is not None:
                raise ValueError("providers and threads belong to the Backbone: give them to it, not to the Segmenter")
            self._backbone = model
        else:
            self._backbone = Backbone(model, providers=providers, threads=threads)
        if isinstance(rng, np.random.Generator):
            self._seed = int(rng.integers(2**63))
        elif isinstance(rng, (int, np.integer)) and not isinstance(rng, bool) and rng >= 0:
            self._seed = int(rng)
        else:
            raise ValueError(f"rng must be an int of at least 0 or a numpy.random.Generator, not {rng!r}")
        self._resolution = _resolution(long_side, scale, megapixels)
        self._n_instances = n_instances
        self._method = method
        self._settings = settings or Settings()

    @property
    def backbone(self) -> Backbone:
        """The network that gives the features."""
        return self._backbone

    def __call__(
        self, image: npt.ArrayLike | PixelSource, *, out: npt.NDArray[np.integer[Any]] | None = None
    ) -> Segmentation:
        """Segment one image.

        Parameters
        ----------
        image
            (H, W, 3) RGB, (H, W, 4) with alpha, or (H, W) grey; uint8, uint16, bool, or float in [0, 1]. Or a
            :class:`~sparsespec.images.PixelSource`, such as :func:`sparsespec.images.open_image` gives, which is read
            by window and need not fit in memory.
        out
            (H, W) C-contiguous array of integers for the labels, for instance memory-mapped; it becomes ``labels`` of
            the result. The default makes one of int32.

        Returns
        -------
        Segmentation

        Raises
        ------
        ValueError
            When the array isn't an image, has fewer pixels or tokens than the instances asked for, or ``out`` doesn't
            fit.
        """
        clock = _Clock()
        pixels = as_pixels(image)
        run = self._sparse if self._method == "sparse" else self._paper
        with limited_threads(self._backbone.threads):
            found = run(pixels, clock, out)
            with clock("refine"):
                scores, boxes, order = _in_order(found.labels, found.scores)
        info = {
            "version": __version__,
            "model": found.of_tokens["model"],
            "provider": found.of_tokens["provider"],
            "method": self._method,
            "grid": list(found.grid),
            "tokens": found.grid[0] * found.grid[1],
            "tiles": found.of_tokens["tiles"],
            "views": found.of_tokens["views"],
            **found.details,
            **{name: [values[k] for k in order] for name, values in found.of_each.items()},
            "seconds": clock.seconds(),
        }
        return Segmentation(found.labels, scores, boxes, info)

    def _features(self, pixels: PixelSource, clock: _Clock) -> TokenFeatures:
        with clock("features"):
            tokens = self._backbone.features(pixels, **self._resolution)
        wanted = self._n_instances
        height, width = pixels.shape[:2]
        available = min(tokens.grid[0] * tokens.grid[1], height * width)
        if wanted is not None and wanted > available:
            raise ValueError(
                f"n_instances is {wanted}, but an image of {width} x {height} pixels and "
                f"{tokens.grid[0]} x {tokens.grid[1]} tokens holds at most {available} instances"
            )
        return tokens

    def _sparse(self, pixels: PixelSource, clock: _Clock, out: npt.NDArray[np.integer[Any]] | None) -> _Found:
        settings = self._settings
        tokens = self._features(pixels, clock)
        grid, extent, of_tokens = tokens.grid, _extent(tokens), tokens.info
        token_side = tokens.patch_size / tokens.scale
        kinds = (tokens.keys, tokens.queries, tokens.values)

        with clock("channels"):
            reduced = [channels.instance_channels(f, settings.keep, settings.keep_deviation) for f in kinds]
        with clock("affinity"):
            graph = affinity.local_affinity(reduced, grid, sharpness=settings.sharpness)
            ratio = settings.smoothing_sharpness / settings.sharpness
            smoothing_graph = csr_array((graph.data**ratio, graph.indices, graph.indptr), shape=graph.shape)
        with clock("foreground"):
            objectness = [foreground.border_contrast(f, grid, settings.prototypes) for f in kinds]
            standard = np.column_stack([foreground.standardise(m) for m in objectness])
            smoothed = foreground.smooth(standard, smoothing_graph, settings.smoothing)
            maps = [(column, settings.thresholds) for column in smoothed.T]
        channels_seen = {"total": sum(f.shape[1] for f in kinds), "kept": sum(f.shape[1] for f in reduced)}
        # At high resolution these are most of the memory, and what follows needs the graph alone.
        del tokens, kinds, reduced
        with clock("instances"):
            cutter = instances.RegionCutter(graph, grid)
            cut_thresholds = [cut * 32 / max(grid) for cut in settings.cut_thresholds]
            candidates = instances.propose(maps, cutter, cut_thresholds=cut_thresholds)
            masks = instances.select(candidates, min_votes=settings.min_votes, n_instances=self._n_instances)
            if self._n_instances is None:
                masks = masks[candidates.votes(masks) >= settings.min_votes_left]
                masks = masks[foreground.contrast(masks, np.mean(objectness, axis=0)) >= settings.min_contrast]
            elif len(masks) < self._n_instances:
                masks = instances.split_until(masks, self._n_instances, cutter)
            scores = candidates.votes(masks)
            # In the order of the result already: where no mask is lost on the way, its label is its number.
            by_score = np.argsort(-scores, kind="stable")
            masks, scores = masks[by_score], scores[by_score]
            fiedler = [cutter.fiedler_value(cutter.tokens_of(mask)) for mask in masks]
        with clock("refine"):
            token_masks = masks.reshape(-1, *grid)
            labels = refine.refine_masks(
                pixels,
                token_masks,
                extent,
                radius=settings.filter_radius,
                eps=settings.filter_eps,
                out=out,
            )
            refine.absorb_specks(labels, settings.min_speck * token_side**2, out=labels)
            if self._n_instances is not None:
                refine.keep_all(labels, token_masks, extent)
        record = cutter.record
        details = {
            "channels": channels_seen,
            "candidates": len(candidates),
            "solver": "amg-lobpcg and inverse iteration" if record.large else "inverse iteration",
            "cuts": record.cuts,
            "iterations": record.iterations,
            "largest_residual": record.largest_residual,
        }
        of_each = {"eigenvalues": [value for value, _ in fiedler], "residuals": [residual for _, residual in fiedler]}
        return _Found(labels, scores, grid, of_tokens, details, of_each)

    def _paper(self, pixels: PixelSource, clock: _Clock, out: npt.NDArray[np.integer[Any]] | None) -> _Found:
        tokens = self._features(pixels, clock)
        with clock("foreground"):
            mask = paper.foreground(tokens.keys, tokens.grid)
        with clock("instances"):
            found = paper.instances(tokens.keys, tokens.grid, mask.mask, self._n_instances, self._seed)
        with clock("refine"):
            extent = _extent(tokens)
            labels = refine.enlarge_labels(found.labels, extent, pixels.shape[:2])
            if out is not None:
                out[...] = labels
                labels = out
            count = int(found.labels.max(initial=0))
            token_masks = np.arange(1, count + 1)[:, None, None] == found.labels
            refine.keep_all(labels, token_masks, extent)
        details = {
            "channels": {"total": tokens.keys.shape[1], "kept": len(found.keep)},
            "solver": "dense",
            "eigenvalues": found.eigenvalues.tolist(),
            "foreground_eigenvalues": mask.eigenvalues.tolist(),
        }
        # The published method ranks by nothing; the share of the foreground is at least an order.
        sizes = np.array([m.sum() for m in token_masks], np.float64)
        return _Found(labels, sizes / max(sizes.sum(), 1), tokens.grid, tokens.info, details)


def segment(image: npt.ArrayLike | PixelSource, **options: Any) -> Segmentation:
    """Segment one image with a new :class:`Segmenter`, whose options it takes.

    For more than one image make a Segmenter and call it: the model is then opened once.

    Parameters
    ----------
    image
        (H, W, 3), (H, W, 4) or (H, W) array; uint8, uint16, bool, or float in [0, 1]; or a
        :class:`~sparsespec.images.PixelSource`.
    **options
        See :class:`Segmenter`.

    Returns
    -------
    Segmentation

    Raises
    ------
    ValueError
        As :class:`Segmenter` and its call.
    """
    return Segmenter(**options)(image)


@dataclass(frozen=True, eq=False)
class _Found:
    """What a method found: pixels labelled 1..n in the order of its masks, and numbers about each mask."""

    labels: npt.NDArray[np.integer[Any]]
    scores: npt.NDArray[np.float64]
    grid: tuple[int, int]
    of_tokens: dict[str, Any]
    details: dict[str, Any]
    of_each: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class _Clock:
    """Seconds per stage."""

    start: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.stages[stage] = self.stages.get(stage, 0.0) + time.perf_counter() - begin

    def seconds(self) -> dict[str, float]:
        return {**self.stages, "total": time.perf_counter() - self.start}


def _extent(tokens: TokenFeatures) -> tuple[float, float]:
    """Tokens that the image covers, high and wide: the grid without its padding."""
    height, width = (side * tokens.scale / tokens.patch_size for side in tokens.image_shape)
    return min(height, float(tokens.grid[0])), min(width, float(tokens.grid[1]))


def _in_order(
    labels: npt.NDArray[np.integer[Any]], scores: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.intp]]:
    """Number the instances that have pixels by falling score, in place: scores, boxes, and which masks they were."""
    boxes, pixels = refine.label_boxes(labels, len(scores))
    present = np.flatnonzero(pixels[1:])
    order = present[np.argsort(-scores[present], kind="stable")]
    number = np.zeros(len(scores) + 1, np.int64)
    number[order + 1] = np.arange(1, len(order) + 1)
    if not np.array_equal(number[present + 1], present + 1):
        refine.relabel(labels, number)
    return scores[order].astype(np.float32), boxes[order].astype(np.float32), order


def _resolution(long_side: int | None, scale: float | None, megapixels: float | None) -> dict[str, Any]:
    """Read the three ways to say how large the network's input is: the argument of the backbone that says it."""
    given = {
        name: value
        for name, value in (("long_side", long_side), ("scale", scale), ("megapixels", megapixels))
        if value is not None
    }
    if len(given) > 1:
        raise ValueError(f"give one of long_side, scale and megapixels, not {' and '.join(given)}")
    if long_side is not None:
        check_count(long_side, name="long_side")
    for name in ("scale", "megapixels"):
        if name in given and not (isinstance(given[name], (int, float)) and 0 < given[name] < np.inf):
            raise ValueError(f"{name} must be a number above 0, not {given[name]!r}")
    return given or {"long_side": DEFAULT_LONG_SIDE}
