"""Tables of instances, as pandas and pyarrow read them."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas
import pyarrow.parquet
import truth
from PIL import Image


def check(table: pandas.DataFrame, run: Path, photographs: Path, tool: str, reads: str) -> None:
    """Compare every column with what the label images and photographs say."""
    expected = []
    for true, label, mask in truth.by_instance(truth.read(run)):
        pixels = np.asarray(Image.open(photographs / true.path).convert("RGB"), float)[mask].mean(axis=0) / 255
        y, x = np.nonzero(mask)
        left, top, right, bottom = truth.box(mask)
        height, width = mask.shape
        about = [true.path, width, height, label, true.row["scores"][label - 1], int(mask.sum())]
        expected.append([*about, left, top, right - left, bottom - top, x.mean(), y.mean(), *pixels, true.row["mask"]])
    names = ["file_name", "image_width", "image_height", "label", "score", "area", "x", "y", "width", "height"]
    names += ["centroid_x", "centroid_y", "mean_red", "mean_green", "mean_blue", "mask"]
    wanted = pandas.DataFrame(expected, columns=names)
    pandas.testing.assert_frame_equal(table[names], wanted, check_dtype=False, atol=1e-6, rtol=0)
    assert table["page"].isna().all()
    assert table["image_id"].is_monotonic_increasing
    truth.report(tool, reads, f"{len(table)} rows, all columns equal (means and centroids to 1e-6)", True)


output = Path(sys.argv[1])
photographs = output / "photographs"
check(
    pandas.read_csv(output / "runs" / "instances.csv"), output / "runs", photographs, version("pandas"), "table as CSV"
)
path, reads = output / "outlines" / "instances.parquet", "table as Parquet"
check(pandas.read_parquet(path), output / "outlines", photographs, version("pandas"), reads)
arrow = pandas.DataFrame(pyarrow.parquet.read_table(path).to_pylist())
check(arrow, output / "outlines", photographs, f"pyarrow {version('pyarrow')}", reads)
