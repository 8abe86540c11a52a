"""Any image file as pixels: one reader, and the checks every array goes through.

The reader speaks through Pillow and tifffile and hides what file formats do to pixels: rotation flags, palettes,
transparency, CMYK, one bit or sixteen bits a sample, several frames. What is too large to be held as an array is read
by window.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import io
import logging
import os
import re
import stat
import struct
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from sparsespec._jpeg import check_jpeg
from sparsespec._threads import available_cpus
from sparsespec._tiff_pages import EndlessPagesError, at_page, in_memory, number_of_pages

if TYPE_CHECKING:
    from PIL import Image as PillowModule

    from sparsespec._tiff import TiffPieces

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "IMAGE_SUFFIXES",
    "LARGE_IMAGE",
    "WINDOWED_FACTOR",
    "ImageReadError",
    "PixelSource",
    "as_pixels",
    "count_pages",
    "open_image",
    "read_image",
    "tile_windows",
    "to_rgb_float",
    "to_unit",
]

DEFAULT_MAX_PIXELS = 250_000_000
"""Largest picture that is decoded whole unless told otherwise: 750 MB of 8-bit RGB."""

WINDOWED_FACTOR = 80
"""A TIFF that is read by window may have this many times the pixels: 20 gigapixels unless told otherwise."""

LARGE_IMAGE = 100_000_000
"""Pixels from which on a picture isn't turned into an array: it is read by window for as long as it is needed."""

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg",
    ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
})
# fmt: on
"""File name endings (lower case) that count as images when a folder is searched."""

_ORIENTATION_TAG = 274
_PIXEL_TAGS = (
    "ImageWidth", "ImageLength", "BitsPerSample", "Orientation", "SamplesPerPixel", "PhotometricInterpretation",
    "PlanarConfiguration", "ExtraSamples",
)  # fmt: skip
_TIFF_SIGNATURES = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
# Pillow would start Ghostscript, another program, on a file that merely begins like this.
_POSTSCRIPT_SIGNATURES = (b"%!PS", b"\xc5\xd0\xd3\xc6")
_GIF_SIGNATURE = b"GIF8"
_JPEG_SIGNATURE = b"\xff\xd8"
# Everything else that Pillow knows is no photograph: metafiles, icons, films, formats of one program.
_FORMATS = (
    "JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "PPM", "WEBP", "TIFF", "AVIF", "HEIF", "JPEG2000", "TGA",
)  # fmt: skip
_PAGE_ADVICE = "get the picture itself: this may be what a server sent in its place"
_OTHER_FILES = (
    (b"<!doctype html", "it is a web page (HTML), not an image", _PAGE_ADVICE),
    (b"<html", "it is a web page (HTML), not an image", _PAGE_ADVICE),
    (b"<svg", "it is a drawing (SVG), not a photograph", "export it as PNG"),
    (b"<?xml", "it is an XML document or a drawing (SVG), not a photograph", "export it as PNG"),
    (b"{", "it is text (JSON), not an image", _PAGE_ADVICE),
    (b"%pdf", "it is a PDF, not a photograph", "export its pages as PNG or TIFF"),
    (b"pk\x03\x04", "it is a ZIP archive, not an image", "unpack it"),
    (b"\x1f\x8b", "it is compressed (gzip)", "unpack it"),
)
# What decoders raise where a value they did not look at isn't what they expect; their texts speak of Python.
_MEANINGLESS = (TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, struct.error)
# Runs of a compressed BMP can skip 255 rows at once, whatever its height.
_WIDEST_RUNS = 65_535
_ALPHA_MODES = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_COLOUR_MODES = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"})
_ROWS_AT_ONCE = 256
_BAND_BYTES = 1 << 22
# Bytes of RGB from which on a TIFF is decoded by piece.
_WHOLE_TIFF = 64_000_000
_MOST_DECODERS = 8
_SMALLEST_CACHE, _LARGEST_CACHE = 64_000_000, 256_000_000

# Pillow's size limit and Python's warning filters belong to the whole process, so that two threads that change and
# restore them must not overlap.
_PROCESS_STATE = threading.RLock()


class ImageReadError(ValueError):
    """A file that is no readable image: which one, why, and what to do about it.

    Attributes
    ----------
    path : str
        The file, as it was given.
    reason : str
        What is wrong with it.
    advice : str
        What its owner can do.
    kind : str
        For programs: "file" (there is none, or it cannot be opened or read), "not-an-image", "unsupported" (an image of
        a kind that is not read), "too-large" (more pixels than the limit), "no-such-page", "memory" or "damaged".
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, advice: str, kind: str = "damaged") -> None:
        # All are arguments of the base class, so that the error survives pickling between processes.
        super().__init__(os.fspath(path), reason, advice, kind)
        self.path = os.fspath(path)
        self.reason = reason
        self.advice = advice
        self.kind = kind

    def __str__(self) -> str:
        return f"cannot read image '{self.path}': {self.reason}; {self.advice}"


@runtime_checkable
class PixelSource(Protocol):
    """A picture that is read by window.

    Attributes
    ----------
    shape : (int, int, int)
        Height, width and 3.
    dtype : numpy.dtype
        uint8 or uint16 over the full range, or float32 in [0, 1].
    """

    @property
    def shape(self) -> tuple[int, int, int]: ...  # noqa: D102

    @property
    def dtype(self) -> np.dtype[Any]: ...  # noqa: D102

    def read(self, top: int, left: int, bottom: int, right: int) -> npt.NDArray[Any]:
        """Return rows `top` to `bottom` and columns `left` to `right`, ends exclusive, as RGB of the type `dtype`.

        The array may be a view of pixels that others use: it is not to be written to.
        """
        ...


def count_pages(path: str | os.PathLike[str]) -> int:
    """How many pictures a file holds: the pages of a TIFF or BigTIFF, and 1 for every other format.

    Only the list of the pages is read, no pixel of them. Smaller copies of other pages (pyramids, thumbnails) and masks
    that say so in their tags are no pages. Of an animation the first frame is the picture.

    Parameters
    ----------
    path : str or os.PathLike
        The file. Its content decides the format, not its name.

    Returns
    -------
    int
        At least 1, also for a file that turns out to be no image when it is opened. Where the list of the pages of a
        TIFF is damaged, those that it can reach and one more, which `open_image` reports as damaged.

    Raises
    ------
    ImageReadError
        The file is missing, unreadable or empty; or the list of its pages runs in a circle, or has more than
        `sparsespec._tiff_pages.MOST_PAGES` entries.
    """
    with _open_file(path) as handle:
        try:
            return number_of_pages(handle) if _signature(handle) in _TIFF_SIGNATURES else 1
        except EndlessPagesError as error:
            raise _endless(path, error) from error
        except OSError as error:
            raise ImageReadError(path, _os_reason(error), "check the file and the disk it is on", "file") from error


def read_image(
    path: str | os.PathLike[str], *, page: int = 0, max_pixels: int | None = DEFAULT_MAX_PIXELS
) -> npt.NDArray[Any]:
    """Read an image file as RGB.

    Parameters
    ----------
    path : str or os.PathLike
        The file. Its content decides the format, not its name.
    page : int
        Which page of a TIFF, counted from 0; see `count_pages`. Other files have only page 0.
    max_pixels : int or None
        Largest width x height to decode; the header is asked before any pixel is. None lifts the limit.

    Returns
    -------
    (H, W, 3) ndarray of uint8 or uint16
        RGB over the full range of its type, turned the way its EXIF orientation says. Grey, palette, one-bit and CMYK
        pictures are converted. Transparent pixels are laid over white. Of an animation the first frame is read.
        Grey PNGs and all TIFFs of 16 bits a sample stay uint16; a 16-bit colour
        PNG comes back as the upper 8 bits, which is what its decoder gives. Floating-point TIFFs with values in [0, 1]
        become uint16; samples with any other range (float, signed, 32-bit) are stretched from smallest to largest.

    Raises
    ------
    ImageReadError
        The file is missing, unreadable, empty, damaged, not an image, or larger than `max_pixels`; or it has no such
        page.
    """
    with _opened(path, page, max_pixels, max_pixels) as source:
        pixels = source.read(0, 0, *source.shape[:2])
        return pixels if pixels.flags.c_contiguous and pixels.flags.writeable else np.array(pixels, order="C")


@contextmanager
def open_image(
    path: str | os.PathLike[str], *, page: int = 0, max_pixels: int | None = DEFAULT_MAX_PIXELS
) -> Iterator[PixelSource]:
    """Open an image file to read it by window; for use in a ``with`` statement.

    The pixels are those of `read_image`. A TIFF or BigTIFF of more than 64 MB that is stored in tiles or strips is
    decoded where a window touches it, and a few of its pieces are kept for the next window: reading full-width bands
    from top to bottom, or tiles row by row, decodes each piece once. Every other picture is decoded when it is opened:
    up to `LARGE_IMAGE` pixels into an array, beyond that into the decoder's own memory (4 bytes for each pixel of 8-bit
    colour, 1 of grey), without a second copy.

    Parameters
    ----------
    path : str or os.PathLike
        The file. Its content decides the format, not its name.
    page : int
        Which page of a TIFF, counted from 0; see `count_pages`. Other files have only page 0.
    max_pixels : int or None
        Largest width x height to decode whole. A TIFF that is read by window may have `WINDOWED_FACTOR` times as many.
        None lifts both limits.

    Yields
    ------
    PixelSource
        It can be read until the ``with`` statement ends, by several threads.

    Raises
    ------
    ImageReadError
        As `read_image`; a piece that turns out to be damaged is reported by the window that touches it.
    """
    with _opened(path, page, max_pixels, None if max_pixels is None else max_pixels * WINDOWED_FACTOR) as source:
        yield source


def as_pixels(image: npt.ArrayLike | PixelSource, *, name: str = "image") -> PixelSource:
    """Make a source of an array; a source comes back as it is.

    Parameters
    ----------
    image : array_like or PixelSource
        What `to_rgb_float` takes: (H, W) or (H, W, 1 | 3 | 4); bool, uint8, uint16, or floating point in [0, 1].
    name : str
        What the caller calls this argument, for the messages.

    Returns
    -------
    PixelSource
        Converted window by window: the array is neither copied nor changed. bool gives uint8, and a picture with
        opacity float32, so that nothing is rounded: ``to_unit`` of a window equals the same part of ``to_rgb_float``.

    Raises
    ------
    ValueError
        As `to_rgb_float`, now and not when a window is read.
    """
    if isinstance(image, PixelSource):
        return image
    array = np.asarray(image)
    _check_array(array, name)
    return _ArrayPixels(array)


def crop(source: PixelSource, box: tuple[int, int, int, int]) -> PixelSource:
    """Part of a picture as a picture of its own, which is read when it is asked for.

    Parameters
    ----------
    source
        The picture.
    box
        Top, left, bottom and right in pixels, ends exclusive.

    Raises
    ------
    ValueError
        The box is empty or reaches beyond the picture.

    Examples
    --------
    >>> import numpy as np
    >>> part = crop(as_pixels(np.arange(12, dtype=np.uint8).reshape(3, 4)), (1, 0, 3, 2))
    >>> part.shape, part.read(0, 1, 2, 2)[:, 0, 0].tolist()
    ((2, 2, 3), [5, 9])
    """
    _check_window(source.shape, *box)
    return _CroppedPixels(source, box)


def to_unit(pixels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Bring a window of a source to float32 in [0, 1]; float32 comes back as it is."""
    if pixels.dtype == np.float32:
        return pixels
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"pixels must be uint8, uint16 or float32, got {pixels.dtype}")
    scaled = pixels.astype(np.float32)
    scaled /= np.iinfo(pixels.dtype).max
    return scaled


def to_rgb_float(image: npt.ArrayLike, *, name: str = "image") -> npt.NDArray[np.float32]:
    """Check an array that should be an image and bring it to RGB in [0, 1].

    Parameters
    ----------
    image : (H, W) or (H, W, 1 | 3 | 4) array_like
        bool, uint8, uint16, or floating point in [0, 1]. A fourth channel is opacity; the picture is laid over white.
    name : str
        What the caller calls this argument, for the messages.

    Returns
    -------
    (H, W, 3) ndarray of float32, C order
        A new array.

    Raises
    ------
    ValueError
        Wrong number of dimensions or channels, no pixels, an unsupported type, NaN, or floats outside [0, 1].
    """
    array = np.asarray(image)
    _check_array(array, name)
    return _rgb_float(array)


def tile_windows(height: int, width: int, tile: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """Cut a picture into overlapping tiles that cover it exactly.

    Parameters
    ----------
    height, width : int
        Size of the picture in pixels.
    tile : int
        Side of a tile in pixels. A picture that is shorter than this along an axis has one, shorter tile there.
    overlap : int
        Pixels that neighbouring tiles share at least; the last ones share more, since they end at the border.

    Returns
    -------
    list of (top, left, bottom, right)
        Row by row; `bottom` and `right` are exclusive.

    Raises
    ------
    ValueError
        A size below 1, or an overlap outside [0, tile).
    """
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height} and {width}")
    if tile < 1:
        raise ValueError(f"tile must be at least 1, got {tile}")
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap must be at least 0 and less than tile ({tile}), got {overlap}")
    rows = _tile_starts(height, tile, overlap)
    columns = _tile_starts(width, tile, overlap)
    return [(top, left, min(top + tile, height), min(left + tile, width)) for top in rows for left in columns]


def _tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    if length <= tile:
        return [0]
    starts = list(range(0, length - tile, tile - overlap))
    return [*starts, length - tile]


def _check_array(array: npt.NDArray[Any], name: str) -> None:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"{name} must have the shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} has no pixels: shape {array.shape}")
    if array.dtype in (np.bool_, np.uint8, np.uint16):
        return
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} must be bool, uint8, uint16 or floating point in [0, 1], got {array.dtype}")
    smallest, largest = float(array.min()), float(array.max())
    if not (np.isfinite(smallest) and np.isfinite(largest)):
        raise ValueError(f"{name} contains NaN or infinity")
    # Resampling and colour conversion overshoot by rounding errors; anything more is another scale.
    if smallest < -1e-5 or largest > 1 + 1e-5:
        raise ValueError(
            f"{name} is floating point with values from {smallest:g} to {largest:g}; they must lie in [0, 1]"
            " (divide by 255 if they came from 8-bit pixels)"
        )


def _rgb_float(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Bring an array that `_check_array` let pass, or a part of it, to (H, W, 3) in [0, 1]; always a new array."""
    scaled = array.astype(np.float32)
    if array.dtype in (np.uint8, np.uint16):
        scaled /= np.iinfo(array.dtype).max
    elif array.dtype != np.bool_:
        np.clip(scaled, 0, 1, out=scaled)
    if scaled.ndim == 2:
        scaled = scaled[:, :, None]
    if scaled.shape[2] == 4:
        opacity = scaled[:, :, 3:]
        scaled = scaled[:, :, :3] * opacity + (1 - opacity)
    elif scaled.shape[2] == 1:
        scaled = np.repeat(scaled, 3, axis=2)
    return np.ascontiguousarray(scaled)


def _check_window(shape: tuple[int, ...], top: int, left: int, bottom: int, right: int) -> None:
    if not (0 <= top < bottom <= shape[0] and 0 <= left < right <= shape[1]):
        raise ValueError(
            f"the window must lie inside the picture of {shape[0]} rows and {shape[1]} columns and not be empty, got"
            f" rows {top} to {bottom} and columns {left} to {right}"
        )


class _ArrayPixels:
    """An array as a source: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array
        self.shape = (array.shape[0], array.shape[1], 3)
        self._lossy = (array.ndim == 3 and array.shape[2] == 4) or array.dtype not in (np.bool_, np.uint8, np.uint16)
        self.dtype: np.dtype[Any] = np.dtype(np.float32)
        if not self._lossy:
            self.dtype = np.dtype(np.uint8) if array.dtype == np.bool_ else array.dtype.newbyteorder("=")

    def read(self, top: int, left: int, bottom: int, right: int) -> npt.NDArray[Any]:
        _check_window(self.shape, top, left, bottom, right)
        part = self.array[top:bottom, left:right]
        if self._lossy:
            return _rgb_float(part)
        if part.dtype == np.bool_:
            part = part.view(np.uint8) * np.uint8(255)
        part = part.astype(self.dtype, copy=False)
        if part.ndim == 2:
            part = part[:, :, None]
        return np.repeat(part, 3, axis=2) if part.shape[2] == 1 else part


class _CroppedPixels:
    """A window of another source."""

    def __init__(self, source: PixelSource, box: tuple[int, int, int, int]) -> None:
        self._source, self._top, self._left = source, box[0], box[1]
        self.shape = (box[2] - box[0], box[3] - box[1], 3)
        self.dtype = source.dtype

    def read(self, top: int, left: int, bottom: int, right: int) -> npt.NDArray[Any]:
        _check_window(self.shape, top, left, bottom, right)
        return self._source.read(self._top + top, self._left + left, self._top + bottom, self._left + right)


class _PillowPixels:
    """A picture in Pillow's memory, converted by window."""

    dtype: np.dtype[Any] = np.dtype(np.uint8)

    def __init__(self, image: PillowModule.Image, *, opacity: bool) -> None:
        self._image = image
        self._opacity = opacity
        self.shape = (image.height, image.width, 3)

    def read(self, top: int, left: int, bottom: int, right: int) -> npt.NDArray[Any]:
        _check_window(self.shape, top, left, bottom, right)
        if self._opacity:
            return _from_bands(self._image, (top, left, bottom, right), lambda part: _over_white(_array(part, "RGBA")))
        return _from_bands(self._image, (top, left, bottom, right), lambda part: _array(part, "RGB"))


class _TurnedPixels:
    """A source as its EXIF orientation wants it seen."""

    def __init__(self, source: PixelSource, orientation: int) -> None:
        self._source = source
        self._orientation = orientation
        height, width, _ = source.shape
        self.shape = (width, height, 3) if orientation >= 5 else (height, width, 3)
        self.dtype = source.dtype

    def read(self, top: int, left: int, bottom: int, right: int) -> npt.NDArray[Any]:
        _check_window(self.shape, top, left, bottom, right)
        rows, columns = (top, bottom), (left, right)
        if self._orientation >= 5:
            rows, columns = columns, rows
        height, width, _ = self._source.shape
        if self._orientation in (3, 4, 6, 7):
            rows = (height - rows[1], height - rows[0])
        if self._orientation in (2, 3, 7, 8):
            columns = (width - columns[1], width - columns[0])
        return _turned(self._source.read(rows[0], columns[0], rows[1], columns[1]), self._orientation)


class _PagePixels:
    """A page behind the first, whose errors say which it is."""

    def __init__(self, source: PixelSource, page: int) -> None:
        self._source, self._page = source, page
        self.shape, self.dtype = source.shape, source.dtype

    def read(self, top: int, left: int, bottom: int, right: int) -> npt.NDArray[Any]:
        try:
            return self._source.read(top, left, bottom, right)
        except ImageReadError as error:
            raise _on_page(error, self._page) from error


class _WindowedTiff:
    """A TIFF in pieces, of which those used last stay decoded."""

    def __init__(
        self,
        pieces: TiffPieces,
        decode: Callable[[bytes], npt.NDArray[Any]],
        path: str | os.PathLike[str],
    ) -> None:
        self._pieces = pieces
        self._decode = decode
        self._path = path
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], npt.NDArray[Any]] = OrderedDict()
        self._bytes = 0
        self.shape = (*pieces.shape, 3)
        first = self._decoded(0, 0)
        self.dtype = first.dtype
        # Bands that begin and end inside a piece need all pieces of a row twice.
        row = int(np.diff(pieces.rows).max()) * pieces.shape[1] * 3 * first.itemsize
        self._budget = min(max(_SMALLEST_CACHE, 2 * row), _LARGEST_CACHE)

    def read(self, top: int, left: int, bottom: int, right: int) -> npt.NDArray[Any]:
        _check_window(self.shape, top, left, bottom, right)
        if self._pieces.closed:
            raise ValueError(f"'{os.fspath(self._path)}' is closed: read it inside the with statement of open_image")
        result = np.empty((bottom - top, right - left, 3), self.dtype)
        rows, columns = self._pieces.rows, self._pieces.columns
        touched = [
            (i, j)
            for i in range(int(np.searchsorted(rows, top, "right")) - 1, int(np.searchsorted(rows, bottom)))
            for j in range(int(np.searchsorted(columns, left, "right")) - 1, int(np.searchsorted(columns, right)))
        ]
        with self._lock:
            for (i, j), piece in self._pieces_at(touched):
                y0, x0 = int(rows[i]), int(columns[j])
                y1, y2 = max(top, y0), min(bottom, int(rows[i + 1]))
                x1, x2 = max(left, x0), min(right, int(columns[j + 1]))
                result[y1 - top : y2 - top, x1 - left : x2 - left] = piece[y1 - y0 : y2 - y0, x1 - x0 : x2 - x0]
        return result

    def _pieces_at(self, places: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], npt.NDArray[Any]]]:
        """Give the pieces at these places, those first that are decoded already."""
        absent = []
        for place in places:
            if place in self._kept:
                self._kept.move_to_end(place)
                yield place, self._kept[place]
            else:
                absent.append(place)
        workers = min(available_cpus(), len(absent), _MOST_DECODERS)
        if workers < 2:
            for place in absent:
                with _own_process_state():
                    piece = self._decoded_or_damaged(place)
                yield place, self._keep(place, piece)
            return
        # In turns, so that pieces do not wait in memory to be copied; the decoders work outside Python's lock.
        with ThreadPoolExecutor(workers) as pool:
            for first in range(0, len(absent), 4 * workers):
                turn = absent[first : first + 4 * workers]
                with _own_process_state():
                    decoded = list(pool.map(self._decoded_or_damaged, turn))
                for place, piece in zip(turn, decoded, strict=True):
                    yield place, self._keep(place, piece)

    def _keep(self, place: tuple[int, int], piece: npt.NDArray[Any]) -> npt.NDArray[Any]:
        self._bytes += piece.nbytes
        while self._kept and self._bytes > self._budget:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept[place] = piece
        return piece

    def _decoded_or_damaged(self, place: tuple[int, int]) -> npt.NDArray[Any]:
        try:
            piece = self._decoded(*place)
            if piece.dtype != self.dtype:
                raise ValueError(f"samples of type {piece.dtype} among others of type {self.dtype}")
        except Exception as error:
            where = f"near row {int(self._pieces.rows[place[0]])}, column {int(self._pieces.columns[place[1]])}"
            raise _damaged(self._path, error, where) from error
        return piece

    def _decoded(self, i: int, j: int) -> npt.NDArray[Any]:
        rows, columns = self._pieces.rows, self._pieces.columns
        top, left = int(rows[i]), int(columns[j])
        shape = (int(rows[i + 1]) - top, int(columns[j + 1]) - left, 3)
        result: npt.NDArray[Any] | None = None
        for part in self._pieces.parts(i, j):
            height, width = part.bottom - part.top, part.right - part.left
            pixels = self._decode(self._pieces.nothing() if part.content is None else part.content)
            if part.content is None:
                pixels = np.broadcast_to(pixels[:1, :1], (height, width, 3))
            pixels = pixels[:height, :width]
            if pixels.shape != (height, width, 3):
                raise ValueError(f"{pixels.shape[1]} x {pixels.shape[0]} pixels where {width} x {height} should be")
            if (height, width) == shape[:2]:
                return np.ascontiguousarray(pixels)
            if result is None:
                result = np.empty(shape, pixels.dtype)
            result[part.top - top : part.bottom - top, part.left - left : part.right - left] = pixels
        assert result is not None
        return result


def _check_file(path: str | os.PathLike[str]) -> None:
    try:
        status = Path(path).stat()
    except OSError as error:
        raise ImageReadError(path, _os_reason(error), "check the path and its permissions", "file") from error
    except ValueError as error:  # a null byte in the name
        raise ImageReadError(path, str(error), "check the path", "file") from error
    if stat.S_ISDIR(status.st_mode):
        raise ImageReadError(path, "it is a folder", "give the path of one image file", "file")
    if not stat.S_ISREG(status.st_mode):
        raise _not_regular(path)
    if status.st_size == 0:
        raise ImageReadError(path, "it is empty (zero bytes)", "copy or export it again")


def _not_regular(path: str | os.PathLike[str]) -> ImageReadError:
    return ImageReadError(path, "it is not a regular file", "give the path of an image file", "file")


def _os_reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, PermissionError):
        return "permission denied"
    return error.strerror or str(error)


def _damaged(path: str | os.PathLike[str], error: Exception, where: str = "") -> ImageReadError:
    # An invalid argument is a place in the file that cannot be, out of a damaged header.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return ImageReadError(path, _os_reason(error), "check the file and the disk it is on", "file")
    if isinstance(error, MemoryError):
        return ImageReadError(
            path,
            f"decoding it{' ' + where if where else ''} takes more memory than there is, or its header is damaged",
            "check it with another program; give the process more memory or make the picture smaller",
            "memory",
        )
    if type(error).__name__ in ("DecompressionBombError", "DecompressionBombWarning"):
        return ImageReadError(
            path,
            "what it unpacks to has more pixels than the limit, and than it says",
            "make it smaller, or a PNG",
            "too-large",
        )
    detail = " ".join(str(error).split())
    if isinstance(error, _MEANINGLESS) or not detail:
        detail = "its header contradicts itself"
    elif re.fullmatch(r"decoder error -\d+", detail):
        detail = "its pixels cannot be decoded"
    place = f" {where}" if where else ""
    return ImageReadError(path, f"it is damaged or cut short{place} ({detail})", "copy or export it again")


def _unknown_format(path: str | os.PathLike[str], head: bytes) -> ImageReadError:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for mark, reason, advice in _OTHER_FILES:
        if text.startswith(mark):
            return ImageReadError(path, reason, advice, "not-an-image")
    if Path(path).suffix.lower() in (".heic", ".heif"):
        reason, advice = "HEIC needs a decoder that is not installed", "install pillow-heif or convert it"
        return ImageReadError(path, reason, advice, "unsupported")
    return ImageReadError(
        path,
        "it is not an image that can be read, or its beginning is damaged",
        "check that it is an image, or convert it to PNG or JPEG",
        "not-an-image",
    )


def _on_page(error: ImageReadError, page: int) -> ImageReadError:
    return ImageReadError(error.path, f"page {page} (counted from 0): {error.reason}", error.advice, error.kind)


def _check_size(
    path: str | os.PathLike[str], width: int, height: int, max_pixels: int | None, why_whole: str = ""
) -> None:
    if max_pixels is None or width * height <= max_pixels:
        return
    whole = f" for a picture that cannot be read piece by piece: {why_whole}" if why_whole else ""
    raise ImageReadError(
        path,
        f"it has {width} x {height} = {width * height / 1e6:.1f} megapixels, more than the limit of"
        f" {max_pixels / 1e6:g} megapixels{whole}",
        "make it smaller, save it as a tiled TIFF, which is read piece by piece, or raise the limit with max_pixels=..."
        " (sparsespec run --max-megapixels)",
        "too-large",
    )


@contextmanager
def _opened(
    path: str | os.PathLike[str], page: int, max_pixels: int | None, max_windowed: int | None
) -> Iterator[PixelSource]:
    """Open any file; the two limits are for pictures that are decoded whole and by piece."""
    if max_pixels is not None and max_pixels < 1:
        raise ValueError(f"max_pixels must be at least 1 or None, got {max_pixels}")
    if page < 0:
        raise ValueError(f"page must be at least 0, got {page}")
    with _open_file(path) as handle, ExitStack() as views:
        try:
            source = _decoded_file(handle, path, page, max_pixels, max_windowed, views)
        except ImageReadError as error:
            if page == 0:
                raise
            raise _on_page(error, page) from error
        yield source if page == 0 or isinstance(source, _ArrayPixels) else _PagePixels(source, page)


def _decoded_file(
    handle: BinaryIO,
    path: str | os.PathLike[str],
    page: int,
    max_pixels: int | None,
    max_windowed: int | None,
    views: ExitStack,
) -> PixelSource:
    try:
        signature = _signature(handle)
        if signature in _POSTSCRIPT_SIGNATURES:
            raise ImageReadError(path, "it is PostScript, not a photograph", "export it as PNG or JPEG", "not-an-image")
        with _own_process_state():
            if signature in _TIFF_SIGNATURES:
                view = _tiff_page(handle, path, page)
                if view is not handle:
                    views.enter_context(view)
                return _open_tiff(view, path, max_pixels, max_windowed)
            if page > 0:
                raise _no_such_page(path, 1)
            return _open_with_pillow(handle, path, max_pixels)
    except ImageReadError:
        raise
    except Exception as error:
        # Decoders raise nearly anything on damaged input: SyntaxError, struct.error, EOFError, zlib.error, IndexError,
        # and MemoryError where a damaged number asks for terabytes.
        raise _damaged(path, error) from error


def _signature(handle: BinaryIO) -> bytes:
    signature = handle.read(4)
    handle.seek(0)
    return signature


def _tiff_page(handle: BinaryIO, path: str | os.PathLike[str], page: int) -> BinaryIO:
    try:
        return at_page(handle, page)
    except IndexError as error:
        raise _no_such_page(path, error.args[0]) from error
    except EndlessPagesError as error:
        raise _endless(path, error) from error


def _no_such_page(path: str | os.PathLike[str], count: int) -> ImageReadError:
    reason = f"the file has {count} page{'s' * (count != 1)}"
    return ImageReadError(path, reason, "ask for one of them, from 0 on", "no-such-page")


def _endless(path: str | os.PathLike[str], error: EndlessPagesError) -> ImageReadError:
    return ImageReadError(path, str(error), "export it again, in several files if there are so many pages")


def _open_file(path: str | os.PathLike[str]) -> BinaryIO:
    _check_file(path)
    try:
        handle = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    except OSError as error:
        raise ImageReadError(path, _os_reason(error), "check the file and the disk it is on", "file") from error
    if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        handle.close()
        raise _not_regular(path)
    return handle


def _without_waiting(path: str, flags: int) -> int:
    # Between a look at a path and its opening it may have become a pipe, which would be waited for.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@contextmanager
def _own_process_state() -> Iterator[None]:
    """Silence the decoders, and take Pillow's own size limit away: ours replaces it."""
    from PIL import Image

    for name in ("PIL", "tifffile"):
        # Python prints records of a logger without any handler to stderr; what matters in them comes back as an
        # exception.
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
    with _PROCESS_STATE, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        set_handler = _libtiff_error_handler()
        handler = set_handler(None)
        try:
            yield
        finally:
            set_handler(handler)
            Image.MAX_IMAGE_PIXELS = limit


@cache
def _libtiff_error_handler() -> Callable[[Any], Any]:
    """Replace the function by which libtiff writes to stderr what comes back as an exception as well."""
    from PIL import Image

    try:
        function = ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler
    except (AttributeError, OSError, TypeError):  # linked into the module, without a name
        return lambda handler: handler
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_void_p]
    return function


@cache
def _formats() -> tuple[str, ...]:
    """Those of our formats that Pillow can read here."""
    from PIL import Image

    try:
        pillow_heif = importlib.import_module("pillow_heif")
    except ImportError:
        pass
    else:
        for name in ("register_heif_opener", "register_avif_opener"):
            getattr(pillow_heif, name, lambda: None)()
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open_with_pillow(
    handle: BinaryIO, path: str | os.PathLike[str], max_pixels: int | None, formats: tuple[str, ...] | None = None
) -> PixelSource:
    """Decode a whole picture; for `_own_process_state`."""
    from PIL import Image, UnidentifiedImageError

    handle.seek(0)
    head = handle.read(64)
    if head.startswith(_JPEG_SIGNATURE):
        try:
            check_jpeg(handle)
        except ValueError as error:
            raise ImageReadError(path, str(error), "save it again with another program") from error
    if head.startswith(_GIF_SIGNATURE) and len(head) >= 10:
        # Its decoder makes room for a frame when it is opened.
        width, height = struct.unpack_from("<HH", head, 6)
        _check_size(path, width, height, max_pixels)
        Image.MAX_IMAGE_PIXELS = max_pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
    handle.seek(0)
    try:
        image: PillowModule.Image = Image.open(handle, formats=_formats() if formats is None else formats)
    except UnidentifiedImageError as error:
        raise _unknown_format(path, head) from error
    _check_size(path, image.width, image.height, max_pixels)
    if 0 in image.size:
        raise _no_pixels(path, image.height, image.width)
    if image.format in ("BMP", "DIB") and image.info.get("compression") in (1, 2) and image.width > _WIDEST_RUNS:
        raise ImageReadError(
            path, f"a run-length coded BMP {image.width} pixels wide is not read", "save it as PNG", "unsupported"
        )
    # A header can understate what its body unpacks to (GIF frames, icons): Pillow checks those while decoding.
    Image.MAX_IMAGE_PIXELS = max_pixels
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    image.load()
    # Asked after decoding: for some formats Pillow has turned the pixels by now and dropped the flag.
    orientation = image.getexif().get(_ORIENTATION_TAG)
    source: PixelSource
    if image.mode in _ALPHA_MODES or (image.mode in _COLOUR_MODES and "transparency" in image.info):
        source = _PillowPixels(image, opacity=True)
    elif image.mode in _COLOUR_MODES:
        source = _PillowPixels(image, opacity=False)
    else:
        # Pillow before 10.1 and from 10.1 on: 16-bit grey PNGs as 32 bits.
        mode = "I;16" if image.format == "PNG" and image.mode == "I" else image.mode
        values = _from_bands(image, (0, 0, image.height, image.width), lambda part: _array(part, mode))
        source = _ArrayPixels(_only_grey(_full_range(values, path), path))
    if isinstance(source, _PillowPixels) and image.height * image.width < LARGE_IMAGE:
        source = _ArrayPixels(source.read(0, 0, image.height, image.width))
    return _upright(source, orientation)


def _open_tiff(
    handle: BinaryIO, path: str | os.PathLike[str], max_pixels: int | None, max_windowed: int | None
) -> PixelSource:
    # Pillow knows more compressions and colour spaces, tifffile keeps 16 bits, 32 bits and floating point apart.
    import tifffile

    from sparsespec._tiff import NotInPiecesError, TiffPieces, check_pieces

    with tifffile.TiffFile(handle) as file:
        page: Any = file.pages.first
        byteorder = file.byteorder
        tags = _tags(page)
        width, height = int(tags["ImageWidth"]), int(tags["ImageLength"])
        if width < 1 or height < 1:
            raise _no_pixels(path, height, width)
        deep = int(np.max(tags.get("BitsPerSample", 1))) > 8
        orientation = tags.get("Orientation")
        check_pieces(page)
        why_whole = ""
        # Pillow does not know BigTIFFs of that byte order, but it does know their pieces.
        if height * width * (6 if deep else 3) > _WHOLE_TIFF or (file.is_bigtiff and byteorder == ">"):
            try:
                pieces = TiffPieces(page, handle, byteorder)
                sideways = orientation in (5, 6, 7, 8) and not pieces.tiled
                if sideways and (max_pixels is None or height * width <= max_pixels):
                    raise NotInPiecesError("it lies on its side, and its strips go the other way")
                _check_size(path, width, height, max_windowed)
                source = _WindowedTiff(pieces, lambda content: _decoded_piece(content, path, deep=deep), path)
                return _upright(source, orientation)
            except (ImageReadError, MemoryError):
                raise
            except Exception as error:
                why_whole = " ".join(str(error).split()) or type(error).__name__
        _check_size(path, width, height, max_pixels, why_whole)
        samples = int(tags.get("SamplesPerPixel", 1))
        if samples > 4 and max_pixels is not None and height * width * samples > 4 * max_pixels:
            raise ImageReadError(
                path,
                f"it has {samples} samples for each of its {width} x {height} pixels, more than"
                f" {4 * max_pixels / 1e6:g} million together",
                "export it as RGB",
                "too-large",
            )
        if deep or samples > 4:
            whole = _read_deep(page, handle, path)
            if whole is not None:
                return _upright(_ArrayPixels(whole), orientation)
    try:
        return _open_with_pillow(handle, path, max_pixels, ("TIFF",))
    except ImageReadError:
        raise
    except Exception:
        copy = in_memory(handle)
        if copy is None:
            raise
    return _open_with_pillow(copy, path, max_pixels, ("TIFF",))


def _tags(page: Any) -> dict[str, Any]:
    """Values of the tags that say what the pixels are; the others may be of any size."""
    return {name: page.tags[name].value for name in _PIXEL_TAGS if name in page.tags}


def _read_deep(page: Any, handle: BinaryIO, path: str | os.PathLike[str]) -> npt.NDArray[Any] | None:
    """Decode a page of a TIFF with tifffile, upright or not; None where it cannot."""
    from sparsespec._tiff import check_inflated

    check_inflated(page, handle)
    try:
        pixels = page.asarray()
    except MemoryError:
        raise
    except Exception:
        # A compression that needs another package: Pillow may have it, and says so if the file is damaged.
        return None
    if pixels.size == 0:  # what contradicts itself, tifffile takes for empty
        return None
    return _tiff_to_rgb(pixels, _tags(page), path)


def _decoded_piece(content: bytes, path: str | os.PathLike[str], *, deep: bool) -> npt.NDArray[Any]:
    """Decode a small TIFF by the rules for whole ones, for `_own_process_state`; nothing in it says it was turned."""
    source: PixelSource | None = None
    handle = io.BytesIO(content)
    if deep:
        import tifffile

        with tifffile.TiffFile(handle) as file:
            page: Any = file.pages.first
            whole = _read_deep(page, handle, path)
        source = None if whole is None else _ArrayPixels(whole)
    if source is None:
        source = _open_with_pillow(handle, path, None, ("TIFF",))
    return source.read(0, 0, *source.shape[:2])


def _upright(source: PixelSource, orientation: Any) -> PixelSource:
    """Undo the orientation: at once where the pixels lie in an array, else window by window."""
    # Some software writes other numbers; they mean nothing.
    if not isinstance(orientation, int) or not 2 <= orientation <= 8:
        return source
    if isinstance(source, _ArrayPixels):
        return _ArrayPixels(_turned(source.array, orientation))
    return _TurnedPixels(source, orientation)


def _array(image: PillowModule.Image, mode: str) -> npt.NDArray[Any]:
    return np.asarray(image if image.mode == mode else image.convert(mode))


def _from_bands(
    image: PillowModule.Image,
    window: tuple[int, int, int, int],
    convert: Callable[[PillowModule.Image], npt.NDArray[Any]],
) -> npt.NDArray[Any]:
    """Turn a window of a decoded picture into an array, some rows at a time: Pillow copies twice on the way."""
    top, left, bottom, right = window
    rows = max(1, _BAND_BYTES // (4 * (right - left)))
    result: npt.NDArray[Any] | None = None
    for start in range(top, bottom, rows):
        stop = min(start + rows, bottom)
        whole = (left, start, right, stop) == (0, 0, *image.size)
        part = convert(image if whole else image.crop((left, start, right, stop)))
        if result is None:
            result = np.empty((bottom - top, *part.shape[1:]), part.dtype)
        result[start - top : stop - top] = part
    assert result is not None
    return result


def _no_pixels(path: str | os.PathLike[str], height: int, width: int) -> ImageReadError:
    return ImageReadError(path, f"it has no pixels ({width} x {height})", "export it again")


def _tiff_to_rgb(pixels: npt.NDArray[Any], tags: dict[str, Any], path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """Bring what tifffile gives to (H, W, 3), or (H, W) where it is grey, of uint8 or uint16."""
    white_is_zero, rgb, palette, separated = 0, 2, 3, 5
    photometric = int(tags.get("PhotometricInterpretation", 1))
    samples = int(tags.get("SamplesPerPixel", 1))
    if samples > 1 and pixels.ndim == 3 and pixels.shape[0] == samples and int(tags.get("PlanarConfiguration", 1)) == 2:
        pixels = np.moveaxis(pixels, 0, -1)
    pixels = _full_range(pixels, path)
    if pixels.ndim == 2 and photometric != palette:
        return np.iinfo(pixels.dtype).max - pixels if photometric == white_is_zero else pixels
    if pixels.ndim == 3 and samples == 2:
        grey = pixels[:, :, :1]
        return _over_white(np.concatenate([grey, grey, grey, pixels[:, :, 1:]], axis=2))
    if pixels.ndim == 3 and samples == 4 and photometric == separated:
        ink = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
        light = (1 - ink[:, :, :3]) * (1 - ink[:, :, 3:])
        return np.rint(light * np.iinfo(pixels.dtype).max).astype(pixels.dtype)
    if pixels.ndim == 3 and (samples in (3, 4) or (samples > 4 and photometric == rgb)):
        extra = np.atleast_1d(np.asarray(tags.get("ExtraSamples", ()), dtype=object)).ravel()
        # 1 and 2 say opacity; 0 (unspecified) is some other measurement, for example infrared.
        if samples == 4 and extra.size and int(extra[0]) in (1, 2):
            return _over_white(pixels)
        return np.ascontiguousarray(pixels[:, :, :3])
    raise ImageReadError(
        path,
        f"a TIFF with {samples} samples a pixel and shape {pixels.shape} is not a picture",
        "export it as RGB",
        "unsupported",
    )


def _full_range(pixels: npt.NDArray[Any], path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """Bring samples of any type to uint8 or uint16 over the full range."""
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    native = pixels.dtype.newbyteorder("=")
    if native in (np.uint8, np.uint16):
        return pixels.astype(native, copy=False)
    if not np.issubdtype(native, np.floating) and not np.issubdtype(native, np.integer):
        reason = f"samples of type {pixels.dtype} are not supported"
        raise ImageReadError(path, reason, "export it as 8 or 16 bits", "unsupported")
    values = pixels.astype(np.float64)
    smallest, largest = float(values.min()), float(values.max())
    if not (np.isfinite(smallest) and np.isfinite(largest)):
        reason = "it contains NaN or infinite samples"
        raise ImageReadError(path, reason, "replace them and export it again", "unsupported")
    if not (np.issubdtype(native, np.floating) and smallest >= 0 and largest <= 1):
        spread = largest - smallest
        values = (values - smallest) / spread if spread > 0 else np.zeros_like(values)
    return np.rint(values * 65535).astype(np.uint16)


def _only_grey(pixels: npt.NDArray[Any], path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    if pixels.ndim != 2:
        raise ImageReadError(path, f"its colour space gives shape {pixels.shape}", "convert it to RGB", "unsupported")
    return pixels


def _over_white(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(H, W, 4) with straight opacity laid over white, in whole numbers and a few rows at a time."""
    white = int(np.iinfo(pixels.dtype).max)
    wide: Any = np.uint32 if pixels.dtype == np.uint8 else np.uint64
    result = np.empty((*pixels.shape[:2], 3), pixels.dtype)
    for top in range(0, len(pixels), _ROWS_AT_ONCE):
        part = pixels[top : top + _ROWS_AT_ONCE].astype(wide)
        opacity = part[:, :, 3:]
        mixed: Any = part[:, :, :3] * opacity + white * (white - opacity) + white // 2
        result[top : top + _ROWS_AT_ONCE] = mixed // white
    return result


def _turned(pixels: npt.NDArray[Any], orientation: Any) -> npt.NDArray[Any]:
    """Undo the eight EXIF orientations; anything else, which some software writes, means upright."""
    if orientation == 2:
        pixels = pixels[:, ::-1]
    elif orientation == 3:
        pixels = pixels[::-1, ::-1]
    elif orientation == 4:
        pixels = pixels[::-1]
    elif orientation == 5:
        pixels = pixels.swapaxes(0, 1)
    elif orientation == 6:
        pixels = np.rot90(pixels, k=-1)
    elif orientation == 7:
        pixels = pixels[::-1, ::-1].swapaxes(0, 1)
    elif orientation == 8:
        pixels = np.rot90(pixels, k=1)
    return np.ascontiguousarray(pixels)
