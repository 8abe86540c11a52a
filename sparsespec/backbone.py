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

import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec import _sessions
from sparsespec._network_input import (
    DEFAULT_LONG_SIDE,
    NO_SIDE_GIVEN,
    Fitted,
    UnitPixels,
    fit,
    fit_to_grid,
    wanted_scale,
)
from sparsespec._threads import ForkError, available_cpus
from sparsespec._tiling import TILE_TOKENS, View, add_smoothly, overlap_for, ramp, token_tiles, views_of
from sparsespec._turns import BusyError, Turns
from sparsespec.models import read_trunk_metadata, resolve
from sparsespec.position_table import positions_at, resize_positions
from sparsespec.providers import AUTO, ProviderError, choose

__all__ = [
    "DEFAULT_LONG_SIDE",
    "DEFAULT_MAX_TOKENS",
    "Backbone",
    "BusyError",
    "ForkError",
    "ProviderError",
    "TokenFeatures",
    "fit_to_grid",
    "resize_positions",
    "token_tiles",
]

_Floats = npt.NDArray[np.float32]

DEFAULT_MAX_TOKENS = 8192
"""Tokens of one run of the network; a larger grid is run in tiles."""

_TABLES_KEPT = 4
_ALL: weakref.WeakSet[Backbone] = weakref.WeakSet()


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

    The ONNX session is opened on first use, and again after pickling into another process. One instance serves any
    number of threads with one session and one copy of the weights; callers that come while ``concurrency`` of them are
    being served wait, in the order in which they came.

    In a forked process a Backbone works that was not used before the fork; one that was is refused, since its session
    is there but none of its threads.

    Parameters
    ----------
    model : str or path, default "default"
        A name of the registry or the path of an .onnx file made by :mod:`sparsespec.models.build`.
    provider : str, default "auto"
        What runs the network: "cpu", "cuda", "openvino" and others, see :data:`sparsespec.providers.PROVIDERS`, or ONNX
        Runtime's own name of an execution provider. One that was named has to be there, to start and to be used. "auto"
        takes CUDA, then the platform's own (Core ML on macOS, DirectML on Windows), then the CPU, the first that is
        installed and starts.
    provider_options : mapping of str to str, int, float or bool, optional
        Options of that provider, such as ``{"device_id": 1}``, handed to it as they are; beside them
        ``graph_precision``, see :mod:`sparsespec.providers`.
    threads : int, optional
        Threads of one run; the default is the number of processors granted to this process.
    max_tokens : int, default 8192
        A larger token grid is run in overlapping tiles of at most so many tokens, which bounds the memory: some 25 kB
        for each token of one run beside the features of the whole image.
    block : int, optional
        The block whose queries, keys and values are wanted: zero-based, or negative to count from the network's last.
        The file must have been built with it. The default is the last one that the file gives.
    concurrency : int, optional
        Callers served at once, each with ``threads`` threads and memory of its own for one image. The default is what
        the processors granted to this process are enough for: their number over ``threads``, at least 1.
    max_waiting : int, optional
        Callers that may wait while others are served; one more gets a BusyError at once. By default any number waits.

    Raises
    ------
    UnknownModelError, ModelFormatError
        When the model isn't known, isn't there or isn't a model of ours.
    ValueError
        On a number of threads, tokens or callers out of range, a block that the file doesn't give, an unknown provider
        or options that can't be its.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "default",
        *,
        provider: str = AUTO,
        provider_options: Mapping[str, Any] | None = None,
        threads: int | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        block: int | None = None,
        concurrency: int | None = None,
        max_waiting: int | None = None,
    ) -> None:
        if concurrency is not None and concurrency < 1:
            raise ValueError(f"concurrency must be at least 1 or None, got {concurrency!r}")
        if max_waiting is not None and max_waiting < 0:
            raise ValueError(f"max_waiting must be at least 0 or None, got {max_waiting!r}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1 or None, got {threads!r}")
        if max_tokens < 16:
            raise ValueError(f"max_tokens must be at least 16, got {max_tokens!r}")
        self._choice = choose(provider, provider_options)
        self._path = resolve(model)
        self._metadata = read_trunk_metadata(self._path)
        self._outputs = self._metadata.outputs(block)
        self._features_sha256 = self._metadata.features_sha256(block)
        self._threads = available_cpus() if threads is None else int(threads)
        self._max_tokens = int(max_tokens)
        self._concurrency = max(1, available_cpus() // self._threads) if concurrency is None else int(concurrency)
        self._max_waiting = None if max_waiting is None else int(max_waiting)
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._forked_from: int | None = None
        self._session: Any = None
        self._used = False
        self._turns = Turns(self._concurrency, self._max_waiting)
        self._mine = threading.local()
        self._tables: OrderedDict[tuple[int, ...], _Floats] = OrderedDict()
        _ALL.add(self)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        # The metadata hold the position table, two megabytes; the other process reads them from the file again.
        for name in ("_lock", "_forked_from", "_session", "_used", "_turns", "_mine", "_tables", "_metadata"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._metadata = read_trunk_metadata(self._path)
        self._reset()

    def with_threads(self, threads: int) -> Backbone:
        """Give a copy with a session of its own that serves one caller at a time, with so many threads."""
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads!r}")
        other = Backbone.__new__(Backbone)
        other.__dict__.update(self.__getstate__())
        other._metadata = self._metadata
        other._threads, other._concurrency = int(threads), 1
        other._reset()
        return other

    def __repr__(self) -> str:
        return (
            f"Backbone({self.name!r}, threads={self._threads}, max_tokens={self._max_tokens},"
            f" concurrency={self._concurrency}, max_waiting={self._max_waiting})"
        )

    @property
    def name(self) -> str:
        """Name of the model, as its file says it."""
        return self._metadata.name

    @property
    def path(self) -> Path:
        """The file of the model."""
        return Path(self._path)

    @property
    def precision(self) -> str:
        """Numbers that the file holds its weights in: ``float32``, ``float16``, ``int8`` or ``int8-static``."""
        return self._metadata.precision

    @property
    def source_sha256(self) -> str:
        """SHA-256 of the file the weights were taken from, the same for every precision."""
        return self._metadata.source_sha256

    @property
    def features_sha256(self) -> str:
        """What directions are fitted to: ``source_sha256`` for the last block, another for every other block."""
        return self._features_sha256

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
    def concurrency(self) -> int:
        """Callers served at once."""
        return self._concurrency

    @property
    def max_waiting(self) -> int | None:
        """Callers that may wait; None for any number."""
        return self._max_waiting

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for one of the ``concurrency`` turns, and keep it for all that the calling thread does inside.

        :meth:`features` takes a turn for itself; inside, in the same thread, it takes no other. A
        :class:`~sparsespec.Segmenter` takes one for each image, from its first pixel to its last label, so that no more
        images are at work, and no more memory is in use, than ``concurrency`` says.

        Raises
        ------
        BusyError
            At once, when ``max_waiting`` callers wait already.
        ForkError
            In a process that was forked after the model had been used.
        """
        self._refuse_after_fork()
        if getattr(self._mine, "turn", False):
            yield
            return
        with self._turns.turn():
            self._mine.turn = True
            try:
                yield
            finally:
                self._mine.turn = False

    @property
    def providers(self) -> tuple[str, ...]:
        """Execution providers in use, best first; opens the session."""
        return tuple(self._open().get_providers())

    def features(
        self,
        image: Any,
        *,
        long_side: int | None = NO_SIDE_GIVEN,
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
        BusyError
            At once, when ``max_waiting`` callers wait already.
        ForkError
            In a process that was forked after the model had been used.
        """
        source = UnitPixels(image)
        fitted = fit(source, wanted_scale(source.shape, long_side, scale, megapixels), self.patch_size)
        with self.turn():
            return self._features(source, fitted)

    def _features(self, source: UnitPixels, fitted: Fitted) -> TokenFeatures:
        start = time.perf_counter()
        session = self._open()
        tokens = fitted.grid[0] * fitted.grid[1]
        views: list[View] = []
        if tokens <= self._max_tokens:
            tiles = [(0, 0, *fitted.grid)]
            queries, keys, values = self._run(session, fitted.pixels(tiles[0]), self._positions(fitted.grid))
        else:
            most = min(self._max_tokens, TILE_TOKENS)
            tiles = token_tiles(fitted.grid, most)
            views = views_of(fitted.grid, most, len(tiles))
            queries, keys, values = self._run_tiles(session, fitted, tiles, views, overlap_for(most))
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
        # Of a large image these are megabytes that the run has no use for.
        del pixels
        queries, keys, values = session.run(list(self._outputs), {"image": feed, "positions": positions[None]})
        return queries[0], keys[0], values[0]

    def _run_tiles(
        self,
        session: Any,
        fitted: Fitted,
        tiles: Sequence[tuple[int, int, int, int]],
        views: Sequence[View],
        overlap: int,
    ) -> tuple[_Floats, _Floats, _Floats]:
        grid, patch, table, rule = fitted.grid, self.patch_size, self._metadata.positions, self._metadata.rule
        totals = [np.zeros((*grid, self._metadata.embed_dim), np.float32) for _ in range(3)]
        weights = np.zeros(grid, np.float32)
        patches = [np.empty((patch, len(view.rows), patch, 3), np.float32) for view in views]
        for tile in tiles:
            top, left, bottom, right = tile
            pixels = fitted.pixels(tile)
            for view, held in zip(views, patches, strict=True):
                view.collect(held, pixels, tile)
            weight = np.outer(ramp(top, bottom, grid[0], overlap), ramp(left, right, grid[1], overlap))
            found = self._run(session, pixels, self._rows(resize_positions(table, grid, rule=rule, window=tile)))
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
            positions = positions_at(table, grid, view.rows, view.columns, rule=rule)
            found = self._run(session, held.reshape(patch, -1, 3), self._rows(positions))
            for correction, total, features in zip(corrections, totals, found, strict=True):
                correction[view.places] = features - total[view.rows, view.columns]
        for total, correction in zip(totals, corrections, strict=True):
            add_smoothly(total, correction, views[0])
        queries, keys, values = (total.reshape(grid[0] * grid[1], -1) for total in totals)
        return queries, keys, values

    def _rows(self, positions: _Floats) -> _Floats:
        """Put the rows of the class token and the registers before those of the patches."""
        return np.concatenate([self._metadata.prefix, positions.reshape(-1, positions.shape[-1])])

    def _positions(self, grid: tuple[int, int]) -> _Floats:
        """Return the rows of a whole grid, resized now or kept from the last few sizes seen."""
        with self._lock:
            rows = self._tables.get(grid)
            if rows is not None:
                self._tables.move_to_end(grid)
                return rows
        rows = self._rows(resize_positions(self._metadata.positions, grid, rule=self._metadata.rule))
        with self._lock:
            self._tables[grid] = rows
            while len(self._tables) > _TABLES_KEPT:
                self._tables.popitem(last=False)
        return rows

    def _open(self) -> Any:
        self._refuse_after_fork()
        with self._lock:
            if self._session is None:
                self._used = True
                self._session = _sessions.open_session(
                    os.fspath(self._path), self._metadata.precision, self._choice, self._threads, self._concurrency
                )
            return self._session

    def _refuse_after_fork(self) -> None:
        if self._forked_from is not None:
            raise ForkError(
                f"the model {self.name!r} had been used in process {self._forked_from} before this process was forked"
                " from it, and its session's threads don't survive that: start processes with"
                ' multiprocessing.get_context("spawn"), make the Backbone or Segmenter in the forked process, or don\'t'
                " use it before the fork"
            )

    def _after_fork(self) -> None:
        if not self._used:
            self._reset()  # another thread may have held its locks
            return
        self._forked_from = os.getppid()
        if self._session is not None:
            import ctypes

            # It must never be destroyed here, not even at exit: that would wait for the parent's threads for ever.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._session))


def _after_fork() -> None:
    for each in list(_ALL):
        each._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
