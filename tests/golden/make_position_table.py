"""Make position_table.npz: a small random table resized by PyTorch, for tests/test_backbone.py.

Not run by the tests: PyTorch isn't needed for them. ``pip install torch==2.13.0`` in an environment of its own, then
``python tests/golden/make_position_table.py``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

GRIDS = [(16, 12), (24, 32), (37, 37), (1, 50), (53, 2), (41, 60)]


def main() -> None:
    table = np.random.default_rng(14).normal(size=(37, 37, 4)).astype(np.float32)
    arrays = {"table": table}
    for rows, columns in GRIDS:
        stack = torch.from_numpy(table).permute(2, 0, 1)[None]
        resized = torch.nn.functional.interpolate(stack, size=(rows, columns), mode="bicubic", align_corners=False)
        arrays[f"{rows}x{columns}"] = resized[0].permute(1, 2, 0).contiguous().numpy()
    np.savez_compressed(Path(__file__).with_name("position_table.npz"), **arrays)


if __name__ == "__main__":
    main()
