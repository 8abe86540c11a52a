"""What a model file says about itself, read without ONNX Runtime and without the onnx package.

Every file that :mod:`sparsespec.models.build` writes carries its own description in the ``metadata_props`` of the ONNX
``ModelProto``: the patch size, the widths, the normalisation and the position table. An ONNX file is one protobuf
message, and a protobuf message is a flat list of (tag, value) pairs, so the few fields wanted here are reached by
stepping over the others; the weights are never read.
"""

from __future__ import annotations

import base64
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

FORMAT = "sparsespec-vit"
"""A ViT trunk with the inputs ``image`` and ``positions`` and the outputs ``queries``, ``keys`` and ``values``."""
FORMAT_VERSION = 1
PREFIX = "sparsespec."
"""Every key of ours in ``metadata_props`` starts with this."""

# Field numbers and wire types of onnx.proto: ModelProto.graph = 7, ModelProto.metadata_props = 14,
# StringStringEntryProto.key = 1 and .value = 2, all length-delimited.
_GRAPH, _METADATA_PROPS = 7, 14
_KEY, _VALUE = 1, 2
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


class ModelFormatError(ValueError):
    """The file isn't an ONNX model that :mod:`sparsespec.models.build` wrote."""


@dataclass(frozen=True, eq=False)
class TrunkMetadata:
    """The description a model file carries.

    Attributes
    ----------
    name : str
        Name of the model, such as ``dinov2-vits14-int8``.
    precision : str
        ``float32`` or ``int8``.
    patch_size : int
        Side of a patch in pixels of the network's input.
    embed_dim, heads, blocks : int
        Channels of a token, attention heads, transformer blocks. The last block is cut after q, k and v.
    mean, std : (3,) float32
        Normalisation of the input, RGB in [0, 1].
    class_row : (embed_dim,) float32
        Class token plus its position: the row of ``positions`` in front of the patches.
    positions : (rows, columns, embed_dim) float32
        Base position table, to be resized to the token grid.
    source_sha256 : str
        SHA-256 of the file the weights were taken from.
    """

    name: str
    precision: str
    patch_size: int
    embed_dim: int
    heads: int
    blocks: int
    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]
    class_row: npt.NDArray[np.float32]
    positions: npt.NDArray[np.float32]
    source_sha256: str


def encode_table(table: npt.NDArray[np.float32]) -> str:
    """Pack a float32 array into text: bytes grouped by significance, deflated, base64.

    Sign and exponent bytes of neighbouring entries resemble each other, so grouping them makes the table smaller.
    """
    planes = np.ascontiguousarray(table, dtype="<f4").reshape(-1).view(np.uint8).reshape(-1, 4).T
    return base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode("ascii")


def decode_table(text: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Undo :func:`encode_table`.

    Raises
    ------
    ValueError
        When the text doesn't hold exactly ``shape`` entries.
    """
    raw = zlib.decompress(base64.b64decode(text, validate=True))
    planes = np.frombuffer(raw, np.uint8).reshape(4, -1)
    table = np.ascontiguousarray(planes.T).view("<f4").astype(np.float32, copy=False)
    return table.reshape(shape)


def read_metadata_props(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the ``metadata_props`` of an ONNX file.

    Parameters
    ----------
    path : path
        The file.

    Returns
    -------
    dict of str to str

    Raises
    ------
    ModelFormatError
        When the file isn't an ONNX model.
    OSError
        When it can't be opened.
    """
    found: dict[str, str] = {}
    has_graph = False
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            for field, start, length in _fields(stream, 0, size):
                if field == _GRAPH:
                    has_graph = True
                elif field == _METADATA_PROPS:
                    entry = {}
                    for sub, sub_start, sub_length in _fields(stream, start, start + length):
                        if sub in (_KEY, _VALUE):
                            stream.seek(sub_start)
                            entry[sub] = stream.read(sub_length).decode("utf-8")
                    found[entry.get(_KEY, "")] = entry.get(_VALUE, "")
        except ValueError as error:
            raise ModelFormatError(f"{os.fspath(path)!r} isn't an ONNX file: {error}") from None
    if not has_graph:
        raise ModelFormatError(f"{os.fspath(path)!r} isn't an ONNX file: it holds no graph")
    return found


def read_trunk_metadata(path: str | os.PathLike[str]) -> TrunkMetadata:
    """Read and check the description of a trunk.

    Parameters
    ----------
    path : path
        An .onnx file written by :mod:`sparsespec.models.build`.

    Returns
    -------
    TrunkMetadata

    Raises
    ------
    ModelFormatError
        When the file isn't such a model, or a newer version of the format, or incomplete.
    OSError
        When the file can't be opened.
    """
    return parse_trunk_metadata(read_metadata_props(path), where=os.fspath(Path(path)))


def parse_trunk_metadata(props: Mapping[str, str], *, where: str) -> TrunkMetadata:
    """Turn the raw text entries into a :class:`TrunkMetadata`; ``where`` names the file in error messages."""
    kind = props.get(PREFIX + "format")
    if kind != FORMAT:
        said = "says nothing of its format" if kind is None else f"says its format is {kind!r}"
        raise ModelFormatError(
            f"{where!r} is an ONNX file but not one for sparsespec: it {said}, expected {FORMAT!r}. "
            "Any ONNX export won't do: use a file made by 'python -m sparsespec.models.build'"
        )
    version = props.get(PREFIX + "version", "")
    if version != str(FORMAT_VERSION):
        raise ModelFormatError(
            f"{where!r} has version {version or 'missing'} of the format {FORMAT!r}; this program reads "
            f"version {FORMAT_VERSION}. Rebuild the file with 'python -m sparsespec.models.build'"
        )
    try:
        embed_dim = int(props[PREFIX + "embed_dim"])
        rows, columns = (int(part) for part in props[PREFIX + "position_grid"].split("x"))
        table = decode_table(props[PREFIX + "positions"], (1 + rows * columns, embed_dim))
        return TrunkMetadata(
            name=props[PREFIX + "name"],
            precision=props[PREFIX + "precision"],
            patch_size=int(props[PREFIX + "patch_size"]),
            embed_dim=embed_dim,
            heads=int(props[PREFIX + "heads"]),
            blocks=int(props[PREFIX + "blocks"]),
            mean=_three(props[PREFIX + "mean"]),
            std=_three(props[PREFIX + "std"]),
            class_row=table[0],
            positions=table[1:].reshape(rows, columns, embed_dim),
            source_sha256=props[PREFIX + "source_sha256"],
        )
    except KeyError as error:
        raise ModelFormatError(f"{where!r} is incomplete: its metadata has no entry {error}") from None
    except (ValueError, zlib.error) as error:
        raise ModelFormatError(f"{where!r} has unreadable metadata: {error}") from None


def _three(text: str) -> npt.NDArray[np.float32]:
    values = np.array([float(part) for part in text.split(",")], np.float32)
    if values.shape != (3,):
        raise ValueError(f"expected three numbers, got {text!r}")
    return values


def _fields(stream: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (field number, start, length) of every length-delimited field between two offsets, without reading them."""
    position = start
    while position < end:
        stream.seek(position)
        tag = _varint(stream)
        field, wire = tag >> 3, tag & 7
        if field == 0:
            raise ValueError("a field with number 0")
        if wire == _VARINT:
            _varint(stream)
            position = stream.tell()
        elif wire == _FIXED64:
            position = stream.tell() + 8
        elif wire == _FIXED32:
            position = stream.tell() + 4
        elif wire == _LENGTH_DELIMITED:
            length = _varint(stream)
            position = stream.tell() + length
            if position <= end:
                yield field, position - length, length
        else:
            raise ValueError(f"unknown wire type {wire}")
        if position > end:
            raise ValueError("it ends in the middle of a field, the file is cut short or of another kind")


def _varint(stream: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            raise ValueError("it ends in the middle of a number")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("a number of more than ten bytes")
