from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from sparsespec._display import instance_colours
from sparsespec.pipeline import Segmentation


def of_labels(labels: np.ndarray, count: int | None = None) -> Segmentation:
    count = int(labels.max(initial=0)) if count is None else count
    scores = np.linspace(0.9, 0.1, count, dtype=np.float32)
    boxes = np.tile(np.array([[1, 2, 3.5, 4]], np.float32), (count, 1))
    return Segmentation(labels, scores, boxes, {})


def picture(html: str) -> np.ndarray:
    found = re.search(r'src="data:image/png;base64,([^"]+)"', html)
    assert found is not None
    with Image.open(io.BytesIO(base64.b64decode(found[1]))) as image:
        return np.asarray(image)


class _Checker(HTMLParser):
    """Every element that is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def sound(html: str) -> str:
    checker = _Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return html


def test_labels_in_colour_and_a_table() -> None:
    labels = np.zeros((40, 200), np.int32)
    labels[10:30, 20:60] = 1
    labels[10:12, 100:102] = 2
    html = sound(of_labels(labels)._repr_html_())
    assert "<b>2 instances</b> in 200 &times; 40 pixels" in html
    shown = picture(html)
    assert shown.shape == (40, 200, 3)
    assert tuple(shown[20, 40]) == tuple(instance_colours(2)[0])
    rows = re.findall(r"</span> (\d+)</td><td>([^<]+)</td><td>([^<]+)</td><td>([^<]+)</td>", html)
    assert rows == [("1", "0.90", "10.0%", "1 2 3.5 4"), ("2", "0.10", "0.1%", "1 2 3.5 4")]


def test_no_instances() -> None:
    html = sound(of_labels(np.zeros((3, 5), np.uint8))._repr_html_())
    assert "no instances" in html
    assert "<table>" not in html
    # Enlarged, to be seen at all.
    assert max(picture(html).shape) == 160


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint64])
def test_labels_of_any_type(dtype: type) -> None:
    assert "1 instance<" in sound(of_labels(np.ones((4, 4), dtype))._repr_html_())


def test_many_instances_are_not_all_listed() -> None:
    html = sound(of_labels(np.arange(1, 1025).reshape(32, 32))._repr_html_())
    assert html.count("<tr>") == 51
    assert "and 974 more" in html


def test_huge_labels_are_reduced_first() -> None:
    class Counted(np.ndarray):
        """Labels that count how many of them are read."""

        read = 0

        def __getitem__(self, key: object) -> np.ndarray:
            part = np.asarray(super().__getitem__(key))
            Counted.read += part.size
            return part

    labels = np.zeros((2_000, 3_000), np.int32)
    labels[900:910, 500:2500] = 1
    html = sound(of_labels(labels.view(Counted), 1)._repr_html_())
    assert max(picture(html).shape) == 512
    assert "3000 &times; 2000 pixels" in html
    assert 0 < Counted.read <= 341 * 3000
