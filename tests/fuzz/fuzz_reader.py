"""Coverage-guided fuzzing of the image reader with Atheris; see README.md beside this file."""

from __future__ import annotations

import os
import random
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

with atheris.instrument_imports(
    include=["sparsespec.images", "sparsespec._tiff", "sparsespec._jpeg", "tifffile", "PIL"]
):
    import tifffile
    from PIL import Image

    from sparsespec import images

    Image.init()
    images._formats()
import malformed

assert tifffile
MOST_PIXELS = 1 << 20
WHOLE = images._WHOLE_TIFF
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
FILE = FOLDER / "input"


def read(page: int) -> None:
    try:
        with images.open_image(FILE, page=page, max_pixels=MOST_PIXELS) as source:
            height, width, _ = source.shape
            for top in range(0, min(height, 600), 200):
                bottom, right = min(height, top + 200), min(width, 200)
                pixels = source.read(top, 0, bottom, right)
                assert pixels.shape == (bottom - top, right, 3)
                assert pixels.dtype.name in ("uint8", "uint16")
    except images.ImageReadError as error:
        if error.path != str(FILE) or not error.reason or not error.advice or "\n" in str(error):
            raise AssertionError(f"an error that says too little: {error!r}") from error


def test_one_input(data: bytes) -> None:
    """Read an input as a file, every page whole and in pieces; nothing but ImageReadError may come out."""
    FILE.write_bytes(data)
    try:
        pages = images.count_pages(FILE)
    except images.ImageReadError:
        pages = 1
    tiff = data[:2] in (b"II", b"MM")
    for page in range(min(pages, 3)):
        images._WHOLE_TIFF = WHOLE
        read(page)
        if tiff:
            images._WHOLE_TIFF = 0
            read(page)


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Change bytes as libFuzzer does, or what they mean in their format; checksums of PNG are made good at times."""
    rng = random.Random(seed)
    choice = rng.random()
    if len(data) < 16 or choice < 0.4:
        result = bytes(atheris.Mutate(data, min(most, 1 << 16)))
        if choice < 0.2 and result.startswith(b"\x89PNG"):
            result = malformed.png(malformed.png_chunks(result))
    else:
        kind = malformed.kind_of(data)
        # What inflates to 64 MB costs too much time here; the malformed files of the tests have it.
        special = [change for change in malformed.SPECIAL[kind] if change.__name__ not in ("png_extra", "png_filters")]
        result = rng.choice((*malformed.GENERAL, *special, *special))(rng, data)
    return result[:most]


def main() -> None:
    """Run libFuzzer with the arguments of the command line."""
    warnings.simplefilter("error")
    atheris.Setup(sys.argv, test_one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
