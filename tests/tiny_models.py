"""Tiny vision transformers under the names of each repository, and what PyTorch makes of them: golden/weights.npz."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PATCH = 4
HEADS = 2
GRIDS = [(5, 5), (7, 2)]
"""Rows and columns of tokens that the models were run at: their own, and another."""

Array = npt.NDArray[Any]


def image(grid: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Make the (3, height, width) picture, from formulas only, that models were run on as if it were normalised."""
    y, x = np.mgrid[0 : grid[0] * PATCH, 0 : grid[1] * PATCH] / 7.0
    channels = [np.sin(3 * x + k * y) + np.cos(5 * y - 2 * k * x) * (x > y) for k in range(3)]
    return np.stack(channels).astype(np.float32)


@functools.cache
def _golden() -> dict[str, Array]:
    return dict(np.load(Path(__file__).parent / "golden" / "weights.npz"))


def styles() -> list[str]:
    return sorted({name.split("/")[0] for name in _golden()})


def tensors(style: str) -> dict[str, npt.NDArray[np.float32]]:
    """State dict; every number is one of half precision."""
    numbers, found, start = _golden()[f"{style}/numbers"].astype(np.float32), {}, 0
    for name, shape in _names(style)["shapes"].items():
        end = start + int(np.prod(shape))
        found[name] = numbers[start:end].reshape(shape)
        start = end
    assert start == len(numbers)
    return found


def config(style: str) -> dict[str, Any]:
    """``config.json``; empty for facebookresearch, which has none."""
    found = _names(style)["config"]
    assert isinstance(found, dict)
    return found


def expected(style: str, grid: tuple[int, int]) -> Array:
    """Queries, keys and values (blocks, 3, h*w, D) as PyTorch's hooks saw them."""
    return _golden()[f"{style.removesuffix('-in-memory')}/{grid[0]}x{grid[1]}"]


def _names(style: str) -> dict[str, Any]:
    found = json.loads(str(_golden()[f"{style}/names"]))
    assert isinstance(found, dict)
    return found
