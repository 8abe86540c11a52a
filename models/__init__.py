"""The embedded model, the registry of models known by name, and how each file was built."""

from __future__ import annotations

from .metadata import ModelFormatError, TrunkMetadata, read_trunk_metadata
from .registry import ModelInfo, UnknownModelError, get_model, list_models, resolve, shipped_directions

__all__ = [
    "ModelFormatError",
    "ModelInfo",
    "TrunkMetadata",
    "UnknownModelError",
    "get_model",
    "list_models",
    "read_trunk_metadata",
    "resolve",
    "shipped_directions",
]
