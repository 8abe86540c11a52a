"""Measure what is in a photograph with scikit-image: instances, borders by watershed, a table and a picture.

python scikit_image.py [PHOTOGRAPH] [--output FOLDER]
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from skimage import color, filters, io, measure, morphology, segmentation

import sparsespec
from sparsespec.images import ImageReadError, read_image

Labels = npt.NDArray[np.integer[Any]]
PROPERTIES = ("label", "centroid", "area", "equivalent_diameter_area", "eccentricity", "solidity", "intensity_mean")


def snapped(labels: Labels, image: npt.NDArray[Any], band: int) -> Labels:
    """Move the borders of instances to the strongest edge within `band` pixels of where they are.

    The labels are numbers of objects, so every filter here is one that leaves numbers alone. Blurring or opening the
    label image itself would make objects of what lies between two numbers.
    """
    edges = filters.sobel(color.rgb2gray(image))
    inside = labels * morphology.erosion(labels > 0, morphology.disk(band))
    inside *= ~segmentation.find_boundaries(labels, mode="inner")  # instances that touch must not join as seeds
    background = segmentation.expand_labels(labels, band) == 0
    seeds = np.where(background, labels.max() + 1, inside)
    moved = segmentation.watershed(edges, seeds)
    moved[moved == labels.max() + 1] = 0
    # An instance of hardly a band's width has no seed left and keeps its pixels.
    lost = np.isin(labels, np.setdiff1d(labels, moved))
    return np.where(lost, labels, moved)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photograph", nargs="?", default="docs/examples/coins.jpg")
    parser.add_argument("--output", type=Path, default=Path("measured"))
    parser.add_argument("--band", type=int, default=3, help="pixels by which borders may move")
    parser.add_argument("--min-area", type=int, default=100, help="pixels of the smallest object")
    args = parser.parse_args(arguments)
    try:
        image = read_image(args.photograph)
    except ImageReadError as error:
        parser.error(str(error))

    result = sparsespec.segment(image)
    labels = snapped(result.labels, image, args.band)
    labels = segmentation.clear_border(labels)  # what the photograph cuts off has no true size
    labels[np.bincount(labels.ravel())[labels] < args.min_area] = 0

    # Labels stay the numbers of `result`, whatever was removed: scores and boxes are still theirs.
    table = measure.regionprops_table(labels, color.rgb2gray(image), properties=PROPERTIES)
    table["score"] = result.scores[table["label"] - 1]
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "objects.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*(column.tolist() for column in table.values()), strict=True))
    drawn = segmentation.mark_boundaries(image, labels, color=(1, 0.2, 0), mode="thick")
    io.imsave(args.output / "objects.png", (drawn * 255).astype(np.uint8), check_contrast=False)
    io.imsave(args.output / "labels.tif", labels.astype(np.uint16), check_contrast=False)

    diameters = table["equivalent_diameter_area"]
    print(f"{len(result)} instances, {len(diameters)} whole ones of at least {args.min_area} pixels")
    if len(diameters):
        print(f"diameter: {np.median(diameters):.1f} pixels (median), {diameters.min():.1f} to {diameters.max():.1f}")
    print(f"{args.output / 'objects.csv'}, objects.png, labels.tif")


if __name__ == "__main__":
    main()
