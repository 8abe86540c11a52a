"""Segment a TIFF that is larger than memory, and write the labels as a tiled TIFF.

python large_tiff.py [SCAN] [--output FOLDER] [--megapixels M]
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

import sparsespec
from sparsespec import formats
from sparsespec.images import ImageReadError, open_image, read_image

TILE = 512


def peak_megabytes() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def make_scan(path: Path, side: int) -> None:
    """Write a scan to try this with: a photograph, much enlarged, tile by tile and so never whole in memory."""
    photograph = read_image("docs/examples/astronaut.jpg")
    height, width = photograph.shape[:2]

    def tiles() -> Iterator[npt.NDArray[np.uint8]]:
        for top in range(0, side, TILE):
            for left in range(0, side, TILE):
                rows = np.arange(top, top + TILE) * height // side % height
                columns = np.arange(left, left + TILE) * width // side % width
                yield photograph[rows[:, None], columns]

    shape, tile = (side, side, 3), (TILE, TILE)
    tifffile.imwrite(path, tiles(), shape=shape, dtype=np.uint8, tile=tile, photometric="rgb", compression="zlib")


def label_tiles(mapped: Path, shape: tuple[int, int]) -> Iterator[npt.NDArray[Any]]:
    for top in range(0, shape[0], TILE):
        # Mapped anew for each row of tiles, so that what was read before leaves this process's memory.
        labels = np.load(mapped, mmap_mode="r")
        for left in range(0, shape[1], TILE):
            tile = labels[top : top + TILE, left : left + TILE]
            yield np.pad(tile, [(0, TILE - length) for length in tile.shape])  # those at the edges too are whole


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scan", nargs="?", type=Path, help="a TIFF in tiles or strips; without one, one is made")
    parser.add_argument("--output", type=Path, default=Path("scanned"))
    parser.add_argument(
        "--megapixels", type=float, default=0.5, help="of the network's input; more finds smaller things"
    )
    parser.add_argument("--side", type=int, default=16_384, help="pixels of the scan that is made")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    segmenter = sparsespec.Segmenter(megapixels=args.megapixels)
    segmenter.warm_up()
    before = peak_megabytes()
    mapped = args.output / "labels.npy"
    try:
        if args.scan is None:
            args.scan = args.output / "scan.tif"
            make_scan(args.scan, args.side)
        with open_image(args.scan) as source:
            rows, columns, _ = source.shape
            # Labels go to a file that is mapped into memory: the system writes pages out when it needs room.
            labels = np.lib.format.open_memmap(mapped, mode="w+", dtype=np.uint16, shape=(rows, columns))
            result = segmenter(source, out=labels)
            overlay = formats.render_overlay(source, labels, result.scores, max_side=1600)
            # Any window can be read by itself, here the middle of the best instance in full resolution.
            x, y, width, height = result.boxes[0].astype(int) if len(result) else (0, 0, columns, rows)
            top, left = y + max(0, height - TILE) // 2, x + max(0, width - TILE) // 2
            detail = source.read(top, left, min(top + TILE, rows), min(left + TILE, columns))
    except ImageReadError as error:
        parser.error(str(error))
    scores = ", ".join(f"{score:.2f}" for score in result.scores)
    del labels, result  # the map with them
    formats.write_overlay_jpeg(args.output / "overlay.jpg", overlay)
    tifffile.imwrite(
        args.output / "labels.tif",
        label_tiles(mapped, (rows, columns)),
        shape=(rows, columns),
        dtype=np.uint16,
        tile=(TILE, TILE),
        compression="zlib",
        bigtiff=rows * columns > 2**31,
    )
    tifffile.imwrite(args.output / "detail.tif", detail)
    mapped.unlink()

    print(f"{columns} x {rows} pixels, {rows * columns * 3 / 1e6:.0f} MB as an array")
    print(f"instances with the scores {scores}" if scores else "no instances")
    print(f"memory: {before:.0f} MB with the network, {peak_megabytes() - before:.0f} MB more at the most")
    print(f"{args.output / 'labels.tif'}, overlay.jpg, detail.tif")


if __name__ == "__main__":
    main()
