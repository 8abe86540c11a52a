"""What contenders do: each task reads its inputs, warms up, and gives a job to run and describe.

A task is a function of its inputs. The names of files end in ``.npy``; all else is plain values. What is not part of
the work that is compared (reading, compiling, turning the answer into figures) happens outside ``run``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

__all__ = [
    "TASKS",
    "WARM_GRID",
    "Job",
    "eigen_job",
    "graph_job",
    "load_graph",
    "residual_of",
    "save_graph",
    "size_of",
    "task",
    "warm_features",
    "warm_graph",
]


class Job(NamedTuple):
    """What is timed, and what turns its answer into plain values."""

    run: Callable[[], Any]
    describe: Callable[[Any], dict[str, Any]]


TASKS: dict[str, Callable[..., Job]] = {}
# Enough for a kernel to be compiled and run once, and for every solver to work.
WARM_GRID = (24, 24)


def task(name: str) -> Callable[[Callable[..., Job]], Callable[..., Job]]:
    """Give a task its name."""

    def register(function: Callable[..., Job]) -> Callable[..., Job]:
        TASKS[name] = function
        return function

    return register


def save_graph(graph: csr_array, folder: Any, name: str) -> dict[str, str]:
    """Write an affinity to files and return the inputs that name them."""
    parts = {}
    for part in ("data", "indices", "indptr"):
        parts[part] = str(folder / f"{name}-{part}.npy")
        np.save(parts[part], getattr(graph, part))
    return parts


def load_graph(data: str, indices: str, indptr: str) -> csr_array:
    """Read what :func:`save_graph` wrote."""
    start = np.load(indptr)
    return csr_array((np.load(data), np.load(indices), start), shape=(len(start) - 1,) * 2)


def warm_features(channels: int, grid: tuple[int, int] = WARM_GRID) -> npt.NDArray[np.float32]:
    """Random features of a small grid, for compiling."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((grid[0] * grid[1], channels), dtype=np.float32)


@cache
def warm_graph() -> csr_array:
    """Affinity of a small grid, for compiling."""
    from sparsespec.affinity import boc_knn_graph

    return boc_knn_graph(warm_features(8), 8, grid=WARM_GRID, radius=1)


def graph_job(features: Any, run: Callable[[Any], Any], warm: Any) -> Job:
    """Time something that makes a graph or neighbour lists of features; describe how large it is."""
    run(warm)
    return Job(lambda: run(features), size_of)


def size_of(found: Any) -> dict[str, Any]:
    """Edges and bytes of a graph; nothing of neighbour lists."""
    if isinstance(found, csr_array):
        size = sum(part.nbytes for part in (found.data, found.indices, found.indptr))
        return {"edges": int(found.nnz), "graph_bytes": size}
    return {}


def residual_of(
    laplacian: Any, vectors: npt.NDArray[np.floating[Any]]
) -> tuple[float, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Judge what a solver gave: the best pairs in the span of its vectors.

    Returns
    -------
    largest : float
        The largest residual ||L u - lambda u|| of those pairs.
    residuals, values : (k,) arrays
        In the order of the eigenvalues.
    """
    basis, _ = np.linalg.qr(np.asarray(vectors, np.float64))
    image = laplacian @ basis
    small = basis.T @ image
    values, rotation = np.linalg.eigh((small + small.T) / 2)
    residuals = np.linalg.norm(image @ rotation - (basis @ rotation) * values, axis=0)
    return float(residuals.max()), residuals, values


def eigen_job(
    graph: csr_array, run: Callable[[csr_array], Any], read: Callable[[Any], Any] = lambda found: found
) -> Job:
    """Time a solver and describe its vectors (N, k) by their residuals.

    ``read`` takes the vectors, unit length or not, out of what ``run`` returned.
    """
    run(warm_graph())

    @cache
    def laplacian() -> Any:
        from sparsespec import spectral

        return spectral.laplacian(graph)

    def describe(found: Any) -> dict[str, Any]:
        vectors = np.asarray(read(found), np.float64)
        if not np.isfinite(vectors).all():
            raise ValueError("some entries of the vectors are not finite")
        largest, _, values = residual_of(laplacian(), vectors)
        return {
            "residual": largest,
            "values": values.tolist(),
            "iterations": getattr(found, "iterations", None),
            "solver": getattr(found, "solver", None),
        }

    return Job(lambda: run(graph), describe)
