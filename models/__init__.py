"""Vision transformers by name or file, and what turns their exports and weights into files that can be run.

The way of a model's data::

    export.onnx          -> from_onnx.py    \
    model.safetensors    -> from_weights.py  -> vit.py: Vit -> graph.py -> OUT.onnx, described by metadata.py
    PyTorch state dict   -> from_weights.py /

``sources.py`` chooses the reader, ``build.py`` does it all and compares. For a name of ``registry.py``, ``pull.py``
downloads through ``hub.py``, builds, and keeps the result in ``store.py``. ``expand.py`` writes a file in another
precision for runtimes that can't run the one it is in.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .metadata import ModelFormatError, TrunkMetadata, read_trunk_metadata
from .registry import ModelInfo, UnknownModelError, get_model, list_models, resolve, shipped_directions
from .vit import BuildError, UnrecognisedModelError

if TYPE_CHECKING:
    from .build import build_model
    from .hub import DownloadError
    from .store import ChecksumError, StoreError

__all__ = [
    "BuildError",
    "ChecksumError",
    "DownloadError",
    "ModelFormatError",
    "ModelInfo",
    "StoreError",
    "TrunkMetadata",
    "UnknownModelError",
    "UnrecognisedModelError",
    "build_model",
    "get_model",
    "list_models",
    "read_trunk_metadata",
    "resolve",
    "shipped_directions",
]

# Needed for pulling and building only: loaded on first use.
_LATER = {"build_model": ".build", "ChecksumError": ".store", "DownloadError": ".hub", "StoreError": ".store"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
