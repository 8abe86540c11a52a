"""What a model file says about itself, read without ONNX Runtime and without the onnx package.

Every file that :mod:`sparsespec.models.build` writes carries its own description in the ``metadata_props`` of the ONNX
``ModelProto``: the patch size, the widths, the normalisation, the position table and how to resize it. An ONNX file is
one protobuf message, and a protobuf message is a flat list of (tag, value) pairs, so the few fields wanted here are
reached by stepping over the others; the weights are never read.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt

from sparsespec.position_table import PositionRule

if TYPE_CHECKING:
    from .vit import Vit

FORMAT = "sparsespec-vit"
"""A ViT trunk: inputs ``image`` and ``positions``, outputs ``queries``, ``keys`` and ``values``."""
FORMAT_VERSION = 2
_READABLE = ("1", "2")
PRECISIONS = ("float32", "float16", "int8")
"""How the weights of the blocks are kept; the first where nobody says."""
STATIC = "int8-static"
"""Precision of a file with fixed ranges for the inputs of its products, which only pictures can tell."""
FILE_PRECISIONS = (*PRECISIONS, STATIC)
PREFIX = "sparsespec."
"""Every key of ours in ``metadata_props`` starts with this."""

# Entries of the position table and what stands in front of it: 128 x 128 patches of 4,096 channels.
_LARGEST_TABLE = 2**26

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
        ``float32``, ``float16``, ``int8`` or ``int8-static``.
    patch_size : int
        Side of a patch in pixels of the network's input.
    embed_dim, heads, blocks : int
        Channels of a token, attention heads, transformer blocks of the whole network.
    output_blocks : tuple of int
        Zero-based numbers, ascending, of the blocks whose queries, keys and values the file gives. It ends after the
        last of them.
    mean, std : (3,) float32
        Normalisation of the input, RGB in [0, 1].
    prefix : (P, embed_dim) float32
        The rows of the input ``positions`` in front of the patches: the class token plus its position, then the
        registers, as far as the network has them.
    positions : (rows, columns, embed_dim) float32
        Base position table, to be resized to the token grid.
    rule : sparsespec.position_table.PositionRule
        How to resize it.
    source, source_sha256 : str
        Where the weights were taken from, and the SHA-256 of that file.
    """

    name: str
    precision: str
    patch_size: int
    embed_dim: int
    heads: int
    blocks: int
    output_blocks: tuple[int, ...]
    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]
    prefix: npt.NDArray[np.float32]
    positions: npt.NDArray[np.float32]
    rule: PositionRule
    source: str
    source_sha256: str

    def outputs(self, block: int | None = None) -> tuple[str, str, str]:
        """Name the outputs that are the queries, keys and values of a block.

        Parameters
        ----------
        block : int or None
            Zero-based, or negative to count from the network's last; None is the last one the file has.

        Returns
        -------
        (str, str, str)

        Raises
        ------
        ValueError
            When the file doesn't give that block; the message says which it does.
        """
        found = self.block(block)
        end = "" if found == self.output_blocks[-1] else f".{found}"
        return f"queries{end}", f"keys{end}", f"values{end}"

    def block(self, block: int | None = None) -> int:
        """Return the zero-based number of a block that the file gives; parameter and errors as of :meth:`outputs`."""
        number = self.output_blocks[-1] if block is None else block
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise ValueError(f"block must be a whole number or None, got {block!r}")
        found = int(number) + (self.blocks if number < 0 else 0)
        if found not in self.output_blocks:
            listed = ", ".join(map(str, self.output_blocks))
            raise ValueError(
                f"model {self.name!r} gives no features of block {block}: it has {self.blocks} blocks, of which its "
                f"file gives {listed}; build it with others by 'sparsespec models build ... --blocks LIST'"
            )
        return found

    def features_sha256(self, block: int | None = None) -> str:
        """Tell features apart, whatever the precision: ``source_sha256`` for the network's last block, else its own.

        Directions in the features of one block say nothing about those of another.
        """
        number = self.block(block)
        if number == self.blocks - 1:
            return self.source_sha256
        return hashlib.sha256(f"{self.source_sha256} block {number}".encode()).hexdigest()


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
    count = math.prod(shape)
    unpack = zlib.decompressobj()
    # No more than is wanted: a few kilobytes can be made to unpack to gigabytes.
    raw = unpack.decompress(base64.b64decode(text, validate=True), 4 * count + 1)
    if len(raw) != 4 * count or not unpack.eof:
        raise ValueError(f"a table that isn't of {' x '.join(map(str, shape))} numbers")
    planes = np.frombuffer(raw, np.uint8).reshape(4, -1)
    table = np.ascontiguousarray(planes.T).view("<f4").astype(np.float32, copy=False)
    return table.reshape(shape)


def describe(
    vit: Vit, *, output_blocks: Sequence[int], precision: str, name: str, source: str, source_sha256: str
) -> dict[str, str]:
    """Write the description of a trunk as the raw text entries of its file.

    Parameters
    ----------
    vit : Vit
        The network.
    output_blocks : sequence of int
        Blocks that come out, zero-based and ascending.
    precision, name, source, source_sha256 : str
        As in :class:`TrunkMetadata`.

    Returns
    -------
    dict of str to str
    """
    rows, columns, embed_dim = vit.positions.shape
    table = np.concatenate([vit.prefix.reshape(-1, embed_dim), vit.positions.reshape(-1, embed_dim)])
    props = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "name": name,
        "precision": precision,
        "patch_size": str(vit.patch_size),
        "embed_dim": str(embed_dim),
        "heads": str(vit.heads),
        "blocks": str(len(vit.blocks)),
        "output_blocks": ",".join(map(str, output_blocks)),
        "mean": ",".join(str(float(value)) for value in vit.mean),
        "std": ",".join(str(float(value)) for value in vit.std),
        "source": source,
        "source_sha256": source_sha256,
        "prefix": str(len(vit.prefix)),
        "position_grid": f"{rows}x{columns}",
        "position_offset": str(float(vit.rule.offset)),
        "position_antialias": "true" if vit.rule.antialias else "false",
        "positions": encode_table(table.astype(np.float32)),
    }
    return {PREFIX + key: value for key, value in props.items()}


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
            for field, start, length in protobuf_fields(stream, 0, size):
                if field == _GRAPH:
                    has_graph = True
                elif field == _METADATA_PROPS:
                    entry = {}
                    for sub, sub_start, sub_length in protobuf_fields(stream, start, start + length):
                        if sub in (_KEY, _VALUE):
                            stream.seek(sub_start)
                            entry[sub] = stream.read(sub_length).decode("utf-8")
                    if entry.get(_KEY, "") in found:
                        raise ValueError(f"its metadata have two entries {entry.get(_KEY, '')!r}")
                    found[entry.get(_KEY, "")] = entry.get(_VALUE, "")
        except ValueError as error:
            raise ModelFormatError(
                f"{os.fspath(path)!r} isn't an ONNX file, or is cut short: {error}; fetch or export it again"
            ) from None
    if not has_graph:
        raise ModelFormatError(
            f"{os.fspath(path)!r} isn't an ONNX file, or is cut short: it holds no graph; fetch or export it again"
        )
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
            "Make one of it with 'sparsespec models build FILE -o OUT.onnx'"
        )
    version = props.get(PREFIX + "version", "")
    if version not in _READABLE:
        raise ModelFormatError(
            f"{where!r} has version {version or 'missing'} of the format {FORMAT!r}; this program reads "
            f"versions {' and '.join(_READABLE)}. Rebuild the file with 'sparsespec models build'"
        )
    entries = _Entries(props, where)
    embed_dim = entries.integer("embed_dim", 1, 2**16)
    heads = entries.integer("heads", 1, embed_dim)
    if embed_dim % heads:
        raise entries.bad("heads", f"expected a divisor of embed_dim {embed_dim}")
    blocks = entries.integer("blocks", 1, 10_000)
    output_blocks: tuple[int, ...]
    if version == "1":
        # It was for one network: a class token, the last block, the table resized as its export did.
        prefix, rule, output_blocks = 1, PositionRule(), (blocks - 1,)
    else:
        prefix = entries.integer("prefix", 0, 10_000)
        rule = PositionRule(entries.number("position_offset", 0, 0.99), entries.boolean("position_antialias"))
        output_blocks = entries.ascending("output_blocks", blocks)
    rows, columns = entries.grid("position_grid")
    table = entries.table("positions", (prefix + rows * columns, embed_dim))
    return TrunkMetadata(
        name=entries.text("name"),
        precision=entries.one_of("precision", FILE_PRECISIONS),
        patch_size=entries.integer("patch_size", 1, 1024),
        embed_dim=embed_dim,
        heads=heads,
        blocks=blocks,
        output_blocks=output_blocks,
        mean=entries.three("mean", lowest=-1e3),
        std=entries.three("std", lowest=1e-6),
        prefix=table[:prefix],
        positions=table[prefix:].reshape(rows, columns, embed_dim),
        rule=rule,
        source=entries.text("source"),
        source_sha256=entries.sha256("source_sha256"),
    )


class _Entries:
    """The raw entries, each checked as it is read."""

    def __init__(self, props: Mapping[str, str], where: str) -> None:
        self._props, self._where = props, where

    def bad(self, key: str, expected: str) -> ModelFormatError:
        value = self._props[PREFIX + key]
        shown = repr(value if len(value) <= 60 else value[:57] + "...")
        return ModelFormatError(f"{self._where!r} has unreadable metadata: its entry {key} is {shown}, {expected}")

    def text(self, key: str) -> str:
        try:
            value = self._props[PREFIX + key]
        except KeyError:
            raise ModelFormatError(
                f"{self._where!r} is incomplete: its metadata has no entry {PREFIX + key!r}"
            ) from None
        if not value:
            raise self.bad(key, "expected some text")
        return value

    def one_of(self, key: str, choices: Sequence[str]) -> str:
        value = self.text(key)
        if value not in choices:
            raise self.bad(key, f"expected one of {', '.join(choices)}")
        return value

    def boolean(self, key: str) -> bool:
        return self.one_of(key, ("true", "false")) == "true"

    def integer(self, key: str, lowest: int, highest: int) -> int:
        value = self._whole(self.text(key))
        if value is None or not lowest <= value <= highest:
            raise self.bad(key, f"expected a whole number from {lowest} to {highest}")
        return value

    def number(self, key: str, lowest: float, highest: float) -> float:
        value = self._real(self.text(key))
        if not lowest <= value <= highest:
            raise self.bad(key, f"expected a number from {lowest:g} to {highest:g}")
        return value

    def three(self, key: str, lowest: float) -> npt.NDArray[np.float32]:
        values = [self._real(part) for part in self.text(key).split(",")]
        if len(values) != 3 or not all(lowest <= value <= 1e3 for value in values):
            raise self.bad(key, f"expected three numbers from {lowest:g} to 1000")
        return np.array(values, np.float32)

    def ascending(self, key: str, count: int) -> tuple[int, ...]:
        values = [self._whole(part) for part in self.text(key).split(",")]
        found = tuple(value for value in values if value is not None and value < count)
        if len(found) != len(values) or list(found) != sorted(set(found)):
            raise self.bad(key, f"expected ascending block numbers from 0 to {count - 1}")
        return found

    def grid(self, key: str) -> tuple[int, int]:
        sides = [self._whole(part) for part in self.text(key).split("x")]
        found = [side for side in sides if side is not None and 1 <= side <= 10_000]
        if len(sides) != 2 or len(found) != 2:
            raise self.bad(key, "expected rows and columns such as 37x37")
        return found[0], found[1]

    def table(self, key: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        if math.prod(shape) > _LARGEST_TABLE:
            raise self.bad(key, f"which is said to be of {' x '.join(map(str, shape))} numbers")
        try:
            table = decode_table(self.text(key), shape)
        except (ValueError, zlib.error) as error:
            if isinstance(error, ModelFormatError):
                raise
            raise self.bad(key, f"which can't be unpacked: {error}") from None
        if not np.isfinite(table).all():
            raise self.bad(key, "which holds numbers that aren't finite")
        return table

    def sha256(self, key: str) -> str:
        value = self.text(key)
        if not re.fullmatch("[0-9a-f]{64}", value):
            raise self.bad(key, "expected 64 hexadecimal digits in lower case")
        return value

    @staticmethod
    def _whole(text: str) -> int | None:
        # Not everything that int() takes: no spaces, underscores or digits of other scripts.
        return int(text) if re.fullmatch("[0-9]{1,9}", text) else None

    @staticmethod
    def _real(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            return math.nan


def protobuf_fields(stream: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Step through a protobuf message without reading what is in it.

    Parameters
    ----------
    stream : binary file
        May be moved between two steps.
    start, end : int
        Offsets of the message.

    Yields
    ------
    (int, int, int)
        Number, start and length of every length-delimited field.

    Raises
    ------
    ValueError
        When the message isn't one, or is cut short.
    """
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
            raise ValueError("it ends in the middle of a field")


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
