"""Object instances from photographs, with no labels, no PyTorch and no GPU.

The public names are loaded on first use, so that ``import sparsespec`` (and ``sparsespec --help``) costs milliseconds:
neither ONNX Runtime nor Numba is imported before an image is.

Examples
--------
>>> import numpy as np, sparsespec
>>> result = sparsespec.segment(np.zeros((64, 64, 3), np.uint8))
>>> int(result.labels.max())                      # nothing in a black picture
0
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sparsespec.backbone import Backbone
    from sparsespec.pipeline import Segmentation, Segmenter, segment

__all__ = ["Backbone", "Segmentation", "Segmenter", "__version__", "segment"]

_HOME = {
    "Backbone": "sparsespec.backbone",
    "Segmentation": "sparsespec.pipeline",
    "Segmenter": "sparsespec.pipeline",
    "segment": "sparsespec.pipeline",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        try:
            return getattr(importlib.import_module(_HOME[name]), name)
        except ModuleNotFoundError as error:
            if error.name != "sparsespec.models":
                raise
            # Their folders stand beside this one there, where only an installation puts them into the package.
            raise ImportError(
                f"this is the source folder {__path__[0]!r}, not the installed package: start Python in another folder,"
                " or with the option -P"
            ) from error
    raise AttributeError(f"module 'sparsespec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
