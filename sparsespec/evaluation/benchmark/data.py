"""What is measured on: photographs, and the features of many of their tokens in one grid.

Nothing is downloaded. The photographs are those of scikit-image's wheel, or the user's. A large grid of real features
is a mosaic: square crops of the photographs, of many sizes, places and mirrored or not, go through the backbone one by
one, and their tokens are laid side by side. No two crops are the same, so no token is a copy of another; beyond
:data:`MOST_REAL_TOKENS` the mosaic is continued by its mirror image: the same tokens once more.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec import channels
from sparsespec.backbone import Backbone
from sparsespec.images import read_image, to_rgb_float
from sparsespec.resample import resize

__all__ = [
    "MOST_REAL_TOKENS",
    "FeatureMosaic",
    "InputError",
    "Photograph",
    "as_uint8",
    "grid_of",
    "long_side",
    "photo_mosaic",
    "photographs",
    "read_photograph",
]

Floats = npt.NDArray[np.float32]
Photograph = npt.NDArray[np.uint8]

# In colour, with something in them, and in every wheel of scikit-image from 0.24 on (verified against its RECORD; its
# other pictures are fetched on first use, or grey textures, or test charts).
SHIPPED = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "retina.jpg",
)
# The first so many are everyday photographs; the others are stars, tissue and an eye's background.
EVERYDAY = 5
MOST_PHOTOGRAPHS = 16
ENDINGS = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

CHANNELS = 60
_SIDE = 32
"""Tokens along the side of a crop."""
MOST_REAL_TOKENS = 1 << 18


class InputError(ValueError):
    """What is to be measured on isn't there, or can't be read."""


def read_photograph(path: Path) -> Photograph:
    """Read one photograph as (H, W, 3) bytes.

    Raises
    ------
    InputError
        It can't be read.
    """
    try:
        return as_uint8(to_rgb_float(read_image(path, max_pixels=None)))
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error


def photographs(folder: Path | None = None) -> dict[str, Photograph]:
    """Read the photographs to measure on.

    Parameters
    ----------
    folder
        The user's; searched with everything below it. None for those that scikit-image's wheel holds.

    Returns
    -------
    dict
        Name to (H, W, 3) uint8. Of more than 16 in a folder, 16 spread evenly over their sorted names.

    Raises
    ------
    InputError
        The folder isn't one or holds no photograph, or one can't be read.
    """
    if folder is None:
        files = [path for path in (_wheel_folder() / name for name in SHIPPED) if path.is_file()]
        if not files:
            raise InputError("this installation of scikit-image has no photographs: name a folder with --images")
    else:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder of photographs")
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
        if not files:
            raise InputError(f"{folder} holds no photograph ({', '.join(sorted(ENDINGS))})")
        if len(files) > MOST_PHOTOGRAPHS:
            files = [files[index * len(files) // MOST_PHOTOGRAPHS] for index in range(MOST_PHOTOGRAPHS)]
    root = files[0].parent if folder is None else folder
    return {path.relative_to(root).as_posix(): read_photograph(path) for path in files}


def as_uint8(image: Floats) -> Photograph:
    """Return an image in [0, 1] as bytes."""
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def long_side(photograph: Photograph, pixels: int) -> Photograph:
    """Scale a photograph, up or down, so that its longer side has so many pixels."""
    height, width = photograph.shape[:2]
    scale = pixels / max(height, width)
    shape = (max(1, round(height * scale)), max(1, round(width * scale)))
    return as_uint8(resize(to_rgb_float(photograph), shape, scale=scale))


def photo_mosaic(photos: Sequence[Photograph], megapixels: float) -> Photograph:
    """Lay photographs, enlarged, side by side to one picture of so many megapixels, 4 : 3.

    Parts of it are scenes, as in a real large photograph; they have no more detail than the originals.
    """
    height = round(math.sqrt(megapixels * 1e6 * 3 / 4))
    width = round(megapixels * 1e6 / height)
    down = max(1, min(4, round(math.sqrt(len(photos) / 2))))
    across = down + 1
    picture = np.empty((height, width, 3), np.uint8)
    for row in range(down):
        for column in range(across):
            top, bottom = row * height // down, (row + 1) * height // down
            left, right = column * width // across, (column + 1) * width // across
            photo = photos[(row * across + column) % len(photos)]
            picture[top:bottom, left:right] = _filling(photo, bottom - top, right - left)
    return picture


def _filling(photo: Photograph, height: int, width: int) -> Photograph:
    """Scale a photograph so that it covers a rectangle, and cut off what hangs over."""
    scale = max(height / photo.shape[0], width / photo.shape[1])
    shape = (max(height, round(photo.shape[0] * scale)), max(width, round(photo.shape[1] * scale)))
    return as_uint8(resize(to_rgb_float(photo), shape))[:height, :width]


def grid_of(n_tokens: int) -> tuple[int, int]:
    """Choose the rows and columns of a grid of about so many tokens, exactly where a not too long grid allows it."""
    root = math.isqrt(n_tokens)
    for height in range(root, max(1, math.ceil(root / math.sqrt(2))) - 1, -1):
        if n_tokens % height == 0:
            return height, n_tokens // height
    return root, n_tokens // root


class FeatureMosaic:
    """Features of the tokens of a mosaic, computed once and as far as needed.

    Parameters
    ----------
    photos
        (H, W, 3) uint8.
    folder
        Where features are kept; ones that an earlier run left there for the same photographs are used again.
    backbone
        None for the default model.
    """

    def __init__(self, photos: Sequence[Photograph], folder: Path, backbone: Backbone | None = None) -> None:
        self._photos = list(photos)
        self._folder = folder
        self._backbone = backbone or Backbone()
        digest = hashlib.sha256(f"{self._backbone.name} {_SIDE} {CHANNELS}".encode())
        for photo in self._photos:
            digest.update(str(photo.shape).encode())
            digest.update(np.ascontiguousarray(photo).tobytes())
        self._name = digest.hexdigest()[:16]

    def features(self, grid: tuple[int, int]) -> Floats:
        """Return the features of a grid of tokens, row-major.

        The channels are the 60 that NCR and DCR keep of the keys of the first four crops, taken from tokens
        scaled to unit length, as in the pipeline.

        Returns
        -------
        (h * w, 60) float32 array
            The top left part of larger grids' features.
        """
        height, width = grid
        tiles = min(math.isqrt(MOST_REAL_TOKENS) // _SIDE, -(-max(grid) // _SIDE))
        mosaic = self._mosaic(tiles)
        extra = [(0, max(0, side - have)) for side, have in zip(grid, mosaic.shape[:2], strict=True)]
        if any(after for _, after in extra):
            mosaic = np.pad(mosaic, (*extra, (0, 0)), mode="symmetric")
        return np.ascontiguousarray(mosaic[:height, :width].reshape(height * width, -1))

    def save(self, grid: tuple[int, int], folder: Path) -> str:
        """Write the features of a grid to a file and return its path."""
        path = folder / f"features-{grid[0]}x{grid[1]}.npy"
        if not path.exists():
            np.save(path, self.features(grid))
        return str(path)

    def _mosaic(self, tiles: int) -> Floats:
        """Features of at least so many crops along either side."""
        stored = {int(path.stem.rpartition("-")[2]): path for path in self._folder.glob(f"mosaic-{self._name}-*.npy")}
        larger = [size for size in stored if size >= tiles]
        if not larger:
            mosaic = np.empty((tiles * _SIDE, tiles * _SIDE, CHANNELS), np.float32)
            have = max(stored, default=0)
            if have:
                mosaic[: have * _SIDE, : have * _SIDE] = np.load(stored[have], mmap_mode="r")
            kept, chosen = self._channels
            for index in range(have * have, tiles * tiles):
                # Crop by crop outwards from the top left, so that a small mosaic is a part of every larger one.
                row, column = _place(index)
                top, left = row * _SIDE, column * _SIDE
                quiet = channels.normalize_tokens(self._keys(index)[:, kept])
                mosaic[top : top + _SIDE, left : left + _SIDE] = quiet[:, chosen].reshape(_SIDE, _SIDE, -1)
            path = self._folder / f"mosaic-{self._name}-{tiles}.npy"
            # Whole or not at all: a run that is broken off leaves nothing that the next would take for features.
            with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".tmp", delete=False) as file:
                np.save(file, mosaic)
            os.replace(file.name, path)
            stored[tiles] = path
            larger = [tiles]
        return np.load(stored[min(larger)], mmap_mode="r")

    @functools.cached_property
    def _channels(self) -> tuple[Any, Any]:
        """Channels that NCR keeps of the keys, and of those the ones that DCR keeps."""
        keys = np.concatenate([self._keys(index) for index in range(4)])
        kept = channels.noise_channel_reduction(keys, normalize=False)
        return kept, channels.deviation_channel_reduction(channels.normalize_tokens(keys[:, kept]), CHANNELS)

    def _keys(self, index: int) -> Floats:
        return self._backbone.features(self._crop(index), long_side=_SIDE * self._backbone.patch_size).keys

    def _crop(self, index: int) -> Floats:
        """Cut the square crop of this number, mirrored every other time around."""
        photo = self._photos[index % len(self._photos)]
        rng = np.random.default_rng(index)
        side = round(min(photo.shape[:2]) * rng.uniform(0.35, 1.0))
        top, left = (int(rng.integers(0, length - side + 1)) for length in photo.shape[:2])
        part = photo[top : top + side, left : left + side]
        if index // len(self._photos) % 2:
            part = part[:, ::-1]
        size = _SIDE * self._backbone.patch_size
        return resize(to_rgb_float(part), (size, size))


def _place(index: int) -> tuple[int, int]:
    """Row and column of a crop: squares of 1, 4, 9, ... crops, each around the one before at its right and bottom."""
    ring = math.isqrt(index)
    step = index - ring * ring
    return (step, ring) if step <= ring else (ring, step - ring - 1)


def _wheel_folder() -> Path:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise InputError("scikit-image can't be found: name a folder of photographs with --images")
    return Path(spec.origin).parent / "data"
