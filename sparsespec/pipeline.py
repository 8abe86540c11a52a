"""The stages in order: image, features, channels, affinity, foreground, instances, pixels."""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from sparsespec import __version__, affinity, channels, foreground, instances, paper, refine
from sparsespec._checks import check_count
from sparsespec._display import coloured_labels, instance_colours, png_uri, reduced_labels
from sparsespec._threads import limited_threads
from sparsespec.backbone import DEFAULT_LONG_SIDE, Backbone, TokenFeatures
from sparsespec.closer import crop_around, redraw
from sparsespec.directions import Directions, find_directions
from sparsespec.images import PixelSource, as_pixels, crop
from sparsespec.spectral import EigenSolverError, smallest_eigenpairs

METHODS = ("sparse", "paper")
WEIGHTS = ("boc", "cosine")
# The residual of a region in the middle of the field: wholeness alone leaves its votes as they are.
_USUAL_RESIDUAL = 1 / 8
# Of a logistic curve from merit to the overlap measured on the development photographs.
_CALIBRATION = (2.76, 3.52)
# A crop whose longer side is more than this share of what the network saw at once would show nothing new.
LARGEST_CROP = 0.85
# Of the labels in a notebook: their longest side, and what smaller ones are enlarged to; and the most instances listed.
_NOTEBOOK_SIDE = 512
_NOTEBOOK_LEAST = 160
_NOTEBOOK_ROWS = 50
# Height and width of the picture that nobody wants segmented.
_WARM_UP = (112, 224)


@dataclass(frozen=True)
class Settings:
    """What ``method="sparse"`` can be tuned by; the defaults were chosen on all development photographs together.

    Attributes
    ----------
    keep, keep_deviation
        NCR and DCR for the graph, see :func:`sparsespec.channels.instance_channels`; 1 and None keep all channels.
    weights
        Of the graph: "boc" (:func:`sparsespec.affinity.local_affinity`), or "cosine" for the dot product of unit tokens
        (:func:`sparsespec.affinity.cosine_affinity`).
    sharpness, smoothing_sharpness
        Of the weights, for cutting and for smoothing the objectness maps.
    back_steps
        How much edges are weakened along which the position within the object steps back, see
        :func:`sparsespec.affinity.weaken_back_steps`; needs directions.
    smoothing
        Strength of :func:`sparsespec.foreground.smooth`.
    prototypes
        Of the background, see :func:`sparsespec.foreground.background_prototypes`.
    thresholds
        On the maps of border contrast, in standard deviations above their mean.
    learned_thresholds, learned_contrast, learned_weight
        On the objectness by direction, to which so many times the border contrast of the queries is added; and how many
        votes each of its partitions has. A weight of 0 leaves it out.
    cut_thresholds
        Largest normalised cut that is still made, for a token grid of 32 along its longer side; it falls
        as one over that side.
    wholeness
        How much the merit of a region falls with the residual of its tokens' positions, see
        :func:`sparsespec.instances.position_residuals`; needs directions.
    min_merit
        Votes times wholeness below which a region is no instance.
    min_votes_left
        Votes below which it is none after better ones took their part of it.
    min_contrast
        Largest border contrast, smoothed, below which an image holds nothing, as a difference of cosines.
    closer_margin, closer_cuts
        Of the crops that instances are looked at in once more, see :func:`sparsespec.closer.crop_around`, and what the
        cut thresholds are multiplied with in them. A margin of 0 leaves the closer look out.
    filter_radius, filter_eps
        Of the guided filter, see :func:`sparsespec.refine.refine_masks`.
    min_speck
        Islands and holes smaller than this are absorbed, in areas of a token.
    """

    keep: float = 1 / 3
    keep_deviation: int | None = 60
    weights: str = "boc"
    sharpness: float = 25.0
    smoothing_sharpness: float = 20.0
    back_steps: float = 20.0
    smoothing: float = 3.0
    prototypes: int = 4
    thresholds: tuple[float, ...] = tuple(float(t) for t in np.linspace(-0.5, 2.0, 9))
    learned_thresholds: tuple[float, ...] = tuple(float(t) for t in np.linspace(-0.2, 1.8, 9))
    learned_contrast: float = 2.0
    learned_weight: int = 3
    cut_thresholds: tuple[float, ...] = (0.016, 0.032, 0.064)
    wholeness: float = 2.0
    min_merit: float = 0.36
    min_votes_left: float = 0.27
    min_contrast: float = 0.24
    closer_margin: float = 0.75
    closer_cuts: float = 0.4
    filter_radius: float = 2.0
    filter_eps: float = 1e-4
    min_speck: float = 0.5

    def __post_init__(self) -> None:
        for name in ("sharpness", "smoothing_sharpness", "closer_cuts"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be a number above 0, not {getattr(self, name)!r}")
        for name in ("back_steps", "smoothing", "wholeness", "min_contrast", "closer_margin", "min_speck"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be a number of at least 0, not {getattr(self, name)!r}")
        check_count(self.prototypes, name="prototypes")
        check_count(self.learned_weight, name="learned_weight", least=0)
        for name in ("thresholds", "learned_thresholds", "cut_thresholds"):
            numbers = getattr(self, name)
            if not numbers or not np.isfinite(numbers).all():
                raise ValueError(f"{name} must hold at least one number, all of them finite, not {numbers!r}")
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(map(repr, WEIGHTS))}, not {self.weights!r}")


PLAIN = Settings(
    back_steps=0.0,
    wholeness=0.0,
    learned_weight=0,
    cut_thresholds=(0.02, 0.04, 0.08),
    min_votes_left=0.3,
    closer_margin=0.0,
)
"""The settings where there are no directions: nothing but the photograph itself decides."""


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The instances of one image.

    Attributes
    ----------
    labels
        (H, W) int32, or the array given as ``out``; 0 is background, 1..n are the instances by falling score.
    scores
        (n,) float32 in [0, 1], descending: how sure we are that this is one object, as the intersection over union with
        a true one to expect.
    boxes
        (n, 4) float32: x, y, width and height in pixels, of the smallest box around the instance's pixels.
    info
        How the result came about: model, grid, tokens, channels kept, solver, eigenvalues, residuals and seconds per
        stage, as plain values that JSON can hold. The eigenvalues are the Fiedler values of the masks, in the order of
        the instances: one near 0 falls apart easily.
    layers
        (h, w) float32 maps on the token grid, to look at: "foreground", the share of the thresholds on all objectness
        maps that a token lies above (``method="paper"``: 1 for the foreground's tokens), and "eigenvector 1", ... as
        far as they were asked for, those of the graph that is cut from the second smallest eigenvalue on, each scaled
        to a largest magnitude of 1. The image covers the first ``info["extent"]`` tokens (rows, columns) of the grid.
    """

    labels: npt.NDArray[np.integer[Any]]
    scores: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.float32]
    info: dict[str, Any]
    layers: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.scores)

    def _repr_html_(self) -> str:
        """Show labels in colour and a table of the instances, as notebooks do with what a cell ends in."""
        small = reduced_labels(self.labels, _NOTEBOOK_SIDE)
        height, width = self.labels.shape
        count = len(self)
        # Of the reduced labels: all pixels of a large image would take seconds to count.
        shares = np.bincount(small.ravel(), minlength=count + 1)[1 : count + 1] / max(small.size, 1)
        found = "no instances" if not count else "1 instance" if count == 1 else f"{count} instances"
        rows = []
        for label in range(1, min(count, _NOTEBOOK_ROWS) + 1):
            red, green, blue = instance_colours(count)[label - 1]
            box = " ".join(f"{number:g}" for number in self.boxes[label - 1])
            share = f"{shares[label - 1]:.1%}" if shares[label - 1] >= 0.0005 else "&lt; 0.1%"
            rows.append(
                f'<tr><td><span style="display:inline-block;width:1em;height:1em;background:rgb({red},{green},{blue})">'
                f"</span> {label}</td><td>{self.scores[label - 1]:.2f}</td><td>{share}</td><td>{box}</td></tr>"
            )
        more = f"<p>and {count - _NOTEBOOK_ROWS} more</p>" if count > _NOTEBOOK_ROWS else ""
        table = (
            "<table><thead><tr><th>label</th><th>score</th><th>area</th><th>box: x y width height</th></tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>{more}"
            if rows
            else ""
        )
        larger = max(1, _NOTEBOOK_LEAST // max(small.shape))
        picture = png_uri(coloured_labels(small.repeat(larger, axis=0).repeat(larger, axis=1)))
        return (
            '<div style="display:flex;flex-wrap:wrap;gap:1em;align-items:flex-start">'
            f'<img src="{picture}" alt="labels of {found}" style="max-width:100%">'
            f"<div><p><b>{found}</b> in {width} &times; {height} pixels</p>{table}</div></div>"
        )


class Segmenter:
    """Cuts images into object instances; made once, called for every image.

    Any number of threads can call it; so many images are segmented at once as its Backbone has ``concurrency``, and
    each gives the same bytes as alone. Cheap to send to other processes: the model is opened on first use in each.

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
    provider, provider_options, threads
        See :class:`~sparsespec.backbone.Backbone`; not with a Backbone as the model.
    directions
        Of the network, fitted without labels (:mod:`sparsespec.directions`): "default" takes those that come with the
        package, if there are any for this network, None none, a path those that ``sparsespec fit`` wrote. Without
        directions nothing but the photograph itself decides.
    settings
        Of the sparse method. The default depends on whether there are directions.

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
        provider: str = "auto",
        provider_options: Mapping[str, Any] | None = None,
        threads: int | None = None,
        directions: Directions | str | os.PathLike[str] | None = "default",
        settings: Settings | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, not {method!r}")
        if n_instances is not None:
            n_instances = check_count(n_instances, name="n_instances")
        elif method == "paper":
            raise ValueError('method="paper" needs n_instances: the published method has to be told the count')
        if isinstance(model, Backbone):
            if provider != "auto" or provider_options is not None or threads is not None:
                raise ValueError("provider and threads belong to the Backbone: give them to it, not to the Segmenter")
            self._backbone = model
        else:
            self._backbone = Backbone(model, provider=provider, provider_options=provider_options, threads=threads)
        if isinstance(rng, np.random.Generator):
            self._seed = int(rng.integers(2**63))
        elif isinstance(rng, (int, np.integer)) and not isinstance(rng, bool) and rng >= 0:
            self._seed = int(rng)
        else:
            raise ValueError(f"rng must be an int of at least 0 or a numpy.random.Generator, not {rng!r}")
        self._resolution = _resolution(long_side, scale, megapixels)
        self._n_instances = n_instances
        self._method = method
        self._directions = find_directions(
            directions, source_sha256=self._backbone.features_sha256, channels=self._backbone.channels
        )
        self._settings = _default_settings(settings, self._directions)

    @property
    def backbone(self) -> Backbone:
        """The network that gives the features."""
        return self._backbone

    @property
    def settings(self) -> Settings:
        """What the sparse method is tuned by."""
        return self._settings

    @property
    def n_instances(self) -> int | None:
        """How many instances are asked for; None where the image decides."""
        return self._n_instances

    def with_threads(self, threads: int) -> Segmenter:
        """Give a copy that segments one image at a time with so many threads, its model not yet opened.

        Its results are the same: this is how a worker process is kept to its share of the processors.
        """
        other = copy.copy(self)
        other._backbone = self._backbone.with_threads(threads)
        return other

    def warm_up(self) -> None:
        """Open the model and segment a small picture, so that no image waits for it or for kernels to be compiled.

        Raises
        ------
        ImportError, ProviderError
            See :meth:`sparsespec.backbone.Backbone.features`.
        """
        down, across = np.mgrid[: _WARM_UP[0], : _WARM_UP[1]]
        picture = np.stack([down * 2, across, 255 - across], axis=2).astype(np.uint8)
        # Something to find: two discs of other colours than what is behind them.
        for middle, colour in ((_WARM_UP[1] // 4, (240, 200, 40)), (_WARM_UP[1] * 3 // 4, (40, 30, 60))):
            picture[np.hypot(down - _WARM_UP[0] // 2, across - middle) < _WARM_UP[0] / 3] = colour
        other = copy.copy(self)
        other._resolution = _resolution(None, None, None)
        other._n_instances = None if self._n_instances is None else 1
        other(picture)

    def __call__(
        self,
        image: npt.ArrayLike | PixelSource,
        *,
        out: npt.NDArray[np.integer[Any]] | None = None,
        eigenvectors: int = 0,
        watch: Watch | None = None,
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
        eigenvectors
            How many of the whole graph to compute for :attr:`Segmentation.layers`. They are there to be looked at; the
            instances do not depend on them. Where no solver reaches its tolerance they are left out.
        watch
            Is called with the name of each step and what it made, in order, see :data:`Watch`.

        Returns
        -------
        Segmentation

        Raises
        ------
        ValueError
            When the array isn't an image, has fewer pixels or tokens than the instances asked for, ``out`` doesn't
            fit, or ``eigenvectors`` is negative.
        BusyError, ForkError
            See :meth:`sparsespec.backbone.Backbone.turn`: an image takes one turn, and is segmented within it.
        """
        pixels = as_pixels(image)
        check_count(eigenvectors, name="eigenvectors", least=0)
        run = self._sparse if self._method == "sparse" else self._paper
        with self._backbone.turn(), limited_threads(self._backbone.threads):
            clock = _Clock()
            found = run(pixels, clock, out, eigenvectors, watch or _nobody)
            with clock("refine"):
                scores, boxes, order = _in_order(found.labels, found.scores)
        if watch is not None:
            watch("order", {"order": order})
        info = {
            "version": __version__,
            "model": found.of_tokens["model"],
            "provider": found.of_tokens["provider"],
            "method": self._method,
            "grid": list(found.grid),
            "extent": list(found.extent),
            "tokens": found.grid[0] * found.grid[1],
            "tiles": found.of_tokens["tiles"],
            "views": found.of_tokens["views"],
            **found.details,
            **{name: [values[k] for k in order] for name, values in found.of_each.items()},
            "seconds": clock.seconds(),
        }
        layers = {name: np.reshape(values, found.grid).astype(np.float32) for name, values in found.layers.items()}
        return Segmentation(found.labels, scores, boxes, info, layers)

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

    def _sparse(
        self,
        pixels: PixelSource,
        clock: _Clock,
        out: npt.NDArray[np.integer[Any]] | None,
        eigenvectors: int,
        watch: Watch,
    ) -> _Found:
        tokens = self._features(pixels, clock)
        watch("features", {"tokens": tokens})
        found = _find(
            tokens,
            self._settings,
            self._directions,
            self._n_instances,
            None,
            clock,
            eigenvectors=eigenvectors,
            watch=watch,
        )
        frame, of_tokens = _Frame.of(tokens), tokens.info
        # At high resolution these are most of the memory, and what follows needs the masks alone.
        del tokens
        exact = self._n_instances is not None
        with clock("refine"):
            labels = _paint(pixels, found.masks, frame, self._settings, exact, out)
        watch("refine", {"labels": labels})
        details, scores, of_each, crops = found.details, found.scores, found.of_each, 0
        if self._settings.closer_margin > 0 and len(found.masks):
            scores, of_each, crops = self._look_closer(pixels, found, frame, labels, clock, watch)
        details = {**details, "crops": crops}
        return _Found(labels, scores, frame.grid, frame.extent, of_tokens, details, of_each, found.layers)

    def _look_closer(
        self,
        pixels: PixelSource,
        found: TokenInstances,
        frame: _Frame,
        labels: npt.NDArray[np.integer[Any]],
        clock: _Clock,
        watch: Watch,
    ) -> tuple[npt.NDArray[np.float64], dict[str, list[float]], int]:
        """Redraw instances from crops around them: scores and numbers of each label, and how many crops there were."""
        settings = self._settings
        closer = dataclasses.replace(
            settings, cut_thresholds=tuple(cut * settings.closer_cuts for cut in settings.cut_thresholds)
        )
        scores = found.scores.tolist()
        # The filter of the edges leaves nothing of some.
        _, pixels_of = refine.label_boxes(labels, len(scores))
        of_each = {name: list(values) for name, values in found.of_each.items()}
        looked = 0
        for k, mask in enumerate(found.masks):
            box = crop_around(mask.reshape(frame.grid), frame.token_side, frame.shape, settings.closer_margin)
            if box is None or max(box[2] - box[0], box[3] - box[1]) * frame.scale > LARGEST_CROP * DEFAULT_LONG_SIDE:
                continue
            top, left, bottom, right = box
            view = labels[top:bottom, left:right]
            if not pixels_of[k + 1]:
                continue
            window = crop(pixels, box)
            with clock("features"):
                tokens = self._backbone.features(window, long_side=DEFAULT_LONG_SIDE)
            seen = _find(tokens, closer, self._directions, None, None, clock)
            looked += 1
            with clock("refine"):
                # Few bytes a pixel: of a photograph of 200 megapixels, a crop can be half.
                regions = np.empty(window.shape[:2], np.min_scalar_type(len(seen.masks)))
                _paint(window, seen.masks, _Frame.of(tokens), closer, False, regions)
                taken = redraw(view, k + 1, regions, len(scores) + 1, split=self._n_instances is None)
            watch("crop", {"instance": k, "box": box, "tokens": tokens, "found": seen, "taken": taken})
            for label, region in taken:
                if len(taken) > 1:
                    score = float(np.sqrt(found.scores[k] * seen.scores[region - 1]))
                    numbers = {name: values[region - 1] for name, values in seen.of_each.items()}
                    if label == k + 1:
                        scores[k] = score
                        for name, value in numbers.items():
                            of_each[name][k] = value
                    else:
                        scores.append(score)
                        for name, value in numbers.items():
                            of_each[name].append(value)
        return np.array(scores), of_each, looked

    def _paper(
        self,
        pixels: PixelSource,
        clock: _Clock,
        out: npt.NDArray[np.integer[Any]] | None,
        eigenvectors: int,
        watch: Watch,
    ) -> _Found:
        tokens = self._features(pixels, clock)
        watch("features", {"tokens": tokens})
        with clock("foreground"):
            mask = paper.foreground(tokens.keys, tokens.grid)
        watch("foreground", {"paper": mask})
        with clock("instances"):
            found = paper.instances(tokens.keys, tokens.grid, mask.mask, self._n_instances, self._seed)
        watch("instances", {"paper": found})
        with clock("refine"):
            labels = refine.enlarge_labels(found.labels, tokens.extent, pixels.shape[:2])
            if out is not None:
                out[...] = labels
                labels = out
            count = int(found.labels.max(initial=0))
            token_masks = np.arange(1, count + 1)[:, None, None] == found.labels
            refine.keep_all(labels, token_masks, tokens.extent)
        details = {
            "channels": {"total": tokens.keys.shape[1], "kept": len(found.keep)},
            "solver": "dense",
            "eigenvalues": found.eigenvalues.tolist(),
            "foreground_eigenvalues": mask.eigenvalues.tolist(),
        }
        # The published method ranks by nothing; the share of the foreground is at least an order.
        sizes = np.array([m.sum() for m in token_masks], np.float64)
        watch("refine", {"labels": labels})
        layers = {"foreground": mask.mask.astype(np.float64)}
        layers.update(_eigenvector_layers(found.eigenvectors[:, 1:].T, eigenvectors))
        return _Found(labels, sizes / max(sizes.sum(), 1), tokens.grid, tokens.extent, tokens.info, details, {}, layers)


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
class TokenInstances:
    """The instances of one image on its token grid.

    Attributes
    ----------
    masks
        (n, N) bool, disjoint, by falling score.
    scores
        (n,) float64 in [0, 1].
    candidates
        The regions they were chosen from.
    details
        Numbers about the image, of :attr:`Segmentation.info`.
    of_each
        Numbers about each instance, of :attr:`Segmentation.info`.
    layers
        (N,) maps, of :attr:`Segmentation.layers`.
    """

    masks: npt.NDArray[np.bool_]
    scores: npt.NDArray[np.float64]
    candidates: instances.Candidates
    details: dict[str, Any]
    of_each: dict[str, list[float]]
    layers: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)


Watch = Callable[[str, Mapping[str, Any]], None]
"""Is told of each step of an image: ``watch(step, made)``. What is made must not be changed or kept for long.

Steps of ``method="sparse"``, in this order:

``features``
    ``tokens``, the :class:`~sparsespec.backbone.TokenFeatures`.
``channels``
    ``reduced``, the three arrays of :func:`sparsespec.channels.instance_channels` for keys, queries and values.
``affinity``
    ``graph``, what is cut; ``plain``, the same before :func:`sparsespec.affinity.weaken_back_steps`; ``smoothing``,
    what maps are smoothed on; ``position``, (N, 2) or None.
``eigenpairs``
    ``pairs``, the :class:`~sparsespec.spectral.Eigenpairs` of ``graph``, or None, and then ``error``, why no solver
    found them. Only if some were asked for.
``foreground``
    ``maps``, a list of :class:`ObjectnessMap`; ``contrast``, the largest smoothed border contrast, or None where the
    foreground was given; ``anything``, whether that is enough for there to be something.
``instances``
    ``cutter``, ``candidates``, ``cut_thresholds``; for each candidate ``votes``, ``residuals`` (None without
    directions) and ``merit``; ``masks``, (n, N) bool; for each mask ``mask_votes``, ``mask_residuals`` (or None),
    ``mask_merit`` and ``scores``.
``refine``
    ``labels``, pixels before the closer look, which goes on to change them.
``crop``
    One for each crop that is looked at: ``instance``, the number from 0 of the mask that it is around; ``box``, top,
    left, bottom and right in pixels; ``tokens``; ``found``, the :class:`TokenInstances` in it; ``taken``, see
    :func:`sparsespec.closer.redraw`.
``order``
    ``order``, (n,): label k + 1 of the result is mask ``order[k]``, by its number from 0; those that a crop added come
    after the masks, in the order in which they were taken. Instances without pixels are missing.

Those of ``method="paper"``: ``features``, ``foreground`` (``paper``, a :class:`sparsespec.paper.PaperForeground`),
``instances`` (``paper``, a :class:`sparsespec.paper.PaperInstances`), ``refine`` and ``order``.
"""


@dataclass(frozen=True, eq=False)
class ObjectnessMap:
    """How object-like each token is, by one measure.

    Attributes
    ----------
    name
        "keys", "queries" or "values" for their border contrast, "learned", or "given".
    raw, smoothed
        (N,) float64; the latter is thresholded.
    thresholds
        That are taken on it.
    votes
        How often each of its partitions counts.
    """

    name: str
    raw: npt.NDArray[np.float64]
    smoothed: npt.NDArray[np.float64]
    thresholds: Sequence[float]
    votes: int = 1


def find_instances(
    tokens: TokenFeatures,
    settings: Settings | None = None,
    *,
    directions: Directions | None = None,
    n_instances: int | None = None,
    foreground_mask: npt.NDArray[np.bool_] | None = None,
) -> TokenInstances:
    """Everything between the features and the pixels of ``method="sparse"``: for tables, and for features of your own.

    Parameters
    ----------
    tokens
        Features of an image.
    settings
        The default is ``Settings()`` with directions and :data:`PLAIN` without.
    directions
        Of the network that made the features.
    n_instances
        As for :class:`Segmenter`.
    foreground_mask
        (N,) bool: take this for the foreground instead of looking for one.

    Returns
    -------
    TokenInstances

    Raises
    ------
    ValueError
        ``foreground_mask`` has another length; the directions are of another network; more instances are wanted than
        there are tokens.
    """
    n_tokens = tokens.grid[0] * tokens.grid[1]
    if n_instances is not None and check_count(n_instances, name="n_instances") > n_tokens:
        raise ValueError(f"n_instances is {n_instances}, but the image has only {n_tokens} tokens")
    return _find(tokens, _default_settings(settings, directions), directions, n_instances, foreground_mask, _Clock())


def paint(
    pixels: npt.ArrayLike | PixelSource,
    found: TokenInstances,
    tokens: TokenFeatures,
    settings: Settings | None = None,
) -> tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.float32]]:
    """From instances on the token grid to pixels, as :class:`Segmenter` does it.

    Parameters
    ----------
    pixels
        The image that the features are of.
    found
        Of :func:`find_instances`.
    tokens
        Features of the image.
    settings
        As for :func:`find_instances`; only what concerns pixels matters.

    Returns
    -------
    labels : (H, W) int32 array
        0 is background, 1..n are the instances by falling score.
    scores : (n,) float32 array
        Of those that have pixels.

    Raises
    ------
    ValueError
        When ``pixels`` isn't an image, or not of the size of the one that the tokens are of.
    """
    settings = settings or Settings()
    source = as_pixels(pixels)
    if tuple(source.shape[:2]) != tuple(tokens.image_shape):
        raise ValueError(
            f"pixels are {source.shape[0]} high and {source.shape[1]} wide, but the tokens are of an image of "
            f"{tokens.image_shape[0]} and {tokens.image_shape[1]}"
        )
    labels = _paint(source, found.masks, _Frame.of(tokens), settings, False, None)
    scores, _, _ = _in_order(labels, found.scores)
    return labels, scores


def _default_settings(settings: Settings | None, directions: Directions | None) -> Settings:
    return settings or (PLAIN if directions is None else Settings())


def _find(
    tokens: TokenFeatures,
    settings: Settings,
    directions: Directions | None,
    n_instances: int | None,
    foreground_mask: npt.NDArray[np.bool_] | None,
    clock: _Clock,
    *,
    eigenvectors: int = 0,
    watch: Watch = lambda step, made: None,
) -> TokenInstances:
    grid = tokens.grid
    kinds = (tokens.keys, tokens.queries, tokens.values)
    with clock("channels"):
        reduced = [channels.instance_channels(f, settings.keep, settings.keep_deviation) for f in kinds]
    watch("channels", {"reduced": reduced})
    with clock("affinity"):
        weigh = affinity.local_affinity if settings.weights == "boc" else affinity.cosine_affinity
        graph = weigh(reduced, grid, sharpness=settings.sharpness)
        ratio = settings.smoothing_sharpness / settings.sharpness
        smoothing_graph = csr_array((graph.data**ratio, graph.indices, graph.indptr), shape=graph.shape)
        plain, position = graph, None
        if directions is not None and (settings.back_steps or settings.wholeness):
            position = directions.position_of(*kinds)
        if position is not None and settings.back_steps:
            graph = affinity.weaken_back_steps(graph, position, grid, strength=settings.back_steps)
    watch("affinity", {"graph": graph, "plain": plain, "smoothing": smoothing_graph, "position": position})
    layers = {}
    if eigenvectors:
        with clock("eigenvectors"):
            pairs, error = None, None
            try:
                pairs = smallest_eigenpairs(graph, min(eigenvectors + 1, graph.shape[0]))
                layers = _eigenvector_layers(pairs.random_walk_vectors()[:, 1:].T, eigenvectors)
            except EigenSolverError as failed:  # they are to be looked at: no image is to fail for them
                error = failed
        watch("eigenpairs", {"pairs": pairs, "error": error})
    kept = sum(f.shape[1] for f in reduced)
    # At high resolution this is much of the memory, and what follows needs the graph and the features as they were.
    del reduced, plain
    with clock("foreground"):
        contrast, anything = None, True
        if foreground_mask is None:
            maps, contrast = _objectness_maps(kinds, grid, smoothing_graph, settings, directions)
            # Whoever gives the count says that there is something.
            anything = contrast >= settings.min_contrast or n_instances is not None
        else:
            chosen = np.asarray(foreground_mask, bool)
            if chosen.shape != (grid[0] * grid[1],):
                raise ValueError(f"foreground_mask must be of shape ({grid[0] * grid[1]},), not {chosen.shape}")
            maps = [ObjectnessMap("given", chosen.astype(np.float64), chosen.astype(np.float64), (0.5,))]
        layers = {"foreground": _foreground_share(maps), **layers}
    watch("foreground", {"maps": maps, "contrast": contrast, "anything": anything})
    with clock("instances"):
        cutter = instances.RegionCutter(graph, grid)
        cut_thresholds = [cut * 32 / max(grid) for cut in settings.cut_thresholds]
        partitions = [(m.smoothed, m.thresholds) for m in maps for _ in range(m.votes)] if anything else []
        candidates = instances.propose(partitions, cutter, cut_thresholds=cut_thresholds)

        def whole(residuals: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            return np.asarray(np.exp(settings.wholeness * (_USUAL_RESIDUAL - residuals)))

        own_votes = merit = candidates.own_votes()
        residuals = None
        if position is not None:
            residuals = candidates.own_residuals(position, grid)
            merit = own_votes * whole(residuals)
        masks = instances.select(candidates, merit=merit, min_merit=settings.min_merit, n_instances=n_instances)
        votes = candidates.votes(masks)
        if n_instances is None:
            masks, votes = masks[votes >= settings.min_votes_left], votes[votes >= settings.min_votes_left]
        elif len(masks) < n_instances:
            masks = instances.split_until(masks, n_instances, cutter)
            votes = candidates.votes(masks)
        mask_merit, mask_residuals = votes, None
        if position is not None:
            mask_residuals = instances.position_residuals(masks, position, grid)
            mask_merit = votes * whole(mask_residuals)
        scores = likely_overlap(mask_merit)
        # In the order of the result already: where no mask is lost on the way, its label is its number.
        by_score = np.argsort(-scores, kind="stable")
        masks, scores = masks[by_score], scores[by_score]
        fiedler = [cutter.fiedler_value(cutter.tokens_of(mask)) for mask in masks]
    watch(
        "instances",
        {
            "cutter": cutter,
            "candidates": candidates,
            "cut_thresholds": cut_thresholds,
            "votes": own_votes,
            "residuals": residuals,
            "merit": merit,
            "masks": masks,
            "mask_votes": votes[by_score],
            "mask_residuals": None if mask_residuals is None else mask_residuals[by_score],
            "mask_merit": mask_merit[by_score],
            "scores": scores,
        },
    )
    record = cutter.record
    details = {
        "channels": {"total": sum(f.shape[1] for f in kinds), "kept": kept},
        "candidates": len(candidates),
        "solver": "amg-lobpcg and inverse iteration" if record.large else "inverse iteration",
        "cuts": record.cuts,
        "iterations": record.iterations,
        "largest_residual": record.largest_residual,
    }
    of_each = {"eigenvalues": [value for value, _ in fiedler], "residuals": [residual for _, residual in fiedler]}
    return TokenInstances(masks, scores, candidates, details, of_each, layers)


@dataclass(frozen=True, eq=False)
class _Found:
    """What a method found: pixels labelled 1..n in the order of its masks, and numbers about each mask."""

    labels: npt.NDArray[np.integer[Any]]
    scores: npt.NDArray[np.float64]
    grid: tuple[int, int]
    extent: tuple[float, float]
    of_tokens: dict[str, Any]
    details: dict[str, Any]
    of_each: dict[str, list[float]]
    layers: dict[str, npt.NDArray[np.float64]]


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


def _nobody(step: str, made: Mapping[str, Any]) -> None:
    """Watch nothing."""


def _objectness_maps(
    kinds: Sequence[npt.NDArray[np.float32]],
    grid: tuple[int, int],
    smoothing_graph: csr_array,
    settings: Settings,
    directions: Directions | None,
) -> tuple[list[ObjectnessMap], float]:
    """Objectness maps, smoothed, and the largest border contrast of the image, smoothed but not standardised."""
    contrasts = [foreground.border_contrast(f, grid, settings.prototypes) for f in kinds]
    columns = [foreground.standardise(m) for m in contrasts] + [np.mean(contrasts, axis=0, dtype=np.float64)]
    if directions is not None and settings.learned_weight:
        columns.append(directions.objectness_of(*kinds) + settings.learned_contrast * contrasts[1])
    smoothed = foreground.smooth(np.column_stack(columns), smoothing_graph, settings.smoothing).T
    maps = [
        ObjectnessMap(name, columns[k], smoothed[k], settings.thresholds)
        for k, name in enumerate(("keys", "queries", "values"))
    ]
    if len(columns) > 4:
        maps.append(
            ObjectnessMap("learned", columns[4], smoothed[4], settings.learned_thresholds, settings.learned_weight)
        )
    return maps, float(smoothed[3].max())


def _foreground_share(maps: Sequence[ObjectnessMap]) -> npt.NDArray[np.float64]:
    """Share of the thresholds on all maps that each token lies above."""
    above = sum(m.votes * (m.smoothed[:, None] > np.asarray(m.thresholds)).sum(axis=1) for m in maps)
    return np.asarray(above / sum(m.votes * len(m.thresholds) for m in maps), np.float64)


def _eigenvector_layers(vectors: npt.NDArray[np.floating[Any]], wanted: int) -> dict[str, npt.NDArray[np.float64]]:
    """Eigenvectors, one a row, as layers: their largest magnitude is 1, and positive."""
    layers = {}
    for number, vector in enumerate(vectors[:wanted], start=1):
        largest = vector[np.abs(vector).argmax()]
        layers[f"eigenvector {number}"] = np.asarray(vector / largest if largest else vector, np.float64)
    return layers


def likely_overlap(merit: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Intersection over union with a true object to expect of an instance: merit overstates it, but orders alike.

    Parameters
    ----------
    merit
        (n,) votes times wholeness.

    Returns
    -------
    (n,) float64 array in (0, 1)
    """
    return np.asarray(1 / (1 + np.exp(_CALIBRATION[0] - _CALIBRATION[1] * merit)))


def _paint(
    pixels: PixelSource,
    masks: npt.NDArray[np.bool_],
    frame: _Frame,
    settings: Settings,
    keep_all: bool,
    out: npt.NDArray[np.integer[Any]] | None,
) -> npt.NDArray[np.integer[Any]]:
    """Label the pixels of (n, N) masks on the token grid, 1..n in their order."""
    token_masks = masks.reshape(-1, *frame.grid)
    labels = refine.refine_masks(
        pixels, token_masks, frame.extent, radius=settings.filter_radius, eps=settings.filter_eps, out=out
    )
    refine.absorb_specks(labels, settings.min_speck * frame.token_side**2, out=labels)
    if keep_all:
        refine.keep_all(labels, token_masks, frame.extent)
    return labels


@dataclass(frozen=True)
class _Frame:
    """How the token grid lies on the image: what is left to know of features that are gone."""

    grid: tuple[int, int]
    shape: tuple[int, int]
    scale: float
    token_side: float
    extent: tuple[float, float]

    @classmethod
    def of(cls, tokens: TokenFeatures) -> _Frame:
        return cls(tokens.grid, tokens.image_shape, tokens.scale, tokens.token_side, tokens.extent)


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
