"""Zero instances is an answer: pictures with nothing in them."""

from __future__ import annotations

import numpy as np
import pytest

from sparsespec import Backbone, Segmenter
from tests.blank import BLANK, picture


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter(Backbone(threads=1))


def seen_in(segmenter: Segmenter, names: list[str]) -> list[str]:
    """In which of the pictures something was found."""
    return [name for name in names if len(segmenter(picture(BLANK[name]())))]


@pytest.mark.parametrize("name", ["brick", "gravel", "clouds", "grey wall with vignetting", "bathroom tiles"])
def test_nothing_is_found_in_nothing(segmenter: Segmenter, name: str) -> None:
    assert seen_in(segmenter, [name]) == []


@pytest.mark.slow
@pytest.mark.parametrize("with_directions", [True, False])
def test_next_to_nothing_is_found_in_many_pictures_of_nothing(with_directions: bool) -> None:
    segmenter = Segmenter(Backbone(threads=1), directions="default" if with_directions else None)
    assert len(BLANK) >= 20
    found = seen_in(segmenter, list(BLANK))
    assert len(found) <= 2, found


def test_the_pictures_differ() -> None:
    pictures = [picture(make()) for make in BLANK.values()]
    for image in pictures:
        assert image.dtype == np.uint8
        assert min(image.shape[:2]) >= 300
        # Light and colour that photographs have, and nothing cut off.
        assert 4 < image.mean() < 251
        assert np.mean(image.min(axis=2) == 255) < 0.2
    assert len({image.tobytes() for image in pictures}) == len(pictures)


@pytest.mark.parametrize("count", [1, 3])
def test_whoever_gives_a_count_gets_so_many(count: int) -> None:
    found = Segmenter(Backbone(threads=1), count, long_side=224)(picture(BLANK["blue sky"]()))
    assert len(found) == count
    assert np.bincount(found.labels.ravel(), minlength=count + 1)[1:].min() > 0
