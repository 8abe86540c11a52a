"""Weights that an ONNX file keeps in files beside it: which files these are, and reading them.

The onnx package reads them too, but newer versions refuse links, which is what the cache of the Hugging Face hub
consists of. Here links are followed as for any other file, and a name that leads out of the model's folder is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

from .metadata import ModelFormatError, protobuf_fields
from .vit import BuildError

# Field numbers of onnx.proto, all of them length-delimited.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_ATTRIBUTE = 5
_ATTRIBUTE_TENSOR = 5
_TENSOR_EXTERNAL = 13
_KEY, _VALUE = 1, 2
# The ways from a model to the entries that say where a tensor lies.
_WAYS = (
    (_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_EXTERNAL),
    (_MODEL_GRAPH, _GRAPH_NODE, _NODE_ATTRIBUTE, _ATTRIBUTE_TENSOR, _TENSOR_EXTERNAL),
)


def external_files(path: str | os.PathLike[str]) -> list[Path]:
    """List the files that the weights of an ONNX file lie in, besides itself; needs no onnx package.

    Parameters
    ----------
    path : path
        The ONNX file.

    Returns
    -------
    list of pathlib.Path
        By name, each once.

    Raises
    ------
    BuildError
        When one of them isn't there, or its name leads out of the folder.
    sparsespec.models.metadata.ModelFormatError
        When the file isn't an ONNX model.
    OSError
        When it can't be opened.
    """
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            names = {name for way in _WAYS for name in _locations(stream, way, 0, size)}
        except ValueError as error:
            raise ModelFormatError(f"{os.fspath(path)!r} isn't an ONNX file: {error}") from None
    return [_beside(Path(path), name) for name in sorted(names)]


def _locations(stream: BinaryIO, way: tuple[int, ...], start: int, end: int) -> Iterator[str]:
    for field, inner, length in protobuf_fields(stream, start, end):
        if field != way[0]:
            continue
        if len(way) > 1:
            yield from _locations(stream, way[1:], inner, inner + length)
            continue
        entry = {}
        for key, text, text_length in protobuf_fields(stream, inner, inner + length):
            stream.seek(text)
            entry[key] = stream.read(text_length).decode("utf-8")
        if entry.get(_KEY) == "location":
            yield entry.get(_VALUE, "")


def load_external(model: Any, path: str | os.PathLike[str]) -> None:
    """Fetch the weights that lie in other files into a model.

    Parameters
    ----------
    model : onnx.ModelProto
        What was read of the file; changed in place.
    path : path
        The ONNX file.

    Raises
    ------
    BuildError
        When one of the files isn't there, is too short, or its name leads out of the folder.
    """
    tensors = [*model.graph.initializer, *(a.t for node in model.graph.node for a in node.attribute if a.HasField("t"))]
    for tensor in tensors:
        if tensor.data_location != tensor.EXTERNAL:
            continue
        said = {entry.key: entry.value for entry in tensor.external_data}
        file = _beside(Path(path), said.get("location", ""))
        tensor.raw_data = _stretch(file, said, f"the weight {tensor.name!r} of {os.fspath(path)!r}")
        del tensor.external_data[:]
        tensor.data_location = tensor.DEFAULT


def _stretch(file: Path, said: dict[str, str], what: str) -> bytes:
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            offset = int(said.get("offset", 0))
            length = int(said.get("length", size - offset))
        except ValueError:
            offset = length = -1
        if offset < 0 or length < 0 or offset + length > size:
            raise BuildError(
                f"{what} is said to lie at bytes {said.get('offset', 0)} + {said.get('length', 'all')} of "
                f"{str(file)!r}, which has {size}: it is cut short, or belongs to another model"
            )
        stream.seek(offset)
        return stream.read(length)


def _beside(path: Path, name: str) -> Path:
    """Find a file that belongs to a model by the name that stands in it."""
    kinds = (PurePosixPath(name), PureWindowsPath(name))
    if not name or "\0" in name or any(kind.anchor or ".." in kind.parts for kind in kinds):
        raise BuildError(
            f"the weights of {os.fspath(path)!r} are said to lie in the file {name!r}: refused, because they must lie "
            "in its own folder"
        )
    # A link to the model may stand alone, or, as in the cache of the hub, beside links to the other files.
    for folder in (path.parent, path.resolve().parent):
        if (folder / name).is_file():
            return folder / name
    raise BuildError(
        f"the weights of {os.fspath(path)!r} lie in another file, {str(path.parent / name)!r}, which isn't there. "
        "Put that file beside it, under the name it had"
    )
