"""Token features of an image of any size: a ViT in ONNX Runtime.

Of the network only the queries, keys and values of its last attention block are used [1]_, [2]_. The position table of
the network was learnt for one grid of tokens; it is resized here, in NumPy, to the grid of each image and fed to the
graph, so that every runtime and every export gives the same features.

References
----------
.. [1] Caron et al., Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021, appendix A.
.. [2] Oquab et al., DINOv2: Learning Robust Visual Features without Supervision, TMLR 2024.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from sparsespec._threads import available_cpus
from sparsespec.models import read_trunk_metadata, resolve
from sparsespec.resample import resize

_LOG = logging.getLogger(__name__)

_Floats = npt.NDArray[np.float32]

DEFAULT_LONG_SIDE = 448
"""Pixels of the network's input along the longer side of the image."""
DEFAULT_MAX_TOKENS = 8192
"""Tokens of one run of the network; a larger grid is run in tiles."""

_CPU = "CPUExecutionProvider"
_TILE_TOKENS = 4096
"""Tokens of a tile at most: the time for one token grows with the number of tokens it is seen with."""
_TILE_OVERLAP = 4
"""Tokens that neighbouring tiles share, at least, unless tiles are tiny."""
_TILES_PER_VIEW = 4
_MOST_VIEWS = 8
"""Views of a very large image: their pixels, 2.4 kB for each token, are held while the tiles are run."""
_VIEW_WIDTH = 0.7
"""Standard deviation of the smoothing of what the views correct, in distances between the tokens of one view."""
_TABLES_KEPT = 4
_CUBIC_A = -0.75
_ROUNDING = 1e-5


class _DefaultSide(int):
    """Says that no long side was given, and what it is then."""


_NO_SIDE_GIVEN = _DefaultSide(DEFAULT_LONG_SIDE)

# A session must not be destroyed in a forked child: it would wait for threads that only the parent has.
_ORPHANS: list[Any] = []


class ProviderError(RuntimeError):
    """An execution provider was asked for and isn't there, or ONNX Runtime didn't use it."""


@dataclass(frozen=True, eq=False)
class TokenFeatures:
    """Features of the tokens of one image.

    Token (i, j), row ``i * w + j`` of the arrays, covers the original rows ``[i * p / s, (i + 1) * p / s)`` and columns
    ``[j * p / s, (j + 1) * p / s)`` with p the patch size and s the scale. The last row and column of tokens can reach
    beyond the image; what lies there is a mirror image of its edge.

    Attributes
    ----------
    queries, keys, values : (N, C) float32
        One row per token, N = h * w, row by row, without the class token.
    grid : (int, int)
        h and w, tokens.
    patch_size : int
        Side of a token, pixels of the network's input.
    image_shape : (int, int)
        Height and width of the image, pixels.
    scale : float
        Pixels of the network's input per pixel of the image, the same for both axes.
    info : dict
        ``model``, ``provider``, ``threads``, ``tiles``, ``views``, ``context_tokens`` (in all views) and ``seconds``.
    """

    queries: _Floats
    keys: _Floats
    values: _Floats
    grid: tuple[int, int]
    patch_size: int
    image_shape: tuple[int, int]
    scale: float
    info: dict[str, Any]

    def halved(self) -> TokenFeatures:
        """Give the same features in half precision, to keep those of many images; too large numbers become infinite."""
        with np.errstate(over="ignore"):
            kinds = {name: getattr(self, name).astype(np.float16) for name in ("queries", "keys", "values")}
        return replace(self, **kinds)

    @property
    def token_side(self) -> float:
        """Side of a token in pixels of the image."""
        return self.patch_size / self.scale

    @property
    def extent(self) -> tuple[float, float]:
        """Tokens that the image covers, high and wide: the grid without its padding."""
        height, width = (pixels * self.scale / self.patch_size for pixels in self.image_shape)
        return min(height, float(self.grid[0])), min(width, float(self.grid[1]))


class Backbone:
    """A ViT trunk that turns images into token features.

    The ONNX session is opened on first use, once per process: after pickling into another process, and after a fork,
    a new one is opened. One instance can be used from several threads.

    Parameters
    ----------
    model : str or path, default "default"
        A name of the registry or the path of an .onnx file made by :mod:`sparsespec.models.build`.
    providers : sequence of str, optional
        Execution providers of ONNX Runtime to use, best first; each must be there. The default takes CUDA, then the
        platform's own (Core ML on macOS, DirectML on Windows), then the CPU, as far as they are installed.
    threads : int, optional
        Threads of one run; the default is the number of processors granted to this process.
    max_tokens : int, default 8192
        A larger token grid is run in overlapping tiles of at most so many tokens, which bounds the memory: some 45 kB
        for each token of one run beside the features of the whole image.

    Raises
    ------
    UnknownModelError, ModelFormatError
        When the model isn't known, isn't there or isn't a model of ours.
    ValueError
        On a thread or token count out of range.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "default",
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1 or None, got {threads!r}")
        if max_tokens < 16:
            raise ValueError(f"max_tokens must be at least 16, got {max_tokens!r}")
        if isinstance(providers, str):
            raise ValueError(f"providers must be a sequence of names such as [{providers!r}], not one string")
        if providers is not None and not providers:
            raise ValueError("providers must name at least one execution provider, or be None")
        self._path = resolve(model)
        self._metadata = read_trunk_metadata(self._path)
        self._asked = None if providers is None else tuple(providers)
        self._threads = available_cpus() if threads is None else int(threads)
        self._max_tokens = int(max_tokens)
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._session: Any = None
        self._tables: OrderedDict[tuple[int, ...], _Floats] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        # The metadata hold the position table, two megabytes; the other process reads them from the file again.
        for name in ("_lock", "_pid", "_session", "_tables", "_metadata"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._metadata = read_trunk_metadata(self._path)
        self._reset()

    def __repr__(self) -> str:
        return f"Backbone({self.name!r}, threads={self._threads}, max_tokens={self._max_tokens})"

    @property
    def name(self) -> str:
        """Name of the model, as its file says it."""
        return self._metadata.name

    @property
    def source_sha256(self) -> str:
        """SHA-256 of the file the weights were taken from, the same for every precision."""
        return self._metadata.source_sha256

    @property
    def channels(self) -> int:
        """C, of the queries, keys and values."""
        return self._metadata.embed_dim

    @property
    def patch_size(self) -> int:
        """Side of a token, pixels of the network's input."""
        return self._metadata.patch_size

    @property
    def threads(self) -> int:
        """Threads of one run."""
        return self._threads

    @property
    def providers(self) -> tuple[str, ...]:
        """Execution providers in use, best first; opens the session."""
        return tuple(self._open().get_providers())

    def features(
        self,
        image: Any,
        *,
        long_side: int | None = _NO_SIDE_GIVEN,
        scale: float | None = None,
        megapixels: float | None = None,
    ) -> TokenFeatures:
        """Compute the queries, keys and values of every token of an image.

        The image is brought to size by :func:`fit_to_grid`, normalised as the model wants it, and run, in one piece
        when its grid has no more than ``max_tokens`` tokens. A larger grid is run in overlapping tiles, whose features
        are blended with linear ramps. A tile gets its part of the position table of the whole grid, so that a token has
        the same position whether or not the image was tiled; what it lacks is the attention to tokens outside it. That
        is made up for by views: runs of a thinned grid, every n-th token of the whole image with its own pixels and
        position. At these tokens a view has seen the whole image and a tile hasn't; the difference, smoothed, is added
        to the features of the tiles. There is one view for four tiles, eight at most.

        How near that comes to the image in one piece, mean over 32 photographs at long side 672 and 24 at 896, tiles of
        at most 1024 tokens: keys had a cosine of 0.996 and 0.994 to those of the whole (tiles alone: 0.989 and 0.979),
        no lower near seams than elsewhere, and 95 % and 92 % of the pixels got the same label (tiles alone: 93 % and
        89 %). Labels turn on small differences: the 8-bit and the float32 model, both in one piece, have a cosine of
        0.9997 and agree on 98 %. Where labels must not depend on tiles, raise ``max_tokens``. One piece costs memory in
        proportion to its tokens, and more time for each the more there are: on two cores 0.11 ms in runs of 1024
        tokens, 0.27 ms in runs of 4096 and 0.45 ms in runs of 8192, where tiles and a view take 0.32 ms.

        Parameters
        ----------
        image : (H, W, 3) array or pixel source
            RGB: uint8 or uint16 (full range), or of a float type in [0, 1]. A source has a ``shape``, a ``dtype`` and a
            method ``read(top, left, bottom, right)`` that returns that part of the image as an array. The image is read
            in parts, and only a tile of it is held as floating point numbers at a time.
        long_side : int or None, default 448
            Pixels of the network's input along the longer side; None leaves the image at its size.
        scale : float, optional
            Pixels of the network's input per pixel of the image, instead of ``long_side``; 1 leaves it at its size.
        megapixels : float, optional
            Most millions of pixels of the network's input, instead of ``long_side``. A smaller image stays as it is.

        Returns
        -------
        TokenFeatures

        Raises
        ------
        ValueError
            On another shape or type, values that aren't finite or not in [0, 1], a ``long_side`` below 1, a ``scale``
            or ``megapixels`` that isn't a positive number, or more than one of the three.
        ImportError
            Without ONNX Runtime.
        ProviderError
            When a provider that was asked for can't be used.
        """
        source = _UnitPixels(image)
        fitted = _fitted(source, _wanted_scale(source.shape, long_side, scale, megapixels), self.patch_size)
        start = time.perf_counter()
        session = self._open()
        tokens = fitted.grid[0] * fitted.grid[1]
        views: list[_View] = []
        if tokens <= self._max_tokens:
            tiles = [(0, 0, *fitted.grid)]
            queries, keys, values = self._run(session, fitted.pixels(tiles[0]), self._positions(fitted.grid))
        else:
            most = min(self._max_tokens, _TILE_TOKENS)
            tiles = token_tiles(fitted.grid, most)
            views = _views(fitted.grid, most, len(tiles))
            queries, keys, values = self._run_tiles(session, fitted, tiles, views, _overlap(most))
        info = {
            "model": self.name,
            "provider": session.get_providers()[0],
            "threads": self._threads,
            "tiles": len(tiles),
            "views": len(views),
            "context_tokens": sum(len(view.rows) for view in views),
            "seconds": time.perf_counter() - start,
        }
        shape = (source.shape[0], source.shape[1])
        return TokenFeatures(queries, keys, values, fitted.grid, self.patch_size, shape, fitted.scale, info)

    def _run(self, session: Any, pixels: _Floats, positions: _Floats) -> tuple[_Floats, _Floats, _Floats]:
        """Run the graph on pixels in [0, 1], (H, W, 3), and the rows of its position input."""
        feed = np.empty((1, 3, *pixels.shape[:2]), np.float32)
        for channel, plane in enumerate(feed[0]):
            np.subtract(pixels[..., channel], self._metadata.mean[channel], out=plane)
            plane /= self._metadata.std[channel]
        queries, keys, values = session.run(
            ["queries", "keys", "values"], {"image": feed, "positions": positions[None]}
        )
        return queries[0], keys[0], values[0]

    def _run_tiles(
        self,
        session: Any,
        fitted: _Fitted,
        tiles: Sequence[tuple[int, int, int, int]],
        views: Sequence[_View],
        overlap: int,
    ) -> tuple[_Floats, _Floats, _Floats]:
        grid, patch, table = fitted.grid, self.patch_size, self._metadata.positions
        totals = [np.zeros((*grid, self._metadata.embed_dim), np.float32) for _ in range(3)]
        weights = np.zeros(grid, np.float32)
        patches = [np.empty((patch, len(view.rows), patch, 3), np.float32) for view in views]
        for tile in tiles:
            top, left, bottom, right = tile
            pixels = fitted.pixels(tile)
            for view, held in zip(views, patches, strict=True):
                view.collect(held, pixels, tile)
            weight = np.outer(_ramp(top, bottom, grid[0], overlap), _ramp(left, right, grid[1], overlap))
            found = self._run(session, pixels, self._rows(resize_positions(table, grid, window=tile)))
            for total, features in zip(totals, found, strict=True):
                total[top:bottom, left:right] += weight[..., None] * features.reshape(*weight.shape, -1)
            weights[top:bottom, left:right] += weight
        for total in totals:
            total /= weights[..., None]
        # All differences are taken before any is added, so that the order of the views doesn't matter.
        lattice = tuple(len(side) for side in views[0].lattice)
        corrections = [np.zeros((*lattice, self._metadata.embed_dim), np.float32) for _ in range(3)]
        while patches:
            view = views[len(patches) - 1]
            held = patches.pop()
            positions = _positions_at(table, grid, view.rows, view.columns)
            found = self._run(session, held.reshape(patch, -1, 3), self._rows(positions))
            for correction, total, features in zip(corrections, totals, found, strict=True):
                correction[view.places] = features - total[view.rows, view.columns]
        for total, correction in zip(totals, corrections, strict=True):
            _add_smoothly(total, correction, views[0])
        queries, keys, values = (total.reshape(grid[0] * grid[1], -1) for total in totals)
        return queries, keys, values

    def _rows(self, positions: _Floats) -> _Floats:
        """Put the class token's row before those of the tokens."""
        return np.concatenate([self._metadata.class_row[None], positions.reshape(-1, positions.shape[-1])])

    def _positions(self, grid: tuple[int, int]) -> _Floats:
        """Return the rows of a whole grid, resized now or kept from the last few sizes seen."""
        with self._lock:
            rows = self._tables.get(grid)
            if rows is not None:
                self._tables.move_to_end(grid)
                return rows
        rows = self._rows(resize_positions(self._metadata.positions, grid))
        with self._lock:
            self._tables[grid] = rows
            while len(self._tables) > _TABLES_KEPT:
                self._tables.popitem(last=False)
        return rows

    def _open(self) -> Any:
        if self._pid != os.getpid():
            if self._session is not None:
                _ORPHANS.append(self._session)
            self._reset()
        with self._lock:
            if self._session is None:
                self._session = _open_session(os.fspath(self._path), self._asked, self._threads)
            return self._session


def _open_session(path: str, asked: tuple[str, ...] | None, threads: int) -> Any:
    # From 1.29 on ONNX Runtime reports each session to its maker, hashes of the model included, unless this is set
    # before it is loaded. Nobody who segments photographs expects that; a value that is set already is left alone.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            f"ONNX Runtime is needed to run a model and can't be imported ({error}); "
            "install it with: pip install onnxruntime (or onnxruntime-gpu, onnxruntime-directml)"
        ) from error
    if os.environ["ORT_DISABLE_TELEMETRY"] != "0" and hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()  # for a process that had loaded it before
    available = onnxruntime.get_available_providers()
    if asked is None:
        own = {"darwin": ["CoreMLExecutionProvider"], "win32": ["DmlExecutionProvider"]}.get(sys.platform, [])
        wanted = [name for name in ("CUDAExecutionProvider", *own, _CPU) if name in available]
    else:
        wanted = list(asked)
        missing = [name for name in wanted if name not in available]
        if missing:
            raise ProviderError(
                f"execution provider {', '.join(missing)} isn't available in this installation of ONNX Runtime; "
                f"available are {', '.join(available)}"
            )
    options = onnxruntime.SessionOptions()
    # 0 would mean every core of the host, past any affinity or container limit.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # The arena keeps the largest block of every input shape seen; without it memory follows the image at hand.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    # Idle threads sleep instead of spinning: several workers, and Numba between two runs, share the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=wanted)
    used = session.get_providers()
    unused = [name for name in wanted if name not in used]
    if unused and asked is not None:
        raise ProviderError(
            f"execution provider {', '.join(unused)} was asked for, but ONNX Runtime could not start it and would have "
            f"used {', '.join(used)}; available are {', '.join(available)}"
        )
    if unused:
        _LOG.warning("%s is installed but could not be started; using %s", ", ".join(unused), used[0])
    return session


class _UnitPixels:
    """A pixel source, or an array as one, whose parts are float32 in [0, 1]."""

    def __init__(self, image: Any) -> None:
        self._read = image.read if hasattr(image, "read") else None
        self._image = image if self._read else np.asarray(image)
        shape = tuple(int(size) for size in self._image.shape)
        if len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise ValueError(f"image must be (H, W, 3) and not empty, got shape {shape}")
        dtype = np.dtype(self._image.dtype)
        if dtype.kind != "f" and dtype not in (np.uint8, np.uint16):
            raise ValueError(f"image must be uint8, uint16 or of a float type with values in [0, 1], got {dtype}")
        self.shape = shape
        self._largest = None if dtype.kind == "f" else int(np.iinfo(dtype).max)

    def read(self, top: int, left: int, bottom: int, right: int) -> _Floats:
        if self._read is None:
            part = self._image[top:bottom, left:right]
        else:
            part = np.asarray(self._read(top, left, bottom, right))
        if self._largest is not None:
            unit: _Floats = np.divide(part, np.float32(self._largest), dtype=np.float32)
            return unit
        low, high = float(part.min()), float(part.max())
        # Written so that NaN, which min and max hand on, fails as well; resizing can leave the range by rounding.
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
            raise ValueError(f"image must have finite values in [0, 1], found values from {low:g} to {high:g}")
        return part.astype(np.float32, copy=False)


def _wanted_scale(
    shape: tuple[int, ...], long_side: int | None, scale: float | None, megapixels: float | None
) -> float:
    """Return the network's pixels per pixel of the image that the arguments of ``features`` ask for."""
    side = None if isinstance(long_side, _DefaultSide) else long_side
    asked = {"long_side": side, "scale": scale, "megapixels": megapixels}
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) > 1:
        said = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(f"long_side, scale and megapixels exclude each other, got {said}")
    for name in given.keys() - {"long_side"}:
        value = given[name]
        number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value!r}")
    if scale is not None:
        return float(scale)
    if megapixels is not None:
        return min(1.0, math.sqrt(megapixels * 1e6 / (shape[0] * shape[1])))
    return _scale_to(shape, long_side)


def _scale_to(shape: tuple[int, ...], long_side: int | None) -> float:
    if long_side is None:
        return 1.0
    if long_side < 1:
        raise ValueError(f"long_side must be at least 1 pixel or None, got {long_side!r}")
    return long_side / max(shape[:2])


@dataclass(frozen=True, eq=False)
class _Fitted:
    """An image as the network sees it, made in parts on demand.

    Attributes
    ----------
    source
        Array or pixel source.
    scale
        New pixels per old pixel.
    content
        Rows and columns of the resized image; what lies beyond them in the grid is its mirror image.
    patch_size
        Side of a token, pixels.
    """

    source: Any
    scale: float
    content: tuple[int, int]
    patch_size: int

    @property
    def grid(self) -> tuple[int, int]:
        height, width = (-(-side // self.patch_size) for side in self.content)
        return height, width

    def pixels(self, tile: tuple[int, int, int, int]) -> _Floats:
        """Make the pixels of a tile of tokens."""
        top, left, bottom, right = (side * self.patch_size for side in tile)
        rows, columns = _mirrored(top, bottom, self.content[0]), _mirrored(left, right, self.content[1])
        first, begin = int(rows.min()), int(columns.min())
        window = (first, begin, int(rows.max()) + 1, int(columns.max()) + 1)
        part = resize(self.source, self.content, scale=self.scale, window=window)
        if len(rows) > len(part):
            part = part[rows - first]
        if len(columns) > part.shape[1]:
            part = part[:, columns - begin]
        return part


def _mirrored(start: int, stop: int, size: int) -> npt.NDArray[np.int64]:
    """Return the coordinates, inside an axis of ``size`` that is continued by mirror images, of a range."""
    place = np.arange(start, stop) % (2 * size)
    return np.where(place < size, place, 2 * size - 1 - place)


def _fitted(source: Any, scale: float, patch_size: int) -> _Fitted:
    height, width = (max(1, round(side * scale)) for side in source.shape[:2])
    return _Fitted(source, scale, (height, width), patch_size)


def fit_to_grid(image: _Floats, long_side: int | None, patch_size: int) -> tuple[_Floats, float]:
    """Bring an image to the size the network sees.

    One scale for both axes makes the longer side ``long_side`` pixels, up or down; the other side is rounded to whole
    pixels, at least one, while the scale stays exact. Then the image is continued at the bottom and at the right by
    its mirror image to the next multiple of the patch size, so that every pixel is in a token and none is stretched.

    Parameters
    ----------
    image : (H, W, 3) float32
        The image.
    long_side : int or None
        Pixels of the longer side; None keeps the size.
    patch_size : int
        Side of a token, pixels.

    Returns
    -------
    fitted : (h * patch_size, w * patch_size, 3) float32
        The image at its new size.
    scale : float
        New pixels per old pixel.

    Raises
    ------
    ValueError
        On a ``long_side`` below 1.
    """
    fitted = _fitted(image, _scale_to(image.shape, long_side), patch_size)
    return fitted.pixels((0, 0, *fitted.grid)), fitted.scale


def resize_positions(
    table: _Floats, grid: tuple[int, int], *, window: tuple[int, int, int, int] | None = None
) -> _Floats:
    """Resize a position table by bicubic interpolation, a = -0.75.

    Entry i of an axis of n entries resized to m lies at ``(i + 1/2) n / m - 1/2`` (half-pixel centres), is made of the
    four entries around it with Keys' kernel, and sees the border entry repeated outside the table; no antialiasing.
    That is ``torch.nn.functional.interpolate(size=grid, mode="bicubic")`` and the ONNX operator ``Resize`` with
    ``cubic_coeff_a=-0.75``, the one DINOv2 was exported with.

    Parameters
    ----------
    table : (rows, columns, C) float32
        The table as learnt.
    grid : (int, int)
        Token rows and columns of the whole table wanted.
    window : (top, left, bottom, right), optional
        Compute only these tokens of it.

    Returns
    -------
    (h, w, C) float32
        Of the whole grid, or of the window.
    """
    rows, columns, channels = table.shape
    top, left, bottom, right = window or (0, 0, *grid)
    if (rows, columns) == tuple(grid):
        return table[top:bottom, left:right]
    vertical, horizontal = _cubic_weights(rows, grid[0])[top:bottom], _cubic_weights(columns, grid[1])[left:right]
    tall = (vertical @ table.astype(np.float64).reshape(rows, columns * channels)).reshape(-1, columns, channels)
    return np.matmul(horizontal, tall).astype(np.float32)


def _positions_at(
    table: _Floats, grid: tuple[int, int], rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]
) -> _Floats:
    """Return the positions (n, C) of single tokens of a grid."""
    found = np.empty((len(rows), table.shape[2]), np.float32)
    for row in np.unique(rows):
        here = rows == row
        line = resize_positions(table, grid, window=(int(row), 0, int(row) + 1, grid[1]))
        found[here] = line[0, columns[here]]
    return found


@functools.lru_cache(maxsize=64)
def _cubic_weights(size: int, wanted: int) -> npt.NDArray[np.float64]:
    """Build the (wanted, size) matrix of one axis."""
    weights = np.zeros((wanted, size))
    rows = np.arange(wanted)
    centre = (rows + 0.5) * size / wanted - 0.5
    first = np.floor(centre).astype(np.int64) - 1
    for tap in range(4):
        distance = np.abs(centre - (first + tap))
        near = ((_CUBIC_A + 2) * distance - (_CUBIC_A + 3)) * distance**2 + 1
        far = ((distance - 5) * distance + 8) * distance * _CUBIC_A - 4 * _CUBIC_A
        np.add.at(weights, (rows, np.clip(first + tap, 0, size - 1)), np.where(distance <= 1, near, far))
    weights.flags.writeable = False
    return weights


def token_tiles(grid: tuple[int, int], max_tokens: int) -> list[tuple[int, int, int, int]]:
    """Cover a token grid by overlapping tiles.

    Of all ways to cut the grid into rows and columns of equal tiles that are small enough, the one that runs the
    fewest tokens in total.

    Parameters
    ----------
    grid : (int, int)
        Token rows and columns.
    max_tokens : int
        Most tokens of a tile.

    Returns
    -------
    list of (top, left, bottom, right)
        Tokens; all tiles of the same size, evenly spread, neighbours share a few tokens. One tile when the grid has
        no more than ``max_tokens`` tokens.
    """
    height, width = grid
    if height * width <= max_tokens:
        return [(0, 0, height, width)]
    overlap = _overlap(max_tokens)
    ways = []
    for down in range(1, height + 1):
        tall = _tile_side(height, down, overlap)
        widest = max_tokens // tall
        if tall < height and tall <= 2 * overlap:
            break
        if widest >= width:
            across = 1
        elif widest > 2 * overlap:
            across = math.ceil((width - overlap) / (widest - overlap))
        else:
            continue
        wide = _tile_side(width, across, overlap)
        ways.append((down * across * tall * wide, down, across, tall, wide))
    _, down, across, tall, wide = min(ways)
    tops, lefts = _origins(height, tall, down), _origins(width, wide, across)
    return [(top, left, top + tall, left + wide) for top in tops for left in lefts]


def _overlap(max_tokens: int) -> int:
    return min(_TILE_OVERLAP, math.isqrt(max_tokens) // 4)


def _tile_side(size: int, count: int, overlap: int) -> int:
    """Return the smallest side with which ``count`` tiles cover an axis and neighbours overlap by ``overlap``."""
    return math.ceil((size + (count - 1) * overlap) / count)


def _origins(size: int, tile: int, count: int) -> list[int]:
    return [0] if count == 1 else [round(index * (size - tile) / (count - 1)) for index in range(count)]


def _ramp(start: int, stop: int, size: int, overlap: int) -> _Floats:
    """Weigh the tokens of a tile along one axis: rising from its edges inwards, but not at the border of the image."""
    weight = np.ones(stop - start, np.float32)
    rise = np.arange(1, overlap + 1, dtype=np.float32) / (overlap + 1)
    if start > 0:
        weight[:overlap] = rise
    if stop < size:
        weight[len(weight) - overlap :] = rise[::-1]
    return weight


@dataclass(frozen=True, eq=False)
class _View:
    """A thinned token grid, to be run at once: part of a lattice over the whole grid.

    Attributes
    ----------
    rows, columns
        (n,) of its tokens in the grid.
    places
        Row and column, (n,) each, of its tokens in the lattice.
    lattice
        The rows and the columns of the grid that the lattice of all views is made of.
    spacing
        Distance between neighbouring tokens of this view, in tokens down and across.
    """

    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    places: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    lattice: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    spacing: tuple[float, float]

    def collect(self, held: _Floats, pixels: _Floats, tile: tuple[int, int, int, int]) -> None:
        """Copy its patches out of the pixels of a tile, into (patch, n, patch, 3)."""
        top, left, bottom, right = tile
        patch = held.shape[0]
        inside = (self.rows >= top) & (self.rows < bottom) & (self.columns >= left) & (self.columns < right)
        patches = pixels.reshape(bottom - top, patch, right - left, patch, 3)
        held[:, inside] = patches[self.rows[inside] - top, :, self.columns[inside] - left].transpose(1, 0, 2, 3)


# Views i, j, ... take the tokens (row, column) of the lattice where (row * step + column) % count is i, j, ...: these
# steps leave the tokens of a view farthest from each other.
_LATTICE_STEPS = (0, 0, 1, 1, 2, 2, 2, 2, 3)


def _views(grid: tuple[int, int], most: int, tiles: int) -> list[_View]:
    """Thin a grid to what is seen at once, for a grid that is run in so many tiles of at most ``most`` tokens."""
    count = min(_MOST_VIEWS, math.ceil(tiles / _TILES_PER_VIEW))
    # The classes of a lattice differ a little in size.
    held = most if count == 1 else count * (most - count)
    share = min(1.0, math.sqrt(held / (grid[0] * grid[1])))
    height = min(grid[0], held, max(1, round(grid[0] * share)))
    width = min(grid[1], held // height)
    row, column = np.mgrid[0:height, 0:width]
    number = (row * _LATTICE_STEPS[count] + column) % count
    sizes = np.bincount(number.ravel(), minlength=count)
    if sizes.max() > most or sizes.min() == 0:
        number = (row * width + column) % count
    lattice = (_spread(grid[0], height), _spread(grid[1], width))
    thinned = math.sqrt(count)
    spacing = (grid[0] / height * thinned, grid[1] / width * thinned)
    views = []
    for k in range(count):
        down, across = (places.astype(np.int64) for places in np.nonzero(number == k))
        views.append(_View(lattice[0][down], lattice[1][across], (down, across), lattice, spacing))
    return views


def _spread(size: int, count: int) -> npt.NDArray[np.int64]:
    """Choose ``count`` of ``size`` places, evenly."""
    return ((np.arange(count) + 0.5) * size / count).astype(np.int64)


def _add_smoothly(total: _Floats, correction: _Floats, view: _View) -> None:
    """Add to every token what a Gaussian makes of the corrections at the tokens of the lattice around it."""
    height, width, channels = total.shape
    down = _smoothing(height, view.lattice[0], _VIEW_WIDTH * view.spacing[0])
    across = _smoothing(width, view.lattice[1], _VIEW_WIDTH * view.spacing[1])
    flat = correction.reshape(len(view.lattice[0]), -1)
    for row in range(height):
        total[row] += across @ (down[row : row + 1] @ flat).reshape(-1, channels)


def _smoothing(size: int, places: npt.NDArray[np.int64], width: float) -> Any:
    """Build the (size, len(places)) matrix of Gaussian weights along one axis, each row of sum one."""
    distance = np.abs(np.arange(size)[:, None] - places) / width
    weights = np.where(distance <= 3, np.exp(-0.5 * distance**2), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    return sparse.csr_array(weights.astype(np.float32))
