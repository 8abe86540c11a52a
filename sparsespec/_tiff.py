"""Pieces of a large TIFF: where they lie in the file, and each of them as a small TIFF of its own.

A tile or a few strips of a TIFF with the tags that say how they are encoded are a complete TIFF again, so that the
reader of whole files decodes them too, with the same colour rules and every compression that it knows.
"""

from __future__ import annotations

import lzma
import math
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

__all__ = ["NotInPiecesError", "Part", "TiffPieces", "check_inflated", "check_pieces"]

LARGEST_PIECE = 1 << 28
"""Bytes, decoded, of the largest tile or strip that is read as a piece."""

_PIECE_AIM = 1 << 20
_MOST_PARTS = 1 << 22
# None, CCITT, LZW, JPEG, deflate (two numbers), PackBits, LZMA, Zstandard, WebP. The old JPEG (6) keeps its tables
# outside the pieces.
_COMPRESSIONS = frozenset({1, 2, 3, 4, 5, 7, 8, 32946, 32773, 34925, 50000, 50001})
_UNCOMPRESSED, _OLD_JPEG, _JPEG = 1, 6, 7
_DEFLATE, _LZMA = (8, 32946), 34925
# What a byte of deflated data can become at most; what is not worth a look.
_MOST_DEFLATED, _HARMLESS, _STEP = 1032, 1 << 25, 1 << 20
_RGB, _YCBCR = 2, 6
_SEPARATE = 2
_STRIP_TAGS, _TILE_TAGS = (273, 279), (324, 325)
# How the samples are encoded and what they mean; sizes and places are written anew.
_COPIED_TAGS = (258, 259, 262, 266, 277, 284, 292, 293, 317, 320, 332, 338, 339, 347, 529, 530, 531, 532)
_FORMATS = {1: "B", 3: "H", 4: "I", 5: "I", 6: "b", 8: "h", 9: "i", 10: "i", 11: "f", 12: "d", 13: "I"}
_BYTES = (2, 7)


class NotInPiecesError(Exception):
    """A TIFF that can only be decoded whole; the message says why."""


@dataclass(frozen=True)
class Part:
    """A rectangle of the picture that is decoded at once.

    Attributes
    ----------
    top, left, bottom, right : int
        In pixels of the picture; what the file holds beyond them is padding.
    content : bytes or None
        A TIFF; None where the file holds nothing.
    """

    top: int
    left: int
    bottom: int
    right: int
    content: bytes | None


def check_pieces(page: Any) -> None:
    """Refuse a header that contradicts itself: decoders make room for a tile or a picture before they read it.

    Parameters
    ----------
    page : tifffile.TiffPage
        With at least one pixel.

    Raises
    ------
    ValueError
        The tiles are out of all proportion to the picture, or there are fewer of them than it needs.
    """
    together = page.samplesperpixel if page.planarconfig != _SEPARATE else 1
    pixel = together * int(np.max(page.bitspersample)) / 8
    if page.is_tiled:
        tile = page.tilewidth * page.tilelength * page.tiledepth
        if tile < 1:
            raise ValueError(f"its tiles have {page.tilewidth} x {page.tilelength} pixels")
        if tile * pixel > max(LARGEST_PIECE, 2 * page.imagewidth * page.imagelength * pixel):
            raise ValueError(
                f"its tiles of {page.tilewidth} x {page.tilelength} pixels are larger than the picture of"
                f" {page.imagewidth} x {page.imagelength}"
            )
    wanted, listed = math.prod(page.chunked), len(page.dataoffsets)
    if listed < wanted and page.compression != _OLD_JPEG:
        kind = "tiles" if page.is_tiled else "strips"
        raise ValueError(
            f"a picture of {page.imagewidth} x {page.imagelength} pixels needs {wanted} {kind},"
            f" its header lists {listed}"
        )


def check_inflated(page: Any, handle: BinaryIO) -> None:
    """Refuse a tile or strip that inflates to much more than its pixels: not every decoder of tifffile stops there.

    Parameters
    ----------
    page : tifffile.TiffPage
        A page that passed `check_pieces`.
    handle : BinaryIO
        Its file.

    Raises
    ------
    ValueError
        A compressed segment inflates too far, or is no compressed data at all.
    """
    compression = int(page.compression)
    if compression not in _DEFLATE and compression != _LZMA:
        return
    together = page.samplesperpixel if page.planarconfig != _SEPARATE else 1
    if page.is_tiled:
        pixels = page.tilewidth * page.tilelength * page.tiledepth
    else:
        pixels = page.imagewidth * min(page.rowsperstrip, page.imagelength)
    most = 2 * pixels * together * math.ceil(int(np.max(page.bitspersample)) / 8) + (1 << 20)
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
        if compression in _DEFLATE and count * _MOST_DEFLATED <= max(most, _HARMLESS):
            continue
        handle.seek(offset)
        if _inflates_beyond(handle, count, most, compression):
            kind = "tiles" if page.is_tiled else "strips"
            raise ValueError(f"one of its {kind} inflates to more than {most} bytes, twice what its pixels need")


def _inflates_beyond(handle: BinaryIO, count: int, most: int, compression: int) -> bool:
    """Whether the next `count` bytes decompress to more than `most`, without ever holding that."""
    size, decoder = 0, _decompressor(compression)
    while count > 0:
        data = handle.read(min(count, _STEP))
        if not data:
            return False
        count -= len(data)
        while data:
            size += len(decoder.decompress(data, _STEP))
            if size > most:
                return True
            if decoder.eof:
                # Of LZMA further streams may follow; what follows on a deflated one is not looked at.
                if compression in _DEFLATE:
                    return False
                data, decoder = decoder.unused_data, _decompressor(compression)
            elif compression in _DEFLATE:
                data = decoder.unconsumed_tail
            else:
                data = b""
                while not decoder.needs_input and not decoder.eof:
                    size += len(decoder.decompress(b"", _STEP))
                    if size > most:
                        return True
                if decoder.eof:
                    data, decoder = decoder.unused_data, _decompressor(compression)
    return False


def _decompressor(compression: int) -> Any:
    return zlib.decompressobj() if compression in _DEFLATE else lzma.LZMADecompressor(memlimit=LARGEST_PIECE)


class TiffPieces:
    """The pieces of the first picture of a TIFF or BigTIFF.

    Parameters
    ----------
    page : tifffile.TiffPage
        Its first page.
    handle : BinaryIO
        The file, open as long as this is used.
    byteorder : str
        ``<`` or ``>``.

    Attributes
    ----------
    shape : (int, int)
        Height and width, as stored: before the orientation is followed.
    rows, columns : ndarray of int
        Borders of the pieces: piece (i, j) covers rows ``rows[i]`` to ``rows[i + 1]``, and columns likewise.
    tiled : bool
        Tiles, not strips.

    Raises
    ------
    NotInPiecesError
        The file can only be read whole, or its header contradicts itself or the size of the file.
    """

    def __init__(self, page: Any, handle: BinaryIO, byteorder: str) -> None:
        self.shape = (int(page.imagelength), int(page.imagewidth))
        self.tiled = bool(page.is_tiled)
        self._handle = handle
        self._reading = threading.Lock()
        self._byteorder = byteorder
        self._planes = int(page.samplesperpixel) if page.planarconfig == _SEPARATE else 1
        compression = int(page.compression)
        self._samples = int(page.samplesperpixel)
        self._check(page, compression)
        self._tags = {code: _packed(page.tags[code], byteorder) for code in _COPIED_TAGS if code in page.tags}
        height, width = self.shape
        if self.tiled:
            self._unit = (int(page.tilelength), int(page.tilewidth))
        else:
            self._unit = (int(page.rowsperstrip), width)
        bits = int(page.bitspersample)
        # Samples of one pixel in one segment of the file.
        together = int(page.samplesperpixel) if self._planes == 1 else 1
        row_bytes = (self._unit[1] * together * bits + 7) // 8
        down, across = math.ceil(height / self._unit[0]), math.ceil(width / self._unit[1])
        offsets, counts = self._segments(page, down * across * self._planes, handle)
        if not self.tiled and compression == _UNCOMPRESSED:
            tops, offsets, counts = self._split_strips(offsets, counts, row_bytes)
        else:
            if self._unit[0] * row_bytes * self._planes > LARGEST_PIECE:
                raise NotInPiecesError(
                    f"one of its {'tiles' if self.tiled else 'strips'} holds"
                    f" {self._unit[0] * row_bytes * self._planes / 1e6:.0f} megabytes"
                )
            tops = np.arange(down) * self._unit[0]
        self._tops = np.append(tops, height)
        self._offsets = offsets.reshape(self._planes, len(tops), across)
        self._counts = counts.reshape(self._planes, len(tops), across)
        # Many small tiles or strips cost more to look at than to decode: neighbours are taken together.
        unit_bytes = max(1, int(np.diff(self._tops).max())) * row_bytes * self._planes
        grouped = max(1, _PIECE_AIM // unit_bytes)
        self._grouped = (1, grouped) if self.tiled else (grouped, 1)
        self.rows = np.append(tops[:: self._grouped[0]], height)
        self.columns = np.append(np.arange(0, across, self._grouped[1]) * self._unit[1], width)

    def _check(self, page: Any, compression: int) -> None:
        if page.imagedepth != 1 or page.tiledepth != 1:
            raise NotInPiecesError("it has depth")
        if compression not in _COMPRESSIONS:
            raise NotInPiecesError(f"its compression {compression} is not known by piece")
        if not isinstance(page.bitspersample, int) or not 1 <= page.bitspersample <= 16:
            raise NotInPiecesError(f"its samples have {page.bitspersample} bits")
        if page.sampleformat != 1:
            raise NotInPiecesError("its samples are stretched from the smallest to the largest of all")
        if page.photometric == _YCBCR and compression != _JPEG:
            raise NotInPiecesError("its colours are packed in groups of pixels")
        if getattr(page, "jpegheader", None) is not None:
            raise NotInPiecesError("its pieces share one header")

    def _segments(self, page: Any, wanted: int, handle: BinaryIO) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        offsets = np.asarray(page.dataoffsets, dtype=np.int64)
        counts = np.asarray(page.databytecounts, dtype=np.int64)
        if len(offsets) != wanted or len(counts) != wanted:
            raise NotInPiecesError(f"it needs {wanted} tiles or strips, its header lists {len(offsets)}")
        size = os.fstat(handle.fileno()).st_size
        ends = np.where(self._missing(offsets, counts), 0, offsets + counts)
        if (offsets < 0).any() or (counts < 0).any() or (ends < 0).any() or (ends > size).any():
            raise NotInPiecesError(
                f"the file ends after {size} bytes, its pixels should reach to byte {int(ends.max())}"
            )
        return offsets, counts

    @staticmethod
    def _missing(offsets: npt.NDArray[Any], counts: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        return (offsets == 0) | (counts == 0)

    def _split_strips(
        self, offsets: npt.NDArray[Any], counts: npt.NDArray[Any], row_bytes: int
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        """Cut uncompressed strips, of which a file may have a single one, into strips of a handy size."""
        height, strip = self.shape[0], self._unit[0]
        rows = max(1, min(strip, _PIECE_AIM // (row_bytes * self._planes)))
        # Heights are only what the header says, and an array of all rows of 2^31 takes 16 GB.
        if math.ceil(height / strip) * math.ceil(min(strip, height) / rows) > _MOST_PARTS:
            raise NotInPiecesError(f"its {height} rows make more than {_MOST_PARTS} pieces")
        tops = np.concatenate([np.arange(top, min(top + strip, height), rows) for top in range(0, height, strip)])
        bottoms = np.append(tops[1:], height)
        owner, inside = tops // strip, (tops % strip) * row_bytes
        size = (bottoms - tops) * row_bytes
        offsets, counts = offsets.reshape(self._planes, -1), counts.reshape(self._planes, -1)
        present = ~self._missing(offsets, counts)
        short = present[:, owner] & (counts[:, owner] < inside + size)
        if short.any():
            raise NotInPiecesError("its strips hold fewer bytes than its pixels need")
        self._unit = (rows, self._unit[1])
        return (
            tops,
            np.where(present[:, owner], offsets[:, owner] + inside, 0),
            np.where(present[:, owner], size, 0),
        )

    @property
    def closed(self) -> bool:
        """Whether the file was closed."""
        return self._handle.closed

    def parts(self, row: int, column: int) -> Iterator[Part]:
        """Read piece (row, column): in one part, or in several where the file has nothing for some of it."""
        first = row * self._grouped[0], column * self._grouped[1]
        last = tuple(
            min(begin + step, size)
            for begin, step, size in zip(first, self._grouped, self._offsets.shape[1:], strict=True)
        )
        whole = (slice(first[0], last[0]), slice(first[1], last[1]))
        missing = self._missing(self._offsets[:, *whole], self._counts[:, *whole])
        if not missing.any():
            yield self._part(whole, present=True)
            return
        for i in range(first[0], last[0]):
            for j in range(first[1], last[1]):
                one = (slice(i, i + 1), slice(j, j + 1))
                lost = self._missing(self._offsets[:, *one], self._counts[:, *one])
                yield self._part(one, present=not lost.any())

    def _part(self, index: tuple[slice, slice], *, present: bool) -> Part:
        top, bottom = int(self._tops[index[0].start]), int(self._tops[index[0].stop])
        left, right = index[1].start * self._unit[1], min(index[1].stop * self._unit[1], self.shape[1])
        if not present:
            return Part(top, left, bottom, right, None)
        segments = []
        for offset, count in zip(
            self._offsets[:, *index].ravel().tolist(), self._counts[:, *index].ravel().tolist(), strict=True
        ):
            with self._reading:
                self._handle.seek(offset)
                segments.append(self._handle.read(count))
        if self.tiled:
            columns = index[1].stop - index[1].start
            content = self._encode(self._unit[0], columns * self._unit[1], segments, self._tags)
        else:
            content = self._encode(bottom - top, right - left, segments, self._tags)
        return Part(top, left, bottom, right, content)

    def nothing(self) -> bytes:
        """Encode one pixel, as a TIFF, whose samples are all 0: what stands where the file holds nothing."""
        tags = dict(self._tags)
        tags[259] = (3, 1, struct.pack(f"{self._byteorder}H", _UNCOMPRESSED))
        tags.pop(317, None)
        tags.pop(347, None)
        if 262 in tags and struct.unpack(f"{self._byteorder}H", tags[262][2][:2])[0] == _YCBCR:
            tags[262] = (3, 1, struct.pack(f"{self._byteorder}H", _RGB))
            tags.pop(530, None)
        segments = [bytes(2 * self._samples)] * self._planes
        return self._encode(1, 1, segments, tags, strips=True)

    def _encode(
        self,
        height: int,
        width: int,
        segments: list[bytes],
        copied: dict[int, tuple[int, int, bytes]],
        *,
        strips: bool = False,
    ) -> bytes:
        order = self._byteorder

        def longs(*values: int) -> tuple[int, int, bytes]:
            return 4, len(values), struct.pack(f"{order}{len(values)}I", *values)

        tags = dict(copied)
        tags[256], tags[257] = longs(width), longs(height)
        if self.tiled and not strips:
            places = _TILE_TAGS
            tags[322], tags[323] = longs(self._unit[1]), longs(self._unit[0])
        else:
            places = _STRIP_TAGS
            tags[278] = longs(min(self._unit[0], height))
        tags[places[1]] = longs(*(len(segment) for segment in segments))
        tags[places[0]] = longs(*(0 for _ in segments))
        directory = 2 + 12 * len(tags) + 4
        position = 8 + directory
        places_of = {}
        for code, (_, _, value) in tags.items():
            if len(value) > 4:
                places_of[code] = position
                position += len(value) + len(value) % 2
        starts = position + np.concatenate([[0], np.cumsum([len(segment) for segment in segments])[:-1]])
        tags[places[0]] = longs(*starts.tolist())
        mark = b"II*\x00" if order == "<" else b"MM\x00*"
        parts = [mark, struct.pack(f"{order}IH", 8, len(tags))]
        extra = []
        for code in sorted(tags):
            kind, count, value = tags[code]
            parts.append(struct.pack(f"{order}HHI", code, kind, count))
            if code in places_of:
                parts.append(struct.pack(f"{order}I", places_of[code]))
            else:
                parts.append(value.ljust(4, b"\x00"))
        parts.append(bytes(4))
        for code in places_of:  # in the order in which their places were given out
            value = tags[code][2]
            extra.append(value + bytes(len(value) % 2))
        return b"".join([*parts, *extra, *segments])


def _packed(tag: Any, byteorder: str) -> tuple[int, int, bytes]:
    """Type, count and bytes of a tag, as a classic TIFF stores them."""
    kind, value = int(tag.dtype), tag.value
    if kind in _BYTES:
        content = value.encode("latin-1") if isinstance(value, str) else bytes(value)
        return kind, len(content), content
    if kind in (16, 18):
        kind = 4
    if kind not in _FORMATS:
        raise NotInPiecesError(f"its tag {int(tag.code)} has the type {kind}")
    values = np.atleast_1d(np.asarray(value)).ravel().tolist()
    content = struct.pack(f"{byteorder}{len(values)}{_FORMATS[kind]}", *values)
    return kind, len(values) // 2 if kind in (5, 10) else len(values), content
