"""Any image file as a plain array: one reader, and the checks every array goes through.

The reader speaks through imageio's ``pillow`` and ``tifffile`` plugins and hides what file formats do to pixels:
rotation flags, palettes, transparency, CMYK, one bit or sixteen bits a sample, several frames.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

__all__ = ["DEFAULT_MAX_PIXELS", "IMAGE_SUFFIXES", "ImageReadError", "read_image", "tile_windows", "to_rgb_float"]

DEFAULT_MAX_PIXELS = 250_000_000
"""Largest picture `read_image` decodes unless told otherwise: 750 MB of 8-bit RGB."""

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg",
    ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
})
# fmt: on
"""File name endings (lower case) that count as images when a folder is searched."""

_TIFF_SIGNATURES = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
# Pillow would start Ghostscript, another program, on a file that merely begins like this.
_POSTSCRIPT_SIGNATURES = (b"%!PS", b"\xc5\xd0\xd3\xc6")
_ALPHA_MODES = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_COLOUR_MODES = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"})
_ROWS_AT_ONCE = 256

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
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, advice: str) -> None:
        # All three are arguments of the base class, so that the error survives pickling between processes.
        super().__init__(os.fspath(path), reason, advice)
        self.path = os.fspath(path)
        self.reason = reason
        self.advice = advice

    def __str__(self) -> str:
        return f"cannot read image '{self.path}': {self.reason}; {self.advice}"


def read_image(path: str | os.PathLike[str], *, max_pixels: int | None = DEFAULT_MAX_PIXELS) -> npt.NDArray[Any]:
    """Read an image file as RGB.

    Parameters
    ----------
    path : str or os.PathLike
        The file. Its content decides the format, not its name.
    max_pixels : int or None
        Largest width x height to decode; the header is asked before any pixel is. None lifts the limit.

    Returns
    -------
    (H, W, 3) ndarray of uint8 or uint16
        RGB over the full range of its type, turned the way its EXIF orientation says. Grey, palette, one-bit and CMYK
        pictures are converted. Transparent pixels are laid over white. Of an animation the first frame is read, of a
        TIFF with several pages the first page. Grey PNGs and all TIFFs of 16 bits a sample stay uint16; a 16-bit colour
        PNG comes back as the upper 8 bits, which is what its decoder gives. Floating-point TIFFs with values in [0, 1]
        become uint16; samples with any other range (float, signed, 32-bit) are stretched from smallest to largest.

    Raises
    ------
    ImageReadError
        The file is missing, unreadable, empty, damaged, not an image, or larger than `max_pixels`.
    """
    if max_pixels is not None and max_pixels < 1:
        raise ValueError(f"max_pixels must be at least 1 or None, got {max_pixels}")
    file = Path(path)
    _check_file(file, path)
    try:
        with file.open("rb") as handle:
            signature = handle.read(4)
            handle.seek(0)
            if signature in _POSTSCRIPT_SIGNATURES:
                raise ImageReadError(path, "it is PostScript, not a photograph", "export it as PNG or JPEG")
            with _own_process_state():
                if signature in _TIFF_SIGNATURES:
                    pixels = _read_tiff(handle, path, max_pixels)
                else:
                    pixels = _read_with_pillow(handle, path, max_pixels)
    except (ImageReadError, MemoryError):
        raise
    except OSError as error:
        if error.errno is not None:
            raise ImageReadError(path, _os_reason(error), "check the file and the disk it is on") from error
        raise _damaged(path, error) from error
    except Exception as error:
        # Decoders raise nearly anything on damaged input: SyntaxError, struct.error, EOFError, zlib.error, IndexError.
        raise _damaged(path, error) from error
    if pixels.size == 0:
        raise ImageReadError(path, f"it has no pixels (shape {pixels.shape})", "export it again")
    return pixels


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
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"{name} must have the shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} has no pixels: shape {array.shape}")
    if array.dtype == np.bool_:
        scaled = array.astype(np.float32)
    elif array.dtype in (np.uint8, np.uint16):
        scaled = array.astype(np.float32)
        scaled /= np.iinfo(array.dtype).max
    elif np.issubdtype(array.dtype, np.floating):
        scaled = _checked_float(array, name)
    else:
        raise ValueError(f"{name} must be bool, uint8, uint16 or floating point in [0, 1], got {array.dtype}")
    if scaled.ndim == 2:
        scaled = scaled[:, :, None]
    if scaled.shape[2] == 4:
        opacity = scaled[:, :, 3:]
        scaled = scaled[:, :, :3] * opacity + (1 - opacity)
    elif scaled.shape[2] == 1:
        scaled = np.repeat(scaled, 3, axis=2)
    return np.ascontiguousarray(scaled)


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


def _checked_float(array: npt.NDArray[Any], name: str) -> npt.NDArray[np.float32]:
    smallest, largest = float(array.min()), float(array.max())
    if not (np.isfinite(smallest) and np.isfinite(largest)):
        raise ValueError(f"{name} contains NaN or infinity")
    # Resampling and colour conversion overshoot by rounding errors; anything more is another scale.
    if smallest < -1e-5 or largest > 1 + 1e-5:
        raise ValueError(
            f"{name} is floating point with values from {smallest:g} to {largest:g}; they must lie in [0, 1]"
            " (divide by 255 if they came from 8-bit pixels)"
        )
    return np.clip(array.astype(np.float32), 0, 1)


def _check_file(file: Path, given: str | os.PathLike[str]) -> None:
    try:
        status = file.stat()
    except OSError as error:
        raise ImageReadError(given, _os_reason(error), "check the path and its permissions") from error
    except ValueError as error:  # a null byte in the name
        raise ImageReadError(given, str(error), "check the path") from error
    if file.is_dir():
        raise ImageReadError(given, "it is a folder", "give the path of one image file")
    if not file.is_file():
        raise ImageReadError(given, "it is not a regular file", "give the path of an image file")
    if status.st_size == 0:
        raise ImageReadError(given, "it is empty (zero bytes)", "copy or export it again")


def _os_reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, PermissionError):
        return "permission denied"
    return error.strerror or str(error)


def _damaged(path: str | os.PathLike[str], error: Exception) -> ImageReadError:
    detail = " ".join(str(error).split()) or type(error).__name__
    return ImageReadError(path, f"it is damaged or cut short ({detail})", "copy or export it again")


def _unknown_format(path: str | os.PathLike[str]) -> ImageReadError:
    if Path(path).suffix.lower() in (".heic", ".heif"):
        return ImageReadError(path, "HEIC needs a decoder that is not installed", "install pillow-heif or convert it")
    return ImageReadError(
        path,
        "it is not an image that can be read, or its beginning is damaged",
        "check that it is an image, or convert it to PNG or JPEG",
    )


def _check_size(path: str | os.PathLike[str], width: int, height: int, max_pixels: int | None) -> None:
    if max_pixels is not None and width * height > max_pixels:
        raise ImageReadError(
            path,
            f"it has {width} x {height} = {width * height / 1e6:.1f} megapixels, more than the limit of"
            f" {max_pixels / 1e6:g} megapixels",
            "make it smaller, or raise the limit with read_image(path, max_pixels=...)",
        )


@contextmanager
def _own_process_state() -> Iterator[None]:
    """Silence the decoders, and take Pillow's own size limit away: ours replaces it."""
    from PIL import Image

    with _PROCESS_STATE, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _read_with_pillow(handle: BinaryIO, path: str | os.PathLike[str], max_pixels: int | None) -> npt.NDArray[Any]:
    import imageio.v3 as iio
    from imageio.core.request import InitializationError
    from PIL import Image

    handle.seek(0)
    try:
        opened = iio.imopen(handle, "r", plugin="pillow")
    except OSError as error:  # imageio wraps whatever happened while opening
        cause = error.__cause__
        if isinstance(cause, InitializationError):
            raise _unknown_format(path) from cause
        raise _damaged(path, cause if isinstance(cause, Exception) else error) from error
    with opened as file:
        # Not metadata(): looking for EXIF at the end of a PNG, it decodes the picture.
        height, width = file.properties(index=0).shape[:2]
        _check_size(path, width, height, max_pixels)
        # A header can understate what its body unpacks to (GIF frames, icons): Pillow checks those while decoding.
        Image.MAX_IMAGE_PIXELS = max_pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        header = file.metadata(index=0, exclude_applied=False)
        mode = header["mode"]
        if mode in _ALPHA_MODES or (mode in _COLOUR_MODES and "transparency" in header):
            pixels = _over_white(file.read(index=0, mode="RGBA"))
        elif mode in _COLOUR_MODES:
            pixels = file.read(index=0, mode="RGB")
        else:
            pixels = _grey_to_rgb(_full_range(file.read(index=0), path), path)
        # Asked again after decoding: for some formats Pillow has turned the pixels by now and dropped the flag.
        orientation = file.metadata(index=0, exclude_applied=False).get("Orientation")
    return _turned(pixels, orientation)


def _read_tiff(handle: BinaryIO, path: str | os.PathLike[str], max_pixels: int | None) -> npt.NDArray[Any]:
    # Pillow knows more compressions and colour spaces, tifffile keeps 16 bits, 32 bits and floating point apart.
    import imageio.v3 as iio

    # Python prints records of a logger without any handler to stderr; what matters in them comes back as an exception.
    logger = logging.getLogger("tifffile")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    with iio.imopen(handle, "r", plugin="tifffile") as file:
        tags = file.metadata(index=..., page=0)
        _check_size(path, int(tags["ImageWidth"]), int(tags["ImageLength"]), max_pixels)
        deep = int(np.max(tags.get("BitsPerSample", 1))) > 8
        if deep or int(tags.get("SamplesPerPixel", 1)) > 4:
            try:
                pixels = file.read(index=..., page=0)
            except MemoryError:
                raise
            except Exception:
                # A compression that needs another package: Pillow may have it, and says so if the file is damaged.
                pixels = None
            if pixels is not None:
                return _turned(_tiff_to_rgb(pixels, tags, path), tags.get("Orientation"))
    return _read_with_pillow(handle, path, max_pixels)


def _tiff_to_rgb(pixels: npt.NDArray[Any], tags: dict[str, Any], path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    white_is_zero, rgb, palette, separated = 0, 2, 3, 5
    photometric = int(tags.get("PhotometricInterpretation", 1))
    samples = int(tags.get("SamplesPerPixel", 1))
    if samples > 1 and pixels.ndim == 3 and pixels.shape[0] == samples and int(tags.get("PlanarConfiguration", 1)) == 2:
        pixels = np.moveaxis(pixels, 0, -1)
    pixels = _full_range(pixels, path)
    if pixels.ndim == 2 and photometric != palette:
        return _grey_to_rgb(np.iinfo(pixels.dtype).max - pixels if photometric == white_is_zero else pixels, path)
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
        path, f"a TIFF with {samples} samples a pixel and shape {pixels.shape} is not a picture", "export it as RGB"
    )


def _full_range(pixels: npt.NDArray[Any], path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """Bring samples of any type to uint8 or uint16 over the full range."""
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    native = pixels.dtype.newbyteorder("=")
    if native in (np.uint8, np.uint16):
        return pixels.astype(native, copy=False)
    if not np.issubdtype(native, np.floating) and not np.issubdtype(native, np.integer):
        raise ImageReadError(path, f"samples of type {pixels.dtype} are not supported", "export it as 8 or 16 bits")
    values = pixels.astype(np.float64)
    smallest, largest = float(values.min()), float(values.max())
    if not (np.isfinite(smallest) and np.isfinite(largest)):
        raise ImageReadError(path, "it contains NaN or infinite samples", "replace them and export it again")
    if not (np.issubdtype(native, np.floating) and smallest >= 0 and largest <= 1):
        spread = largest - smallest
        values = (values - smallest) / spread if spread > 0 else np.zeros_like(values)
    return np.rint(values * 65535).astype(np.uint16)


def _grey_to_rgb(pixels: npt.NDArray[Any], path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    if pixels.ndim != 2:
        raise ImageReadError(path, f"its colour space gives shape {pixels.shape}", "convert it to RGB")
    return np.repeat(pixels[:, :, None], 3, axis=2)


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
