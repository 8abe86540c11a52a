from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsespec.evaluation.datasets import DatasetError, open_dataset

PEOPLE = np.zeros((6, 8), np.uint8)
PEOPLE[1:5, 1:3] = 1
PEOPLE[2:6, 5:7] = 2


@pytest.fixture
def root(make: Any) -> Any:
    for name in ("FudanPed00001", "PennPed00007"):
        make.photo(f"PennFudanPed/PNGImages/{name}.png")
        make.labels(f"PennFudanPed/PedMasks/{name}_mask.png", PEOPLE)
        make.text(f"PennFudanPed/Annotation/{name}.txt", "# Compatible with PASCAL Annotation Version 1.00")
    return make.root / "PennFudanPed"


def test_pedestrians(root: Any, make: Any) -> None:
    make.photo("PennFudanPed/PNGImages/PennPed00008.png")
    make.labels("PennFudanPed/PedMasks/PennPed00009_mask.png", PEOPLE)
    dataset = open_dataset("penn-fudan", make.root)
    assert dataset.name == "Penn-Fudan"
    assert [example.name for example in dataset] == ["FudanPed00001", "PennPed00007"]
    assert dataset.examples[0].image == root / "PNGImages/FudanPed00001.png"
    assert (dataset.without_truth, dataset.without_image) == (("PennPed00008",), ("PennPed00009",))
    np.testing.assert_array_equal(dataset.examples[1].load().masks, [PEOPLE == 1, PEOPLE == 2])


def test_errors_say_what_belongs_where(root: Any, make: Any) -> None:
    with pytest.raises(DatasetError, match="a set of kind 'penn-fudan' has no splits"):
        open_dataset("penn-fudan", root, split="train")
    with pytest.raises(DatasetError, match=r"it looks as if you meant '.*/PennFudanPed'"):
        open_dataset("penn-fudan", root / "PNGImages")
    (root / "PNGImages").rename(make.root / "photos")
    with pytest.raises(DatasetError, match=r"images are missing: they belong in '.*/PNGImages'; .* holds Annotation/"):
        open_dataset("penn-fudan", root)
    assert len(open_dataset("penn-fudan", root, images=make.root / "photos")) == 2
    make.labels("PennFudanPed/PedMasks/strange.png", PEOPLE)
    with pytest.raises(DatasetError, match=r"strange\.png' is not called <name>_mask\.png"):
        open_dataset("penn-fudan", root)
    (root / "PedMasks").rename(root / "Masks")
    with pytest.raises(
        DatasetError, match=r"PNGImages/ and PedMasks/ \(of PennFudanPed\.zip.* holds Annotation/, Masks/"
    ):
        open_dataset("penn-fudan", root)
