from __future__ import annotations

import io
from base64 import b64decode

import numpy as np
from PIL import Image

from sparsespec._display import BACKGROUND, coloured_labels, instance_colours, png_bytes, png_uri, reduced_labels
from sparsespec.formats import overlay


def test_one_palette_for_all_pictures() -> None:
    assert overlay.instance_colours is instance_colours


def test_labels_are_reduced_to_the_nearest_pixels() -> None:
    labels = np.kron(np.arange(6).reshape(2, 3), np.ones((100, 100), int)).astype(np.uint8)
    assert np.array_equal(reduced_labels(labels, 3), [[0, 1, 2], [3, 4, 5]])
    assert reduced_labels(labels, 60).shape == (40, 60)
    assert np.array_equal(reduced_labels(labels, 1000), labels)
    assert reduced_labels(np.zeros((1, 5000), np.int32), 512).shape == (1, 512)


def test_colours_and_outlines() -> None:
    labels = np.zeros((6, 6), int)
    labels[2:5, 2:5] = 2
    picture = coloured_labels(labels)
    assert tuple(picture[3, 3]) == tuple(instance_colours(2)[1])
    assert tuple(picture[0, 0]) == BACKGROUND
    assert picture[1, 3].max() < 25
    assert coloured_labels(np.zeros((2, 2), int)).tolist() == [[list(BACKGROUND)] * 2] * 2


def test_png_there_and_back() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(pixels)))), pixels)
    assert b64decode(png_uri(pixels).partition(",")[2]) == png_bytes(pixels)
