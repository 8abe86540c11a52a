"""The colour guided filter the plain way: float64, windows summed one offset at a time, a linear system per pixel."""

from __future__ import annotations

import numpy as np


def enlarge(mask: np.ndarray, extent: tuple[float, float], shape: tuple[int, int]) -> np.ndarray:
    """Bilinear interpolation between the centres of tokens, constant beyond the outermost; one pixel at a time."""
    rows, columns = mask.shape
    out = np.empty(shape)
    for y in range(shape[0]):
        fy = min(max((y + 0.5) * extent[0] / shape[0] - 0.5, 0), rows - 1)
        for x in range(shape[1]):
            fx = min(max((x + 0.5) * extent[1] / shape[1] - 0.5, 0), columns - 1)
            out[y, x] = bilinear(mask.astype(float), fy, fx)
    return out


def bilinear(values: np.ndarray, y: float, x: float) -> np.ndarray:
    """Value of a map at a fractional place inside it."""
    top, left = int(np.floor(y)), int(np.floor(x))
    bottom, right = min(top + 1, values.shape[0] - 1), min(left + 1, values.shape[1] - 1)
    upper = (1 - (x - left)) * values[top, left] + (x - left) * values[top, right]
    lower = (1 - (x - left)) * values[bottom, left] + (x - left) * values[bottom, right]
    return (1 - (y - top)) * upper + (y - top) * lower


def window_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Mean over windows of 2 half + 1 squared, the outermost values repeated beyond the edge."""
    height, width = values.shape[:2]
    padded = np.pad(values, [(half, half), (half, half)] + [(0, 0)] * (values.ndim - 2), mode="edge")
    total = np.zeros(values.shape)
    for dy in range(2 * half + 1):
        for dx in range(2 * half + 1):
            total += padded[dy : dy + height, dx : dx + width]
    return total / (2 * half + 1) ** 2


def coefficients(guide: np.ndarray, membership: np.ndarray, half: int, eps: float) -> np.ndarray:
    """(H, W, 4): the three slopes and the offset of each window's linear model, not yet averaged."""
    guide, membership = guide.astype(float), membership.astype(float)
    mean, mean_p = window_mean(guide, half), window_mean(membership, half)
    cross = window_mean(guide * membership[..., None], half) - mean * mean_p[..., None]
    covariance = window_mean(guide[..., :, None] * guide[..., None, :], half) - mean[..., :, None] * mean[..., None, :]
    slopes = np.empty(guide.shape)
    for y, x in np.ndindex(membership.shape):
        slopes[y, x] = np.linalg.solve(covariance[y, x] + eps * np.eye(3), cross[y, x])
    return np.concatenate([slopes, (mean_p - (slopes * mean).sum(axis=-1))[..., None]], axis=-1)


def memberships(image: np.ndarray, masks: np.ndarray, extent: tuple[float, float], half: int, eps: float) -> np.ndarray:
    """(n, H, W) filtered masks, with statistics of every pixel of the image."""
    out = []
    for mask in masks:
        model = window_mean(coefficients(image, enlarge(mask, extent, image.shape[:2]), half, eps), half)
        out.append((model[..., :3] * image).sum(axis=-1) + model[..., 3])
    return np.array(out).reshape(-1, *image.shape[:2])


def claim(filtered: np.ndarray, threshold: float) -> np.ndarray:
    """Label of the largest membership above a threshold, 0 for none; of equal ones the first."""
    ground = np.full((1, *filtered.shape[1:]), threshold)
    return np.argmax(np.concatenate([ground, filtered]), axis=0)
