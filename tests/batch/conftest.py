from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@dataclass
class Result:
    """What a segmenter returns, as far as a run looks at it."""

    labels: np.ndarray
    scores: np.ndarray
    info: dict[str, Any] = field(default_factory=dict)


class BrightHalves:
    """Takes the bright pixels of the left and of the right half for one object each."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, image: np.ndarray) -> Result:
        self.seen.append(image.shape)
        bright = image.max(axis=2) > np.iinfo(image.dtype).max // 2
        half = image.shape[1] // 2
        labels = np.zeros(image.shape[:2], np.int32)
        count = 0
        for part in (np.s_[:, :half], np.s_[:, half:]):
            if bright[part].any():
                count += 1
                labels[part][bright[part]] = count
        scores = np.linspace(0.9, 0.4, 2, dtype=np.float32)[:count]
        info = {
            "model": "fake",
            "grid": (np.int64(3), 4),
            "tokens": np.int32(12),
            "solver": "none",
            "residuals": np.array([np.nan]),
            "seconds": {"features": np.float64(0.01), "instances": 0.02, "total": 0.03},
        }
        return Result(labels, scores, info)


@pytest.fixture
def segmenter() -> BrightHalves:
    return BrightHalves()


@pytest.fixture
def photo() -> Callable[..., Path]:
    def make(path: Path, width: int = 60, height: int = 40, grey: int = 30) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((height, width, 3), grey, np.uint8)
        pixels[height // 4 : height // 2, width // 8 : width // 4] = 250
        pixels[height // 4 : height // 2, width * 5 // 8 : width * 7 // 8] = 240
        Image.fromarray(pixels).save(path)
        return path

    return make
