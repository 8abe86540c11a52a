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
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec._threads import available_cpus
from sparsespec.models import read_trunk_metadata, resolve
from sparsespec.resample import resize

_LOG = logging.getLogger(__name__)

_Floats = npt.NDArray[np.float32]

DEFAULT_LONG_SIDE = 448
"""Pixels of the network's input along the longer side of the image."""
DEFAULT_MAX_TOKENS = 4096
"""Tokens of one run of the network; a larger grid is run in tiles."""

_CPU = "CPUExecutionProvider"
_TILE_OVERLAP = 8
"""Tokens that neighbouring tiles share, at least, unless tiles are tiny."""
_TABLES_KEPT = 4
_CUBIC_A = -0.75
_ROUNDING = 1e-5

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
        ``model``, ``provider``, ``threads``, ``tiles`` (how many runs) and ``seconds``.
    """

    queries: _Floats
    keys: _Floats
    values: _Floats
    grid: tuple[int, int]
    patch_size: int
    image_shape: tuple[int, int]
    scale: float
    info: dict[str, Any]


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
    max_tokens : int, default 4096
        A larger token grid is run in overlapping tiles of at most so many tokens, which bounds the memory.

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

    def features(self, image: npt.NDArray[Any], *, long_side: int | None = DEFAULT_LONG_SIDE) -> TokenFeatures:
        """Compute the queries, keys and values of every token of an image.

        The image is brought to size by :func:`fit_to_grid`, normalised as the model wants it, and run. When its grid
        has more than ``max_tokens`` tokens it is run in overlapping tiles, whose features are blended with linear
        ramps. A tile gets its part of the position table of the whole grid, so that a token has the same position
        whether or not the image was tiled; what a tile lacks is the attention to tokens outside it. (A table of its own
        for each tile was tried. On six photographs at long side 896 cut into tiles of at most 1024 tokens, keys had a
        mean cosine of 0.966 to those of the untiled image that way, against 0.984 this way.)

        Parameters
        ----------
        image : (H, W, 3) array
            RGB in [0, 1], float32 (other float types are converted).
        long_side : int or None, default 448
            Pixels of the network's input along the longer side; None leaves the image at its size.

        Returns
        -------
        TokenFeatures

        Raises
        ------
        ValueError
            On another shape or type, values that aren't finite or not in [0, 1], or a ``long_side`` below 1.
        ImportError
            Without ONNX Runtime.
        ProviderError
            When a provider that was asked for can't be used.
        """
        image = _checked(image)
        start = time.perf_counter()
        session = self._open()
        patch = self.patch_size
        fitted, scale = fit_to_grid(image, long_side, patch)
        grid = (fitted.shape[0] // patch, fitted.shape[1] // patch)
        tiles = token_tiles(grid, self._max_tokens)
        if len(tiles) == 1:
            queries, keys, values = self._run(session, fitted, grid, tiles[0])
        else:
            queries, keys, values = self._run_tiles(session, fitted, grid, tiles)
        info = {
            "model": self.name,
            "provider": session.get_providers()[0],
            "threads": self._threads,
            "tiles": len(tiles),
            "seconds": time.perf_counter() - start,
        }
        shape = (int(image.shape[0]), int(image.shape[1]))
        return TokenFeatures(queries, keys, values, grid, patch, shape, scale, info)

    def _run(
        self, session: Any, pixels: _Floats, grid: tuple[int, int], tile: tuple[int, int, int, int]
    ) -> tuple[_Floats, _Floats, _Floats]:
        """Run the graph on one tile of an image in [0, 1] whose token grid is ``grid``."""
        positions = self._positions(grid, tile)
        top, left, bottom, right = (side * self.patch_size for side in tile)
        part = (pixels[top:bottom, left:right] - self._metadata.mean) / self._metadata.std
        feeds = {"image": np.ascontiguousarray(part.transpose(2, 0, 1))[None], "positions": positions[None]}
        queries, keys, values = session.run(["queries", "keys", "values"], feeds)
        return queries[0], keys[0], values[0]

    def _run_tiles(
        self, session: Any, pixels: _Floats, grid: tuple[int, int], tiles: Sequence[tuple[int, int, int, int]]
    ) -> tuple[_Floats, _Floats, _Floats]:
        total = np.zeros((3, *grid, self._metadata.embed_dim), np.float32)
        weights = np.zeros(grid, np.float32)
        overlap = _overlap(self._max_tokens)
        for tile in tiles:
            top, left, bottom, right = tile
            weight = np.outer(_ramp(top, bottom, grid[0], overlap), _ramp(left, right, grid[1], overlap))
            for into, features in zip(total, self._run(session, pixels, grid, tile), strict=True):
                into[top:bottom, left:right] += weight[..., None] * features.reshape(*weight.shape, -1)
            weights[top:bottom, left:right] += weight
        total /= weights[..., None]
        queries, keys, values = total.reshape(3, grid[0] * grid[1], -1)
        return queries, keys, values

    def _positions(self, grid: tuple[int, int], tile: tuple[int, int, int, int]) -> _Floats:
        """Return the rows of the graph's position input, resized now or kept from the last few sizes seen."""
        with self._lock:
            rows = self._tables.get((*grid, *tile))
            if rows is not None:
                self._tables.move_to_end((*grid, *tile))
                return rows
        table = resize_positions(self._metadata.positions, grid, window=tile)
        rows = np.concatenate([self._metadata.class_row[None], table.reshape(-1, table.shape[-1])])
        with self._lock:
            self._tables[(*grid, *tile)] = rows
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


def _checked(image: npt.NDArray[Any]) -> _Floats:
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"image must be (H, W, 3) and not empty, got shape {image.shape}")
    if image.dtype.kind != "f":
        raise ValueError(f"image must be of a float type with values in [0, 1], got {image.dtype}")
    low, high = float(image.min()), float(image.max())
    # Written so that NaN, which min and max hand on, fails as well; resizing can leave the range by a rounding error.
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise ValueError(f"image must have finite values in [0, 1], found values from {low:g} to {high:g}")
    return image.astype(np.float32, copy=False)


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
    height, width = image.shape[:2]
    if long_side is None:
        scale, fitted = 1.0, image
    else:
        if long_side < 1:
            raise ValueError(f"long_side must be at least 1 pixel or None, got {long_side!r}")
        scale = long_side / max(height, width)
        shape = (max(1, round(height * scale)), max(1, round(width * scale)))
        fitted = resize(image, shape, scale=scale)
    down, right = (-size % patch_size for size in fitted.shape[:2])
    if down or right:
        fitted = np.pad(fitted, ((0, down), (0, right), (0, 0)), mode="symmetric")
    return fitted, scale


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
