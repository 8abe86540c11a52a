"""From the token grid to pixels: edges that follow the photograph, in memory that doesn't grow with it.

Everything works by bands of rows: beside the labels there are never more than a few bands' worth of arrays, and images
that don't fit in memory are read by window. Results don't depend on where one band ends and the next begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec._kernels.guided import average_models, claim_pixels, fit_models, guide_statistics, reduce_rows
from sparsespec._kernels.runs import (
    add_sizes,
    find_runs,
    join_runs,
    measure_labels,
    outlines,
    replace_labels,
    write_regions,
)
from sparsespec._mapped import release
from sparsespec._threads import Team
from sparsespec.images import PixelSource

BoolArray = npt.NDArray[np.bool_]
LabelArray = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

# Window statistics are taken on a copy of the photograph with this many pixels per token side: the linear models they
# give vary as slowly as the window is wide, so nothing is lost and the cost no longer depends on the photograph's size.
_PIXELS_PER_TOKEN = 7
# Of the reduced copy and what is computed from it, and of the photograph: bytes in memory at a time.
_BAND_BYTES = 48 << 20
_WINDOW_BYTES = 16 << 20
# Rows of the reduced copy that one thread takes at a time, each start of which costs the sums of a window's height; and
# of the photograph, at most, for which the models are interpolated along the columns once.
_CHUNK_ROWS = 32
_STRIP_ROWS = 16
# Label maps with fewer pixels are scanned before other threads would have started.
_SMALL = 1 << 20
_PEAKS = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0, np.dtype(np.float32): 1.0}


def refine_masks(
    image: npt.NDArray[Any] | PixelSource,
    masks: BoolArray,
    extent: tuple[float, float],
    *,
    radius: float = 2.0,
    eps: float = 1e-4,
    threshold: float = 0.5,
    threads: int | None = None,
    out: LabelArray | None = None,
) -> LabelArray:
    """Label every pixel with one of the token masks, or with 0 for none.

    Each mask is enlarged bilinearly and filtered with the photograph's colours as guide (He, Sun and Tang, "Guided
    Image Filtering", 2013; the statistics on a reduced copy as in He and Sun, "Fast Guided Filter", 2015); a pixel
    belongs to the mask with the largest result, if that exceeds the threshold. The linear models of the filter bound
    what it gives between four pixels of the copy, whatever the colours: only where that leaves more than one answer
    are pixels looked at.

    Parameters
    ----------
    image
        (H, W, 3) uint8, uint16 or floating in [0, 1]; or anything with such a ``shape`` and a method
        ``read(top, left, bottom, right)`` that gives a window of it.
    masks
        (n, h, w) bool on the token grid; where results tie, the earlier mask wins.
    extent
        How many tokens (high, wide) the image covers, fractional: a grid that was padded is larger than its image.
    radius
        Of the filter's windows, in tokens.
    eps
        Regularisation, in squared intensities: edges of less contrast than its square root are smoothed over.
    threshold
        Membership in [0, 1] above which a pixel is foreground.
    threads
        At most so many; None for all that the process was granted. The result doesn't depend on it.
    out
        (H, W) array of integers, C-contiguous, to fill and return; it may be memory-mapped. None makes one of int32.

    Returns
    -------
    (H, W) int32 array, or ``out``
        0 is background, k + 1 stands for ``masks[k]``. A mask smaller than the photograph's structures may be left
        without a pixel.

    Raises
    ------
    ValueError
        When the image isn't (H, W, 3), or ``out`` has another shape or a type that can't hold n.
    """
    if len(image.shape) != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be (H, W, 3), got shape {tuple(image.shape)}")
    height, width = int(image.shape[0]), int(image.shape[1])
    labels = _label_array(out, (height, width), len(masks))
    masks = np.ascontiguousarray(masks, dtype=bool).view()
    masks.flags.writeable = False
    rows, columns = (max(1, round(tokens * _PIXELS_PER_TOKEN)) for tokens in extent)
    half = round(radius * _PIXELS_PER_TOKEN)
    boxes = [_reach(mask, extent, (rows, columns), half) for mask in masks]
    wanted = [k for k, (top, left, bottom, right) in enumerate(boxes) if top < bottom and left < right]
    if not wanted or not height or not width:
        labels[...] = 0
        return labels if out is None else out
    token_rows = _between(rows, extent[0] / rows, masks.shape[1])
    token_columns = _between(columns, extent[1] / columns, masks.shape[2])
    above, down = _between(height, rows / height, rows)
    before, across = _between(width, columns / width, columns)
    # The column each cell, between two columns of the guide, begins with.
    cell_columns = np.searchsorted(before, np.arange(max(columns - 1, 1) + 1)).astype(np.int64)
    per_band = max(half, 2, _BAND_BYTES // (80 * columns) - 4 * half)
    team = Team(threads)
    guide = _Guide(image, (rows, columns), half, float(eps), team)
    for first in range(0, max(rows - 1, 1), per_band):
        top, bottom = np.searchsorted(above, [first, first + per_band]).tolist()
        if top == bottom:
            continue
        # Rows of the guide whose models these pixels lie between.
        low, high = int(above[top]), min(int(above[bottom - 1]) + 2, rows)
        here = [k for k in wanted if boxes[k][0] < high and low < boxes[k][2]]
        if not here:
            labels[top:bottom] = 0
            release(labels)
            continue
        fitted = _fit(masks, here, boxes, (low, high), token_rows, token_columns, guide, team)
        values = np.array(here, np.int32) + np.int32(1)
        for begin in range(top, bottom, guide.rows_at_once):
            end = min(begin + guide.rows_at_once, bottom)
            claimed = values, np.float32(threshold), labels[begin:end]
            _claim(guide, (begin, end), (above, down), (before, across, cell_columns), fitted, claimed, team)
            release(labels)
    return labels if out is None else out


def _fit(
    masks: BoolArray,
    here: list[int],
    boxes: list[tuple[int, int, int, int]],
    rows: tuple[int, int],
    token_rows: tuple[npt.NDArray[np.int32], FloatArray],
    token_columns: tuple[npt.NDArray[np.int32], FloatArray],
    guide: _Guide,
    team: Team,
) -> tuple[FloatArray, IntArray, IntArray]:
    """Averaged linear models of some masks in some rows of the guide: flat, their parts of the guide, and offsets."""
    half = guide.half
    raw_low, raw_high = max(rows[0] - half, 0), min(rows[1] + half, guide.shape[0])
    guide.move(raw_low, raw_high)
    areas = [(max(boxes[k][0], rows[0]), boxes[k][1], min(boxes[k][2], rows[1]), boxes[k][3]) for k in here]
    sizes = [4 * (bottom - top) * (right - left + 1) for top, left, bottom, right in areas]
    offsets = np.cumsum([0, *sizes[:-1]], dtype=np.int64)
    models = np.empty(sum(sizes), np.float32)
    raw, found, fits, means = [], [], [], []
    for i, (k, (top, left, bottom, right)) in enumerate(zip(here, areas, strict=True)):
        begin, end = max(boxes[k][0], raw_low), min(boxes[k][2], raw_high)
        raw.append(np.empty((4, end - begin, right - left), np.float32))
        found.append(models[offsets[i] : offsets[i] + sizes[i]].reshape(4, bottom - top, -1))
        fits += [(i, y, min(y + _CHUNK_ROWS, end), begin) for y in range(begin, end, _CHUNK_ROWS)]
        means += [(i, y, min(y + _CHUNK_ROWS, bottom), begin) for y in range(top, bottom, _CHUNK_ROWS)]

    def fit(first: int, last: int) -> None:
        for i, begin, end, at in fits[first:last]:
            fit_models(
                masks[here[i]], *token_rows, *token_columns, guide.pixels, guide.top, guide.statistics,
                guide.statistics_top, boxes[here[i]], half, begin, end, raw[i], at,
            )  # fmt: skip

    def average(first: int, last: int) -> None:
        for i, begin, end, at in means[first:last]:
            top, bottom = boxes[here[i]][0], boxes[here[i]][2]
            average_models(raw[i], at, top, bottom, half, begin, end, found[i], areas[i][0])

    team.share(fit, 0, len(fits), 1)
    team.share(average, 0, len(means), 1)
    return models, np.array(areas, np.int64), offsets


def _claim(
    guide: _Guide,
    rows: tuple[int, int],
    rows_between: tuple[npt.NDArray[np.int32], FloatArray],
    columns_between: tuple[npt.NDArray[np.int32], FloatArray, IntArray],
    fitted: tuple[FloatArray, IntArray, IntArray],
    claimed: tuple[npt.NDArray[np.int32], np.float32, LabelArray],
    team: Team,
) -> None:
    """Label some rows of the image: what there is to claim are the masks' values, a threshold, and the rows' labels."""
    pixels, strips = guide.read(*rows), _strips(rows_between[0], *rows)
    looked_at = np.empty(len(strips), np.int64)
    models, areas, offsets = fitted
    values, threshold, labels = claimed

    def claim(first: int, last: int) -> None:
        claim_pixels(
            pixels, guide.peak, rows[0], strips, first, last, rows_between[1], *columns_between, models, areas, offsets,
            values, threshold, looked_at, labels,
        )  # fmt: skip

    team.share(claim, 0, len(strips), max(1, len(strips) // 8))


class _Guide:
    """The reduced copy of an image and the statistics of its windows, as far as one band needs them."""

    def __init__(
        self, image: npt.NDArray[Any] | PixelSource, shape: tuple[int, int], half: int, eps: float, team: Team
    ) -> None:
        self._image, self._eps, self._team = image, eps, team
        self.shape, self.half = shape, half
        self._row_taps, self._row_weights = _taps(image.shape[0], shape[0])
        self._columns = _taps(image.shape[1], shape[1])
        dtype = np.dtype(getattr(image, "dtype", np.float32))
        self._dtype = dtype if dtype in _PEAKS else np.dtype(np.float32)
        self.peak = np.float32(_PEAKS[self._dtype])
        self.rows_at_once = max(1, _WINDOW_BYTES // (3 * int(image.shape[1]) * self._dtype.itemsize))
        self.top, self._bottom = 0, 0
        self.statistics_top, self._statistics_bottom = 0, 0
        self.pixels = np.empty((3, 0, shape[1]), np.float32)
        self.statistics = np.empty((9, 0, shape[1]), np.float32)

    def read(self, top: int, bottom: int) -> npt.NDArray[Any]:
        """Rows of the image, (h, 3 W) and read-only, so that the kernels are compiled for one kind of array."""
        width = int(self._image.shape[1])
        if isinstance(self._image, np.ndarray):
            pixels = self._image[top:bottom]
        else:
            pixels = self._image.read(top, 0, bottom, width)
        pixels = np.ascontiguousarray(pixels, dtype=self._dtype).reshape(bottom - top, 3 * width)
        pixels.flags.writeable = False
        return pixels

    def move(self, top: int, bottom: int) -> None:
        """Make the statistics of rows top to bottom available, and the pixels in their windows; only downwards."""
        rows, columns = self.shape
        pixels_top, pixels_bottom = max(top - self.half, 0), min(bottom + self.half, rows)
        pixels = np.empty((3, pixels_bottom - pixels_top, columns), np.float32)
        kept = max(self._bottom - pixels_top, 0)
        pixels[:, :kept] = self.pixels[:, self.pixels.shape[1] - kept :]
        self.pixels, self.top, self._bottom = pixels, pixels_top, pixels_bottom
        start = pixels_top + kept
        while start < pixels_bottom:
            first_pixel = int(self._row_taps[start, 0])
            end = first_pixel + self.rows_at_once
            stop = max(int(np.searchsorted(self._row_taps[:pixels_bottom, 1], end, side="right")), start + 1)
            self._reduce(first_pixel, start, stop)
            start = stop

        statistics = np.empty((9, bottom - top, columns), np.float32)
        kept = max(self._statistics_bottom - top, 0)
        statistics[:, :kept] = self.statistics[:, self.statistics.shape[1] - kept :]
        self.statistics, self.statistics_top, self._statistics_bottom = statistics, top, bottom

        def measure(begin: int, end: int) -> None:
            guide_statistics(pixels, pixels_top, rows, self.half, self._eps, begin, end, statistics, top)

        self._team.share(measure, top + kept, bottom, _CHUNK_ROWS)

    def _reduce(self, first_pixel: int, start: int, stop: int) -> None:
        """Rows start to stop of the reduced copy, from the image's rows from the first pixel on."""
        window = self.read(first_pixel, int(self._row_taps[stop - 1, 1]))

        def reduce(begin: int, end: int) -> None:
            reduce_rows(
                window, first_pixel, self.peak, self._row_taps, self._row_weights, *self._columns, begin, end,
                self.pixels, self.top,
            )  # fmt: skip

        self._team.share(reduce, start, stop, max(1, (stop - start) // 4))


def absorb_specks(
    labels: LabelArray, min_pixels: float, *, out: LabelArray | None = None, threads: int | None = None
) -> LabelArray:
    """Give islands and holes too small to mean anything the label that surrounds them.

    Memory grows with the number of runs, stretches of one label in a row of pixels, not with that of pixels.

    Parameters
    ----------
    labels
        (H, W) of integers, C-contiguous, 0 is background.
    min_pixels
        4-connected regions of one label, background included, with fewer pixels are absorbed by the larger region that
        they share most of their outline with. The largest region of a label is never absorbed.
    out
        Where the result goes: ``labels`` itself to change it in place, where only the pixels that change are written.
        None makes a copy.
    threads
        At most so many; None for all that the process was granted. The result doesn't depend on it.

    Returns
    -------
    (H, W) array of the labels' type, or ``out``
    """
    if out is None:
        out = labels.copy()
    elif out is not labels:
        out[...] = labels
    if not labels.size:
        return out
    labels = np.asarray(labels)
    width = labels.shape[1]
    first_run, starts, values = _runs(labels, threads)
    region = np.empty(starts.size, np.int32)
    count = join_runs(first_run, starts, values, width, region)
    sizes = np.zeros(count, np.int64)
    add_sizes(first_run, starts, width, region, sizes)

    label_of = np.empty(count, labels.dtype)
    label_of[region] = values
    del values
    order = np.lexsort((-sizes, label_of))
    largest = order[np.r_[True, np.diff(label_of[order]) != 0]]
    small = sizes < min_pixels
    small[largest] = False
    if not small.any():
        return out

    shared = int(outlines(first_run, starts, width, region, small, *np.empty((3, 0), np.int32)))
    stretches = np.empty((3, shared), np.int32)
    outlines(first_run, starts, width, region, small, *stretches)
    pairs, position = np.unique(stretches[0] * np.int64(count) + stretches[1], return_inverse=True)
    length = np.bincount(position, weights=stretches[2])
    inner, outer = pairs // count, pairs % count
    # The last entry written for each small region is the one with the longest outline; of equal ones the first.
    by_length = np.lexsort((-outer, length))
    taken_by = np.arange(count)
    taken_by[inner[by_length]] = outer[by_length]
    value = label_of[taken_by]
    changed, target = value != label_of, np.asarray(out)

    def write(begin: int, end: int) -> None:
        write_regions(first_run, starts, region, changed, value, begin, end, target)

    _by_rows(target, threads, write)
    return out


def relabel(labels: LabelArray, number: npt.ArrayLike, *, threads: int | None = None) -> None:
    """Give the labels other numbers, in place and without an array of the image's size.

    Parameters
    ----------
    labels
        (H, W) of integers, C-contiguous, changed in place; it may be memory-mapped. Only stretches whose number
        changes are written.
    number
        (n + 1,) integers: what each of the labels 0..n becomes. Larger labels stay as they are.
    threads
        At most so many; None for all that the process was granted.
    """
    labels, numbers = np.asarray(labels), np.ascontiguousarray(number, dtype=np.int64)
    _by_rows(labels, threads, lambda begin, end: replace_labels(labels, begin, end, numbers))


def label_boxes(labels: LabelArray, n: int, *, threads: int | None = None) -> tuple[IntArray, IntArray]:
    """Boxes and pixel counts of all labels in one pass.

    Parameters
    ----------
    labels
        (H, W) of integers, C-contiguous.
    n
        The largest label to look for.
    threads
        At most so many; None for all that the process was granted.

    Returns
    -------
    boxes : (n, 4) int64 array
        x, y, width and height of the smallest box around the labels 1..n; zeros for one without a pixel.
    pixels : (n + 1,) int64 array
        How many pixels have the labels 0..n.
    """
    labels, parts = np.asarray(labels), []

    def measure(begin: int, end: int) -> None:
        part = np.zeros((n + 1, 5), np.int64)
        measure_labels(labels, begin, end, part)
        parts.append(part)

    _by_rows(labels, threads, measure)
    found = np.stack([np.zeros((n + 1, 5), np.int64), *parts])
    pixels = found[:, :, 0].sum(axis=0)
    absent = found[:, :, 0] == 0
    lowest = np.iinfo(np.int64).max
    top, left = (np.where(absent, lowest, found[:, :, i]).min(axis=0) for i in (1, 3))
    bottom, right = (np.where(absent, -1, found[:, :, i]).max(axis=0) + 1 for i in (2, 4))
    boxes = np.stack([left, top, right - left, bottom - top], axis=1)
    boxes[pixels == 0] = 0
    return boxes[1:], pixels


def enlarge_labels(labels: LabelArray, extent: tuple[float, float], shape: tuple[int, int]) -> LabelArray:
    """Give every pixel the label of the token it lies in, without looking at the photograph.

    Parameters
    ----------
    labels
        (h, w) on the token grid.
    extent
        How many tokens (high, wide) the image covers.
    shape
        Height and width of the image, pixels.
    """
    rows, columns = (
        _tokens_of_pixels(pixels, tokens, count)
        for pixels, tokens, count in zip(shape, extent, labels.shape, strict=True)
    )
    return labels[rows][:, columns]


def keep_all(labels: LabelArray, masks: BoolArray, extent: tuple[float, float]) -> None:
    """Give every mask at least one pixel, in place: for callers that asked for an exact number of instances.

    A mask that the filter left without a pixel takes the background in its own tokens, or the one pixel nearest to it
    where tokens are smaller than pixels; failing that, one pixel of a mask that has others.

    Parameters
    ----------
    labels
        (H, W) of integers, C-contiguous, changed in place; it may be memory-mapped.
    masks
        (n, h, w) bool, n at most H W.
    extent
        How many tokens (high, wide) the image covers.
    """
    labels = np.asarray(labels)
    _, pixels = label_boxes(labels, len(masks))
    for k in np.flatnonzero(pixels[1:] == 0):
        rows, columns = _own_pixels(masks[k], extent, labels.shape)
        if not rows.size:
            rows, columns = _nearest_pixel(masks[k], extent, labels.shape)
        chosen = np.flatnonzero(labels[rows, columns] == 0)
        if not chosen.size:
            chosen = np.flatnonzero(pixels[labels[rows, columns]] > 1)[:1]
        rows, columns = rows[chosen], columns[chosen]
        if not rows.size:
            rows, columns = _first_spare_pixel(labels, pixels)
        np.subtract.at(pixels, labels[rows, columns], 1)
        labels[rows, columns] = k + 1
        pixels[k + 1] = rows.size


def _own_pixels(
    mask: BoolArray, extent: tuple[float, float], shape: tuple[int, ...]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Rows and columns of the pixels that lie in a mask's tokens, in the order of the image."""
    token_rows, token_columns = (
        _tokens_of_pixels(pixels, tokens, count)
        for pixels, tokens, count in zip(shape, extent, mask.shape, strict=True)
    )
    rows = np.flatnonzero(np.asarray(mask.any(axis=1))[token_rows])
    columns = np.flatnonzero(np.asarray(mask.any(axis=0))[token_columns])
    own_rows, own_columns = np.nonzero(mask[token_rows[rows]][:, token_columns[columns]])
    return rows[own_rows], columns[own_columns]


def _first_spare_pixel(labels: LabelArray, pixels: IntArray) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The first pixel of the background or of a mask that has others."""
    for y, row in enumerate(labels):
        spare = np.flatnonzero((row == 0) | (pixels[row] > 1))[:1]
        if spare.size:
            return np.full(1, y), spare
    return np.empty(0, np.intp), np.empty(0, np.intp)


def _nearest_pixel(
    mask: BoolArray, extent: tuple[float, float], shape: tuple[int, ...]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Row and column, in arrays of one, of the pixel that a mask's centre lies in."""
    row, column = (
        np.array([min(int((tokens.mean() + 0.5) * pixels / covered), pixels - 1)])
        for tokens, pixels, covered in zip(np.nonzero(mask), shape, extent, strict=True)
    )
    return row, column


def _runs(labels: LabelArray, threads: int | None) -> tuple[IntArray, npt.NDArray[np.int32], LabelArray]:
    """Stretches of one label in rows of pixels: which is the first of each row, first columns, labels."""
    first_run = np.zeros(len(labels) + 1, np.int64)
    starts, values = np.empty(0, np.int32), np.empty(0, labels.dtype)
    _by_rows(labels, threads, lambda begin, end: find_runs(labels, begin, end, first_run, starts, values))
    np.cumsum(first_run, out=first_run)
    starts, values = np.empty(first_run[-1], np.int32), np.empty(first_run[-1], labels.dtype)
    _by_rows(labels, threads, lambda begin, end: find_runs(labels, begin, end, first_run, starts, values))
    return first_run, starts, values


def _by_rows(labels: LabelArray, threads: int | None, work: Callable[[int, int], None]) -> None:
    """Let threads share the rows of a label map, as many as its size is worth."""

    def work_and_release(begin: int, end: int) -> None:
        work(begin, end)
        release(labels)

    # Eight stretches, or as many as it takes for a band of a mapped file to be let go again soon.
    at_once = max(1, min(len(labels) // 8, _BAND_BYTES // max(1, labels[:1].nbytes)))
    Team(threads if labels.size > _SMALL else 1).share(work_and_release, 0, len(labels), at_once)


def _tokens_of_pixels(pixels: int, tokens: float, count: int) -> npt.NDArray[np.intp]:
    """Which of `count` tokens each pixel of an axis lies in, when the axis covers so many tokens."""
    return np.minimum((np.arange(pixels) + 0.5) * (tokens / pixels), count - 1).astype(np.intp)


def _label_array(out: LabelArray | None, shape: tuple[int, int], largest: int) -> LabelArray:
    """The array to fill: a new one, or the caller's when labels fit in there."""
    if out is None:
        return np.empty(shape, np.int32)
    if out.shape != shape or not np.issubdtype(out.dtype, np.integer) or not out.flags.c_contiguous:
        raise ValueError(
            f"out must be a C-contiguous {shape} array of integers, got {out.dtype} of shape {out.shape}"
            f"{'' if out.flags.c_contiguous else ', not contiguous'}"
        )
    if largest > np.iinfo(out.dtype).max:
        raise ValueError(f"out must have a type that holds the labels up to {largest}, got {out.dtype}")
    return np.asarray(out)


def _between(count: int, step: float, limit: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Which two of `limit` sampling points each of `count` points of an axis lies between: the lower, and how far."""
    position = ((np.arange(count) + 0.5) * step - 0.5).clip(0, limit - 1)
    low = np.minimum(position.astype(np.int32), max(limit - 2, 0))
    return low, (position - low).astype(np.float32)


def _taps(size: int, wanted: int) -> tuple[IntArray, npt.NDArray[np.float32]]:
    """Pixels and their weights for each of `wanted` samples of an axis, as in :func:`sparsespec.resample.resize`."""
    step = size / wanted
    radius = max(1.0, step)
    centre = np.clip((np.arange(wanted) + 0.5) * step - 0.5, 0, size - 1)
    first = np.maximum(np.floor(centre - radius).astype(np.int64) + 1, 0)
    last = np.minimum(np.ceil(centre + radius).astype(np.int64), size)
    pixel = first[:, None] + np.arange(int((last - first).max()))
    weight = np.clip(1.0 - np.abs(pixel - centre[:, None]) / radius, 0, None)
    weight[pixel >= last[:, None]] = 0
    weight /= weight.sum(axis=1, keepdims=True)
    return np.stack([first, last], axis=1), weight.astype(np.float32)


def _strips(above: npt.NDArray[np.int32], begin: int, end: int) -> IntArray:
    """Rows from and to, and the guide's row above: stretches of rows with the same one, of some rows at most."""
    rows = above[begin:end]
    new = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]])
    since = np.arange(end - begin) - np.repeat(new, np.diff(np.r_[new, end - begin]))
    first = np.flatnonzero(since % _STRIP_ROWS == 0)
    return np.stack([begin + first, begin + np.r_[first[1:], end - begin], rows[first]], axis=1).astype(np.int64)


def _reach(
    mask: BoolArray, extent: tuple[float, float], shape: tuple[int, int], half: int
) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of the part of a guide of that shape outside of which a mask's models are 0.

    That is its enlarged tokens and two windows around them; nothing for an empty mask.
    """
    box = [0, 0, 0, 0]
    for axis in (0, 1):
        tokens = np.flatnonzero(mask.any(axis=1 - axis))
        if not tokens.size:
            return 0, 0, 0, 0
        pixels = shape[axis] / extent[axis]
        box[axis] = max(0, int(np.floor((tokens[0] - 0.5) * pixels)) - 2 * half - 2)
        box[axis + 2] = min(shape[axis], int(np.ceil((tokens[-1] + 1.5) * pixels)) + 2 * half + 2)
    return box[0], box[1], box[2], box[3]
