from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner, Result
from PIL import Image

from sparsespec.cli import main
from tests.models.conftest import builds, home, server

__all__ = ["builds", "home", "server"]


@pytest.fixture
def invoke() -> Callable[..., Result]:
    def call(*arguments: object) -> Result:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
        assert "Traceback" not in result.output
        return result

    return call


def bright_pixels(image: np.ndarray) -> Any:
    """Stand in for the segmenter: everything bright is one object."""
    bright = image.max(axis=2) > np.iinfo(image.dtype).max // 2
    labels = bright.astype(np.int32)
    scores = np.full(int(bright.any()), 0.5, np.float32)
    return SimpleNamespace(labels=labels, scores=scores, info={"seconds": {"features": 0.0}})


@pytest.fixture
def fake_segmenter(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replace the model; the list says what the command would have built."""
    built: list[tuple[Any, ...]] = []

    def build(ctx: object, *arguments: Any) -> Callable[[np.ndarray], Any]:
        built.append(arguments)
        return bright_pixels

    monkeypatch.setattr("sparsespec.cli.run._segmenter", build)
    return built


def _scene(width: int = 64, height: int = 48) -> np.ndarray:
    pixels = np.full((height, width, 3), 40, np.uint8)
    pixels[height // 4 : height * 3 // 4, width // 4 : width // 2] = [230, 200, 60]
    return pixels


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Every kind of file that people feed to such a command: ``good/`` and ``bad/``."""
    good, bad = tmp_path / "zoo" / "good", tmp_path / "zoo" / "bad"
    good.mkdir(parents=True)
    bad.mkdir()
    scene = Image.fromarray(_scene())
    scene.save(good / "plain.jpg", quality=95)
    Image.fromarray(np.full((1, 1, 3), 200, np.uint8)).save(good / "one-pixel.png")
    Image.fromarray(_scene(4000, 3)).save(good / "strip.png")
    scene.convert("L").save(good / "grey.png")
    scene.convert("RGBA").save(good / "alpha.png")
    scene.quantize(8).save(good / "palette.png")
    scene.convert("CMYK").save(good / "cmyk.jpg", quality=95)
    Image.fromarray(np.asarray(scene.convert("L")).astype(np.uint16) * 257).save(good / "deep.png")
    tifffile.imwrite(good / "deep-colour.tif", _scene().astype(np.uint16) * 257, photometric="rgb")
    exif = Image.Exif()
    exif[274] = 6
    scene.save(good / "rotated.jpg", exif=exif, quality=95)
    scene.save(good / "animated.gif", save_all=True, append_images=[Image.new("RGB", scene.size)])
    Image.new("RGB", (50, 40)).save(good / "black.png")

    whole = (good / "plain.jpg").read_bytes()
    (bad / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (bad / "empty.jpg").write_bytes(b"")
    (bad / "text.jpg").write_text("this is a letter, not a photograph")
    return tmp_path / "zoo"
