"""Our own tasks: what the peers are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec.evaluation.benchmark.jobs import (
    WARM_GRID,
    Job,
    eigen_job,
    graph_job,
    load_graph,
    size_of,
    task,
    warm_features,
)

# A grid on which every path that large ones take is compiled: threads, levels, multigrid.
_WARM_LARGE = (80, 80)


@task("exact")
def exact(features: str, n_neighbors: int) -> Job:
    """Ours: the k-NN graph over all tokens."""
    from sparsespec.affinity import boc_knn_graph

    return graph_job(
        np.load(features),
        lambda array: boc_knn_graph(array, n_neighbors, method="exact"),
        warm_features(np.load(features, mmap_mode="r").shape[1], _WARM_LARGE),
    )


@task("naive exact")
def naive_exact(features: str, n_neighbors: int) -> Job:
    """Neighbour lists over all tokens by two loops."""
    from sparsespec.evaluation.benchmark import naive

    def run(array: npt.NDArray[np.float32]) -> Any:
        found = _empty_lists(len(array), n_neighbors)
        naive.nearest_of_all(array, np.arange(len(array)), *found)
        return found

    return graph_job(np.load(features), run, warm_features(8))


@task("windowed")
def windowed(features: str, grid: tuple[int, int], radius: int, n_neighbors: int) -> Job:
    """Ours: the k-NN graph within a window."""
    from sparsespec.affinity import boc_knn_graph

    array = np.load(features)
    boc_knn_graph(warm_features(array.shape[1], _WARM_LARGE), n_neighbors, grid=_WARM_LARGE, radius=radius)
    return Job(lambda: boc_knn_graph(array, n_neighbors, grid=(grid[0], grid[1]), radius=radius), size_of)


@task("naive windowed")
def naive_windowed(features: str, grid: tuple[int, int], radius: int, n_neighbors: int) -> Job:
    """Neighbour lists within a window by loops over its rows and columns."""
    from sparsespec.evaluation.benchmark import naive

    array = np.load(features)

    def run(array: npt.NDArray[np.float32], width: int) -> Any:
        found = _empty_lists(len(array), min(n_neighbors, (2 * radius + 1) ** 2 - 1))
        naive.nearest_of_window(array, width, radius, *found)
        return found

    run(warm_features(8), WARM_GRID[1])
    return Job(lambda: run(array, grid[1]), size_of)


@task("approximate")
def approximate(features: str, grid: tuple[int, int], n_neighbors: int, tokens: str) -> Job:
    """Ours: approximate neighbours of all tokens."""
    from sparsespec.neighbors import approximate_neighbors as search

    array, sample = np.load(features), np.load(tokens)
    search(warm_features(array.shape[1], _WARM_LARGE), n_neighbors, grid=_WARM_LARGE)

    def describe(found: Any) -> dict[str, Any]:
        neighbours, _, counts = found
        # What lies beyond a token's count is not a neighbour.
        listed = np.where(np.arange(neighbours.shape[1]) < np.asarray(counts)[:, None], neighbours, -1)
        return {"neighbours": listed[sample].tolist()}

    return Job(lambda: search(array, n_neighbors, grid=(grid[0], grid[1])), describe)


def _empty_lists(tokens: int, room: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    return np.full((tokens, room), -1, np.int32), np.zeros((tokens, room), np.float32)


@task("eigenpairs")
def eigenpairs(data: str, indices: str, indptr: str, k: int, solver: str, tol: float) -> Job:
    """Ours: the smallest eigenpairs, by the policy or by a named solver."""
    from sparsespec.affinity import boc_knn_graph
    from sparsespec.spectral import smallest_eigenpairs

    if solver != "dense":
        # Both of the solvers that it may come to.
        warm = boc_knn_graph(warm_features(8, _WARM_LARGE), 8, grid=_WARM_LARGE, radius=1)
        for name in ("arpack", "amg-lobpcg"):
            smallest_eigenpairs(warm, k, solver=name, tol=tol)
    return eigen_job(
        load_graph(data, indices, indptr),
        lambda graph: smallest_eigenpairs(graph, k, solver=solver, tol=tol),
        lambda found: found.vectors,
    )


def _segmenter(max_tokens: int | None = None, **options: Any) -> Any:
    from sparsespec.backbone import Backbone
    from sparsespec.pipeline import Segmenter

    return Segmenter(Backbone() if max_tokens is None else Backbone(max_tokens=max_tokens), **options)


@task("segment")
def segment(image: str, method: str = "sparse", n_instances: int | None = None, long_side: int | None = None) -> Job:
    """Ours, or the published method: one photograph in memory; with another than the default size for the network."""
    picture = np.load(image)
    small = _segmenter(method=method, n_instances=n_instances)
    small(_small(picture))
    segmenter = small if long_side is None else _segmenter(long_side=long_side)

    def describe(found: Any) -> dict[str, Any]:
        return {
            "stages": found.info["seconds"],
            "tokens": found.info["tokens"],
            "instances": len(found.scores),
            "crops": found.info.get("crops", 0),
        }

    return Job(lambda: segmenter(picture), describe)


@task("segment file")
def segment_file(path: str) -> Job:
    """Ours: one file, read the way large files are."""
    from sparsespec import images

    segmenter = _segmenter()
    segmenter(np.zeros((64, 64, 3), np.uint8))

    def run() -> Any:
        with images.open_image(path, max_pixels=None) as source:
            height, width = source.shape[:2]
            if height * width < images.LARGE_IMAGE:
                return segmenter(source.read(0, 0, height, width))
            # As a run does it: labels that may be larger than the memory are mapped from a file.
            return segmenter(source, out=np.memmap(f"{path}.labels", np.uint16, "w+", shape=(height, width)))

    return Job(run, lambda found: {"tokens": found.info["tokens"], "stages": found.info["seconds"]})


@task("seams")
def seams(image: str, long_side: int, max_tokens: int) -> Job:
    """Ours: the same photograph in one piece and in tiles."""
    from sparsespec.evaluation.benchmark.seams import agreement

    picture = np.load(image)
    whole = _segmenter(max_tokens=1 << 20, long_side=long_side)
    tiled = _segmenter(max_tokens=max_tokens, long_side=long_side)

    def describe(found: tuple[Any, Any]) -> dict[str, Any]:
        one, many = found
        return {
            "agreement": agreement(one.labels, many.labels),
            "tokens": one.info["tokens"],
            "tiles": [one.info["tiles"], many.info["tiles"]],
            "instances": [len(one.scores), len(many.scores)],
        }

    return Job(lambda: (whole(picture), tiled(picture)), describe)


def _small(picture: npt.NDArray[Any]) -> npt.NDArray[Any]:
    step = max(1, max(picture.shape[:2]) // 256)
    return np.ascontiguousarray(picture[::step, ::step])
