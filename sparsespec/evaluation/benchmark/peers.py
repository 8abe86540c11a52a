"""The peers: other libraries at the same work, each with the settings that suit it best among those tried."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.csgraph import laplacian as csgraph_laplacian
from scipy.sparse.linalg import LinearOperator, eigsh, splu
from scipy.spatial.distance import cdist

from sparsespec.evaluation.benchmark.jobs import Job, eigen_job, graph_job, load_graph, task, warm_features

__all__ = ["NEEDS", "OPTIONAL", "missing"]

# What the peers beyond SciPy import, and which distributions bring it.
NEEDS = {
    "scikit-learn": ("sklearn",),
    "pynndescent": ("pynndescent",),
    "ncut-pytorch": ("torch", "ncut_pytorch"),
    "torch": ("torch",),
}
INSTALL = "pip install 'sparsespec[peers]'"
# What of ours is optional, and is compared like a peer: imports, and what to install.
OPTIONAL = {
    "onnx": ("onnx", "pip install 'sparsespec[build]'"),
    "openvino": ("openvino", "pip install 'sparsespec[openvino]'"),
}

_BLOCK = 256


def missing(peer: str) -> str | None:
    """Say what is to be done about a peer that isn't installed; None if it is, or needs nothing."""
    if peer in OPTIONAL:
        module, install = OPTIONAL[peer]
        return None if importlib.util.find_spec(module) is not None else f"not installed: {install}"
    if all(importlib.util.find_spec(module) is not None for module in NEEDS.get(peer, ())):
        return None
    return f"not installed: {INSTALL}"


@task("scipy exact")
def scipy_exact(features: str, n_neighbors: int) -> Job:
    """Neighbour lists over all tokens from two ``cdist`` and an ``argpartition``, a block of rows at a time.

    The blocks only keep the distances in the cache; whole matrices take longer. ``cdist`` uses one thread.
    """

    def run(array: npt.NDArray[np.float32]) -> Any:
        points = array.astype(np.float64)
        size = len(points)
        neighbours = np.empty((size, n_neighbors), np.int64)
        weights = np.empty((size, n_neighbors))
        for start in range(0, size, _BLOCK):
            part = points[start : start + _BLOCK]
            rows = np.arange(len(part))
            affinity = cdist(part, points, "chebyshev")
            affinity += 1.0
            affinity /= 1.0 + cdist(part, points, "braycurtis")
            affinity[rows, start + rows] = -1.0
            nearest = np.argpartition(affinity, size - n_neighbors, axis=1)[:, size - n_neighbors :]
            neighbours[start : start + len(part)] = nearest
            weights[start : start + len(part)] = affinity[rows[:, None], nearest]
        return neighbours, weights

    return graph_job(np.load(features), run, warm_features(8))


@cache
def _reciprocal_of_boc() -> Any:
    """Compile a metric for pynndescent, once: all its code is compiled anew for every metric it is given."""
    import numba

    @numba.njit(fastmath=True)
    def distance(u, v):  # type: ignore[no-untyped-def]
        # The nearest have the smallest, and none is negative.
        difference = np.float32(0.0)
        total = np.float32(0.0)
        largest = np.float32(0.0)
        for c in range(u.shape[0]):
            d = abs(u[c] - v[c])
            difference += d
            total += abs(u[c] + v[c])
            largest = max(largest, d)
        if total == 0.0:
            return np.float32(np.inf)
        return (np.float32(1.0) + difference / total) / (np.float32(1.0) + largest)

    return distance


@task("pynndescent")
def pynndescent(features: str, n_neighbors: int, tokens: str, options: dict[str, Any]) -> Job:
    """Neighbours by NN-descent with our affinity as a compiled metric."""
    import numba

    # The peers' modules have no types, or aren't installed where types are checked.
    search_index = importlib.import_module("pynndescent").NNDescent
    distance = _reciprocal_of_boc()
    array, sample = np.load(features), np.load(tokens)

    def search(points: npt.NDArray[np.float32]) -> Any:
        return search_index(points, metric=distance, random_state=0, n_jobs=numba.get_num_threads(), **options)

    def describe(index: Any) -> dict[str, Any]:
        found = index.neighbor_graph[0][sample]
        # It lists a token itself among its neighbours, and may be asked for more than are compared.
        others = [[int(j) for j in row if j != i][:n_neighbors] for i, row in zip(sample, found, strict=True)]
        return {"neighbours": others}

    search(warm_features(array.shape[1]))
    return Job(lambda: search(array), describe)


def _normalised(graph: sparse.csr_array) -> Any:
    return csgraph_laplacian(graph, normed=True)


@task("shift-invert")
def shift_invert(data: str, indices: str, indptr: str, k: int, tol: float) -> Job:
    """ARPACK on (L + 1e-5 I)^-1, factored by SuperLU in symmetric mode.

    That and minimum degree on A + A' take two thirds of the time of eigsh's own factorisation, or less.
    """

    def run(graph: sparse.csr_array) -> Any:
        laplacian = _normalised(graph)
        n = laplacian.shape[0]
        factors = splu(
            sparse.csc_matrix(laplacian + 1e-5 * sparse.eye_array(n)),
            permc_spec="MMD_AT_PLUS_A",
            diag_pivot_thresh=0.0,
            options={"SymmetricMode": True},
        )
        inverse = LinearOperator((n, n), matvec=factors.solve, dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(n)
        return eigsh(laplacian, k, sigma=-1e-5, which="LM", OPinv=inverse, tol=tol, v0=start)[1]

    return eigen_job(load_graph(data, indices, indptr), run)


@task("arpack")
def arpack(data: str, indices: str, indptr: str, k: int, tol: float) -> Job:
    """ARPACK for the largest eigenvalues of 2I - L, no factorisation."""

    def run(graph: sparse.csr_array) -> Any:
        laplacian = sparse.csr_array(_normalised(graph))
        n = laplacian.shape[0]
        flipped = 2.0 * sparse.eye_array(n, format="csr") - laplacian
        start = np.random.default_rng(0).standard_normal(n)
        # ARPACK's tolerance is relative to eigenvalues of nearly 2.
        return eigsh(flipped, k, which="LA", tol=tol / 2, v0=start, ncv=max(20, 2 * k + 1), maxiter=100 * n)[1]

    return eigen_job(load_graph(data, indices, indptr), run)


def _sklearn(graph: sparse.csr_array, k: int, eigen_solver: str, tol: float) -> Job:
    spectral_embedding = importlib.import_module("sklearn.manifold").spectral_embedding
    # It returns D^-1/2 u.
    root = np.sqrt(np.asarray(graph.sum(axis=1)))[:, None]

    def run(affinity: sparse.csr_array) -> Any:
        return spectral_embedding(
            sparse.csr_matrix(affinity),
            n_components=k,
            eigen_solver=eigen_solver,
            eigen_tol=tol,
            random_state=0,
            drop_first=False,
        )

    return eigen_job(graph, run, lambda embedding: embedding * root)


@task("sklearn amg")
def sklearn_amg(data: str, indices: str, indptr: str, k: int, tol: float) -> Job:
    """scikit-learn's spectral embedding: LOBPCG with PyAMG."""
    return _sklearn(load_graph(data, indices, indptr), k, "amg", tol)


@task("sklearn arpack")
def sklearn_arpack(data: str, indices: str, indptr: str, k: int, tol: float) -> Job:
    """scikit-learn's spectral embedding: shift-invert."""
    return _sklearn(load_graph(data, indices, indptr), k, "arpack", tol)


@task("ncut-pytorch")
def ncut_pytorch(data: str, indices: str, indptr: str, k: int, features: str) -> Job:
    """ncut-pytorch: from the features, by sampling tokens; it can't be given a graph.

    Its affinity is its own, so its vectors are only judged by the residual on our Laplacian.
    """
    torch = importlib.import_module("torch")
    ncut_fn = importlib.import_module("ncut_pytorch").ncut_fn
    tensor = torch.from_numpy(np.load(features))
    graph = load_graph(data, indices, indptr)

    def run(points: Any) -> Any:
        with torch.no_grad():
            return ncut_fn(points, n_eig=k, device="cpu")[0]

    # Large enough for its sampling to begin, so that all its code has run once.
    run(torch.from_numpy(np.random.default_rng(0).standard_normal((9000, tensor.shape[1]), dtype=np.float32)))
    job = eigen_job(graph, lambda _: None, lambda found: found.numpy())
    return Job(lambda: run(tensor), job.describe)
