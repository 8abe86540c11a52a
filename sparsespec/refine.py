"""From the token grid to pixels: edges that follow the photograph."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import uniform_filter
from skimage import measure

from sparsespec._kernels._compile import parallel_region
from sparsespec._kernels.guided import claim_pixels, solve_guide
from sparsespec.resample import resize

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
LabelArray = npt.NDArray[np.int32]

# Window statistics are taken on a copy of the photograph with this many pixels per token side: the linear models they
# give vary as slowly as the window is wide, so nothing is lost and the cost no longer depends on the photograph's size.
_PIXELS_PER_TOKEN = 7


def refine_masks(
    image: FloatArray,
    masks: BoolArray,
    extent: tuple[float, float],
    *,
    radius: float = 2.0,
    eps: float = 1e-4,
    threshold: float = 0.5,
    threads: int | None = None,
) -> LabelArray:
    """Label every pixel with one of the token masks, or with 0 for none.

    Each mask is enlarged bilinearly and filtered with the photograph's colours as guide (He, Sun and Tang, "Guided
    Image Filtering", 2013; the statistics on a reduced copy as in He and Sun, "Fast Guided Filter", 2015); a pixel
    belongs to the mask with the largest result, if that exceeds the threshold.

    Parameters
    ----------
    image
        (H, W, 3) float32 in [0, 1].
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

    Returns
    -------
    (H, W) int32 array
        0 is background, k + 1 stands for ``masks[k]``. A mask smaller than the photograph's structures may be left
        without a pixel.
    """
    height, width = image.shape[:2]
    labels = np.zeros((height, width), np.int32)
    if not masks.any():
        return labels
    shape = (max(1, round(extent[0] * _PIXELS_PER_TOKEN)), max(1, round(extent[1] * _PIXELS_PER_TOKEN)))
    guide = resize(image, shape)
    size = 2 * round(radius * _PIXELS_PER_TOKEN) + 1
    mean = _window_mean(guide, size)
    first, second = (0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2)
    moments = _window_mean(guide[..., first] * guide[..., second], size)
    best = np.full((height, width), threshold, np.float32)
    pixels = np.ascontiguousarray(image, dtype=np.float32)
    for k, mask in enumerate(masks):
        if not mask.any():
            continue
        # All that the mask can reach: its tokens, their bilinear fringe and two windows around them.
        top, left, bottom, right = _box(mask, extent, shape, 2 * radius + 1)
        part = (slice(top, bottom), slice(left, right))
        membership = _enlarge(mask, extent, shape)[part]
        cross = _window_mean(guide[part] * membership[..., None], size)
        coefficients = np.empty((*membership.shape, 4), np.float32)
        with parallel_region(threads):
            solve_guide(mean[part], moments[part], cross, _window_mean(membership, size), np.float32(eps), coefficients)
        coefficients = _window_mean(coefficients, size)
        box = np.array(_box(mask, extent, (height, width), 2 * radius + 1), np.int64)
        with parallel_region(threads):
            claim_pixels(pixels, coefficients, box, shape[0] / height, shape[1] / width, top, left, k + 1, best, labels)
    return labels


def absorb_specks(labels: LabelArray, min_pixels: float) -> LabelArray:
    """Give islands and holes too small to mean anything the label that surrounds them.

    Parameters
    ----------
    labels
        (H, W) int32, 0 is background.
    min_pixels
        4-connected regions of one label, background included, with fewer pixels are absorbed by the larger region that
        they share most of their outline with. The largest region of a label is never absorbed.

    Returns
    -------
    (H, W) int32 array
    """
    regions = measure.label(labels, background=-1, connectivity=1) - 1
    sizes = np.bincount(regions.ravel())
    if sizes.size == 1:
        return labels
    label_of = np.zeros(sizes.size, np.int32)
    label_of[regions] = labels
    order = np.lexsort((-sizes, label_of))
    largest = order[np.r_[True, np.diff(label_of[order]) != 0]]
    small = sizes < min_pixels
    small[largest] = False

    pairs = [(regions[:, :-1], regions[:, 1:]), (regions[:-1], regions[1:])]
    outlines = [(one[one != other], other[one != other]) for one, other in pairs]
    first = np.concatenate([side for one, other in outlines for side in (one, other)])
    second = np.concatenate([side for one, other in outlines for side in (other, one)])
    wanted = small[first] & ~small[second]
    shared, length = np.unique(first[wanted] * np.int64(sizes.size) + second[wanted], return_counts=True)
    inner, outer = shared // sizes.size, shared % sizes.size
    # The last entry written for each small region is the one with the longest outline; of equal ones the first.
    by_length = np.lexsort((-outer, length))
    taken_by = np.arange(sizes.size)
    taken_by[inner[by_length]] = outer[by_length]
    return label_of[taken_by][regions]


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
        np.minimum((np.arange(pixels) + 0.5) * (tokens / pixels), count - 1).astype(np.intp)
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
        (H, W), changed in place.
    masks
        (n, h, w) bool, n at most H W.
    extent
        How many tokens (high, wide) the image covers.
    """
    pixels = np.bincount(labels.ravel(), minlength=len(masks) + 1)
    for k in np.flatnonzero(pixels[1:] == 0):
        own = enlarge_labels(masks[k].astype(np.int32), extent, labels.shape) > 0
        candidates = np.flatnonzero(own) if own.any() else _nearest_pixel(masks[k], extent, labels.shape)
        free = candidates[labels.flat[candidates] == 0]
        if not free.size:
            free = candidates[pixels[labels.flat[candidates]] > 1][:1]
        if not free.size:
            free = np.flatnonzero((labels.ravel() == 0) | (pixels[labels.ravel()] > 1))[:1]
        np.subtract.at(pixels, labels.flat[free], 1)
        labels.flat[free] = k + 1
        pixels[k + 1] = free.size


def _nearest_pixel(mask: BoolArray, extent: tuple[float, float], shape: tuple[int, int]) -> npt.NDArray[np.intp]:
    """Flat index, in an array of one, of the pixel that a mask's centre lies in."""
    row, column = (
        min(int((tokens.mean() + 0.5) * pixels / covered), pixels - 1)
        for tokens, pixels, covered in zip(np.nonzero(mask), shape, extent, strict=True)
    )
    return np.array([row * shape[1] + column])


def _enlarge(mask: BoolArray, extent: tuple[float, float], shape: tuple[int, int]) -> FloatArray:
    """Bilinear interpolation of a token mask at the pixel centres of an image that covers `extent` tokens."""
    values = mask.astype(np.float32)
    for axis in (0, 1):
        position = (np.arange(shape[axis]) + 0.5) * (extent[axis] / shape[axis]) - 0.5
        position = position.clip(0, values.shape[axis] - 1)
        low = np.minimum(position.astype(np.intp), max(values.shape[axis] - 2, 0))
        high = np.minimum(low + 1, values.shape[axis] - 1)
        weight = (position - low).astype(np.float32)
        weight = weight[:, None] if axis == 0 else weight[None, :]
        values = (1 - weight) * values.take(low, axis) + weight * values.take(high, axis)
    return values


def _window_mean(values: FloatArray, size: int) -> FloatArray:
    window = (size, size) + (1,) * (values.ndim - 2)
    return np.asarray(uniform_filter(values, window, mode="nearest"), dtype=np.float32)


def _box(
    mask: BoolArray, extent: tuple[float, float], shape: tuple[int, int], margin: float
) -> tuple[int, int, int, int]:
    """Top, left, bottom and right, in pixels of an image of that shape, of a mask with a margin in tokens."""
    box = [0, 0, 0, 0]
    for axis in (0, 1):
        tokens = np.flatnonzero(mask.any(axis=1 - axis))
        pixels = shape[axis] / extent[axis]
        box[axis] = min(shape[axis], max(0, int(np.floor((tokens[0] - margin) * pixels))))
        box[axis + 2] = min(shape[axis], int(np.ceil((tokens[-1] + 1 + margin) * pixels)))
    return box[0], box[1], box[2], box[3]
