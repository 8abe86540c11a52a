"""Make position_tables.npz: small random tables resized by PyTorch, for tests/test_position_table.py.

Not run by the tests: PyTorch isn't needed for them. ``pip install torch==2.13.0 transformers==5.23.0 timm==1.0.31`` in
an environment of its own, then ``python tests/golden/make_position_tables.py``.

Each function below calls what one family of models calls: that of timm and those of transformers are called themselves,
and the calls of facebookresearch/dino (``vision_transformer.py``) and facebookresearch/dinov2
(``dinov2/models/vision_transformer.py``), which can't be installed, are repeated with the arguments written there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from timm.layers import resample_abs_pos_embed
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersEmbeddings
from transformers.models.vit.modeling_vit import ViTEmbeddings

Table = npt.NDArray[np.float32]

SQUARE = (14, 14)
GRIDS = [(14, 14), (1, 1), (1, 60), (3, 97), (64, 5), (9, 14), (14, 21), (7, 28), (23, 17), (6, 10)]
OBLONG = (5, 12)
OBLONG_GRIDS = [(5, 12), (12, 5), (2, 30), (8, 8), (5, 20)]


def interpolate(table: Table, **arguments: Any) -> Table:
    planes = torch.from_numpy(table).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(planes, mode="bicubic", **arguments)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def is_native(table: Table, grid: tuple[int, int]) -> bool:
    """As many patches as positions, and a square image: neither repository interpolates then."""
    return grid[0] * grid[1] == table.shape[0] * table.shape[1] and grid[0] == grid[1]


def dino(table: Table, grid: tuple[int, int]) -> Table:
    if is_native(table, grid):
        return table
    side = math.sqrt(table.shape[0] * table.shape[1])
    return interpolate(table, scale_factor=((grid[0] + 0.1) / side, (grid[1] + 0.1) / side))


def dinov2(table: Table, grid: tuple[int, int], *, offset: float, antialias: bool) -> Table:
    if is_native(table, grid):
        return table
    side = int(math.sqrt(table.shape[0] * table.shape[1]))
    if offset:
        where: dict[str, Any] = {"scale_factor": (float(grid[0] + offset) / side, float(grid[1] + offset) / side)}
    else:
        where = {"size": grid}
    return interpolate(table, antialias=antialias, **where)


def transformers(embeddings: Any, table: Table, grid: tuple[int, int]) -> Table:
    patch = 4
    channels = table.shape[2]
    rows = torch.from_numpy(table).reshape(1, -1, channels)
    model = SimpleNamespace(
        position_embeddings=torch.cat([torch.zeros(1, 1, channels), rows], dim=1),
        patch_size=patch,
        patch_embeddings=SimpleNamespace(patch_size=(patch, patch)),
    )
    tokens = torch.zeros(1, 1 + grid[0] * grid[1], channels)
    found = embeddings.interpolate_pos_encoding(model, tokens, grid[0] * patch, grid[1] * patch)
    return found[0, 1:].reshape(*grid, channels).numpy()


def timm(table: Table, grid: tuple[int, int]) -> Table:
    rows, columns, channels = table.shape
    found = resample_abs_pos_embed(
        torch.from_numpy(table).reshape(1, -1, channels), list(grid), old_size=[rows, columns], num_prefix_tokens=0
    )
    return found.reshape(*grid, channels).numpy()


# Offset and antialiasing that tests have to apply, and the families that do it this way: the same bit for bit.
RULES: dict[str, list[Callable[[Table, tuple[int, int]], Table]]] = {
    "0.1 0": [dino, lambda table, grid: dinov2(table, grid, offset=0.1, antialias=False)],
    "0.1 1": [lambda table, grid: dinov2(table, grid, offset=0.1, antialias=True)],
    "0 0": [
        lambda table, grid: transformers(ViTEmbeddings, table, grid),
        lambda table, grid: transformers(Dinov2Embeddings, table, grid),
    ],
    "0 1": [
        lambda table, grid: dinov2(table, grid, offset=0.0, antialias=True),
        lambda table, grid: transformers(Dinov2WithRegistersEmbeddings, table, grid),
        timm,
    ],
}


def main() -> None:
    rng = np.random.default_rng(14)
    square, oblong = (rng.normal(size=(*size, 2), scale=0.05).astype(np.float32) for size in (SQUARE, OBLONG))
    arrays = {"square": square, "oblong": oblong}
    for rule, families in RULES.items():
        for grid in GRIDS:
            found, *others = [resize(square, grid) for resize in families]
            for other in others:
                np.testing.assert_array_equal(found, other)
            arrays[f"{rule} square {grid[0]}x{grid[1]}"] = found
    for grid in OBLONG_GRIDS:
        arrays[f"0 0 oblong {grid[0]}x{grid[1]}"] = interpolate(oblong, size=grid, align_corners=False)
        arrays[f"0 1 oblong {grid[0]}x{grid[1]}"] = timm(oblong, grid)
    np.savez_compressed(Path(__file__).with_name("position_tables.npz"), **arrays)


if __name__ == "__main__":
    main()
