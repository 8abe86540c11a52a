"""Photograph-like pictures with nothing in them: textures, walls, skies, patterns, noise.

Textures are cut from the photographs of brick, grass and gravel that come with scikit-image; the rest is computed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage
from skimage import data

Picture = np.ndarray


def picture(values: np.ndarray) -> Picture:
    """8-bit RGB from (H, W) or (H, W, 3) numbers, 0 black and 1 white."""
    colour = values if values.ndim == 3 else np.repeat(values[:, :, None], 3, axis=2)
    return np.asarray(np.clip(colour * 255 + 0.5, 0, 255), np.uint8)


def tinted(grey: np.ndarray, dark: tuple[float, ...], light: tuple[float, ...]) -> np.ndarray:
    """Colour that goes from one to the other with a (H, W) value."""
    return np.asarray(np.array(dark) + grey[:, :, None] * (np.array(light) - np.array(dark)))


def texture(
    name: str,
    window: tuple[int, int, int, int] = (0, 0, 512, 512),
    *,
    enlarge: float = 1.0,
    blur: float = 0.0,
    gain: float = 1.0,
    shift: float = 0.0,
) -> np.ndarray:
    """A (top, left, bottom, right) part of one of the photographs, as numbers from 0 to 1."""
    top, left, bottom, right = window
    grey = getattr(data, name)()[top:bottom, left:right] / 255
    if enlarge != 1:
        grey = ndimage.zoom(grey, enlarge, order=1)
    if blur:
        grey = ndimage.gaussian_filter(grey, blur)
    return np.asarray(grey * gain + shift)


def axes(height: int = 360, width: int = 480) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every pixel, from 0 to 1."""
    rows, columns = np.mgrid[:height, :width]
    return rows / (height - 1), columns / (width - 1)


def noise(seed: int, blur: float = 0.0, shape: tuple[int, ...] = (360, 480)) -> np.ndarray:
    """Normal noise of unit deviation, smooth over so many pixels."""
    values = np.random.default_rng(seed).standard_normal(shape)
    if blur:
        values = ndimage.gaussian_filter(values, (blur, blur, 0)[: values.ndim], mode="wrap")
    return np.asarray((values - values.mean()) / values.std())


def octaves(seed: int, first: float = 80.0, count: int = 6, shape: tuple[int, int] = (360, 480)) -> np.ndarray:
    """Noise at every scale, the larger the stronger, as clouds have it."""
    total = sum(noise(seed + k, first / 2**k, shape) / 2**k for k in range(count))
    return np.asarray(total / np.std(total))


def lit(values: np.ndarray, row: float, column: float, fall: float) -> np.ndarray:
    """Light that falls off with the distance from a point."""
    down, across = axes(*values.shape[:2])
    light = 1 / (1 + fall * ((down - row) ** 2 + (across - column) ** 2))
    return np.asarray(values * (light[:, :, None] if values.ndim == 3 else light))


def tiles(side: int, gap: int, shape: tuple[int, int] = (360, 480)) -> np.ndarray:
    """1 on square tiles, 0 between them."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return np.asarray(((rows % side >= gap) & (columns % side >= gap)).astype(float))


def waves(seed: int, across: float, down: float, bend: float, shape: tuple[int, int] = (360, 480)) -> np.ndarray:
    """Stripes from 0 to 1, so many over the picture, bent by smooth noise."""
    y, x = axes(*shape)
    return np.asarray(0.5 + 0.5 * np.sin(2 * np.pi * (across * x + down * y) + bend * noise(seed, 40, shape)))


def _flat(*colour: float) -> np.ndarray:
    return np.broadcast_to(np.array(colour), (360, 480, 3))


BLANK: dict[str, Callable[[], np.ndarray]] = {
    "brick": lambda: texture("brick"),
    "grass": lambda: texture("grass"),
    "gravel": lambda: texture("gravel"),
    "red bricks, lit from the left": lambda: lit(
        tinted(texture("brick", (0, 0, 384, 512)), (0.25, 0.05, 0.02), (0.95, 0.6, 0.5)), 0.5, 0, 1.5
    ),
    "green grass, near": lambda: tinted(
        texture("grass", (100, 60, 356, 444), enlarge=1.5), (0.02, 0.08, 0.01), (0.7, 0.9, 0.4)
    ),
    "dark gravel out of focus": lambda: texture("gravel", blur=3, gain=0.5),
    "white wall, lamp above": lambda: lit(_flat(0.97, 0.96, 0.93), -0.2, 0.7, 0.6) + 0.01 * noise(1)[:, :, None],
    "grey wall with vignetting": lambda: lit(_flat(0.6, 0.6, 0.6), 0.5, 0.5, 1.2) + 0.02 * noise(2, 0, (360, 480, 3)),
    "yellow wall, window at the side": lambda: (
        _flat(0.9, 0.8, 0.45) * (0.5 + 0.5 * axes()[1])[:, :, None] + 0.015 * noise(3, 1)[:, :, None]
    ),
    "rough plaster": lambda: lit(0.75 + 0.05 * noise(4, 1.5) + 0.03 * noise(5, 12), 0, 0, 0.4),
    "blue sky": lambda: tinted(axes()[0], (0.2, 0.42, 0.8), (0.75, 0.87, 0.97)) + 0.005 * noise(6)[:, :, None],
    "evening sky": lambda: tinted(axes()[0] ** 2, (0.15, 0.18, 0.4), (1.0, 0.6, 0.25)) + 0.01 * noise(7)[:, :, None],
    "overcast sky": lambda: 0.75 + 0.04 * octaves(20, 120),
    "clouds": lambda: tinted(np.clip(0.4 + 0.35 * octaves(30), 0, 1), (0.35, 0.55, 0.85), (0.97, 0.97, 0.98)),
    "night sky": lambda: 0.03 + 0.02 * np.abs(noise(8, 0, (360, 480, 3))),
    "grain of a film": lambda: 0.5 + 0.12 * noise(9, 0.7),
    "noise in three colours": lambda: 0.5 + 0.25 * noise(10, 0, (360, 480, 3)),
    "sand": lambda: tinted(np.clip(0.5 + 0.1 * octaves(40, 10, 4), 0, 1), (0.5, 0.4, 0.25), (1.0, 0.9, 0.7)),
    "striped wallpaper": lambda: tinted((axes()[1] * 480 // 30 % 2), (0.85, 0.8, 0.7), (0.6, 0.2, 0.25)),
    "corrugated iron": lambda: lit(0.3 + 0.5 * waves(11, 28, 0, 0.1), 0.2, 0.4, 0.8),
    "bathroom tiles": lambda: lit(0.55 + 0.35 * tiles(60, 4) + 0.01 * noise(12), 0.1, 0.2, 0.5),
    "chequered floor": lambda: 0.2 + 0.6 * ((axes()[0] * 360 // 45 + axes()[1] * 480 // 45) % 2) + 0.02 * noise(13),
    "wood": lambda: tinted(waves(14, 2, 24, 2.5), (0.45, 0.28, 0.13), (0.7, 0.48, 0.26)) + 0.02 * noise(15)[:, :, None],
    "ripples on water": lambda: tinted(waves(16, 5, 30, 5), (0.05, 0.2, 0.3), (0.35, 0.55, 0.65)),
}
