"""The exports of tests/golden/exports.tar.xz, unpacked once."""

from __future__ import annotations

import functools
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

_PACKED = Path(__file__).parents[1] / "golden" / "exports.tar.xz"


@functools.cache
def files() -> dict[str, bytes]:
    with tarfile.open(_PACKED, "r:xz") as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}


@functools.cache
def cases() -> dict[str, dict[str, Any]]:
    return json.loads(files()["cases.json"])


def load(name: str) -> Any:
    import onnx

    return onnx.load_from_string(files()[f"{name}.onnx"])


def image(height: int, width: int) -> np.ndarray:
    """The picture that the models saw in tests/golden/make_exports.py."""
    return np.random.default_rng(height * 1000 + width).normal(size=(1, 3, height, width)).astype(np.float32)


def caught(model: str, height: int, width: int) -> np.ndarray:
    """Queries, keys and values (blocks, 3, rows, D) that PyTorch computed, of the rows in ROWS."""
    return np.load(io.BytesIO(files()[f"{model}-{height}x{width}.npy"]))


ROWS = (0, 1, 5, -1)
