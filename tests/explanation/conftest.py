from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from skimage import data

from sparsespec import affinity
from sparsespec.backbone import Backbone
from sparsespec.explanation import Explanation, explain
from sparsespec.explanation.stages import Graph, Similarity, Spectrum
from sparsespec.pipeline import Segmenter

SIDE = 224


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return Backbone()


@pytest.fixture(scope="session")
def astronaut() -> np.ndarray:
    return data.astronaut()[::2, ::2]


@pytest.fixture(scope="session")
def segmenter(backbone: Backbone) -> Segmenter:
    return Segmenter(backbone, long_side=SIDE)


@pytest.fixture(scope="session")
def made(segmenter: Segmenter, astronaut: np.ndarray) -> Explanation:
    return explain(segmenter, astronaut, name="astronaut.jpg")


@pytest.fixture(scope="session")
def plain(backbone: Backbone, astronaut: np.ndarray) -> Explanation:
    """Without directions."""
    return explain(Segmenter(backbone, long_side=SIDE, directions=None), astronaut, name="plain")


@pytest.fixture(scope="session")
def paper(backbone: Backbone, astronaut: np.ndarray) -> Explanation:
    return explain(Segmenter(backbone, long_side=SIDE, method="paper", n_instances=3), astronaut, name="paper")


@pytest.fixture(scope="session")
def nothing(segmenter: Segmenter) -> Explanation:
    return explain(segmenter, np.zeros((30, 44, 3), np.uint8), name="nothing")


@pytest.fixture(scope="session")
def one_pixel(segmenter: Segmenter) -> Explanation:
    return explain(segmenter, np.full((1, 1, 3), 90, np.uint8), name="one pixel")


@pytest.fixture(scope="session")
def one_token(backbone: Backbone, astronaut: np.ndarray) -> Explanation:
    return explain(Segmenter(backbone, long_side=14), astronaut, name="one token")


def _enlarged(made: Explanation, times: int) -> Explanation:
    """Repeat every token so many times both ways: what an image of so many times the tokens gives, without its cost."""

    def repeat(values: Any, axes: tuple[int, int]) -> Any:
        return values.repeat(times, axis=axes[0]).repeat(times, axis=axes[1])

    def of_tokens(values: np.ndarray) -> np.ndarray:
        on_grid = values.reshape(*made.grid, *values.shape[1:])
        return np.asarray(repeat(on_grid, (0, 1)).reshape(-1, *values.shape[1:]))

    assert made.graph is not None
    assert made.graph.position is not None
    assert made.candidates is not None
    grid = (made.grid[0] * times, made.grid[1] * times)
    features = tuple(of_tokens(f) for f in made.similarity.features)
    graph = affinity.local_affinity(features, grid)
    foreground = dataclasses.replace(
        made.foreground,
        share=repeat(made.foreground.share, (0, 1)),
        maps=tuple(
            dataclasses.replace(m, raw=of_tokens(m.raw), smoothed=of_tokens(m.smoothed)) for m in made.foreground.maps
        ),
    )
    layers = {name: repeat(layer, (0, 1)) for name, layer in made.result.layers.items()}
    return dataclasses.replace(
        made,
        name="large",
        result=dataclasses.replace(made.result, layers=layers),
        grid=grid,
        extent=(made.extent[0] * times, made.extent[1] * times),
        token_side=made.token_side / times,
        similarity=Similarity("boc", features, made.similarity.divisors, 25.0),
        graph=Graph(graph, graph, of_tokens(made.graph.position)),
        spectrum=Spectrum(made.spectrum.values, repeat(made.spectrum.vectors, (1, 2))),
        foreground=foreground,
        candidates=dataclasses.replace(
            made.candidates, masks=np.array([of_tokens(mask) for mask in made.candidates.masks])
        ),
        masks=repeat(made.masks, (1, 2)),
    )


@pytest.fixture(scope="session")
def large(made: Explanation) -> Explanation:
    """More tokens than the network sees in one piece."""
    return _enlarged(made, 6)
