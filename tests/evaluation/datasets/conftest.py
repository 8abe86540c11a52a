from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

# As many colours as the sets have: with fewer, Pillow writes fewer bits, and 255 is lost.
PALETTE = np.random.default_rng(3).integers(0, 256, 768).tolist()


class Maker:
    """Writes the files that data sets are made of, below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _path(self, path: str) -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def photo(self, path: str, size: tuple[int, int] = (8, 6), orientation: int | None = None) -> None:
        """A photograph of width and height `size`."""
        image = Image.new("RGB", size, (90, 120, 40))
        exif = image.getexif()
        if orientation is not None:
            exif[274] = orientation
        image.save(self._path(path), exif=exif)

    def labels(self, path: str, values: np.ndarray) -> None:
        Image.fromarray(values).save(self._path(path))

    def palette(self, path: str, values: np.ndarray) -> None:
        """A label image as Pascal VOC and DAVIS 2017 have it: indices of colours."""
        image = Image.fromarray(values.astype(np.uint8))
        image.putpalette(PALETTE)  # turns grey into indices
        image.save(self._path(path))

    def text(self, path: str, *lines: str) -> None:
        self._path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def json(self, path: str, data: Any) -> None:
        self._path(path).write_text(json.dumps(data), encoding="utf-8")


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


@pytest.fixture
def runs() -> Callable[[np.ndarray], dict[str, Any]]:
    """Run-length encoding with the runs as a list, as YouTube-VIS 2019 and the crowds of COCO have it."""

    def encode(mask: np.ndarray) -> dict[str, Any]:
        flat = np.asarray(mask, bool).ravel(order="F")
        edges = (np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist()
        bounds = [0, *edges, flat.size]
        counts = [b - a for a, b in pairwise(bounds)]
        return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}

    return encode
