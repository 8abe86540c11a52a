from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

import sparsespec
from sparsespec import fitting
from sparsespec.backbone import TokenFeatures
from sparsespec.cli._progress import Progress
from sparsespec.cli.fit import _spread
from sparsespec.directions import Directions

Invoke = Callable[..., Result]

C = 30
SHA = "cd" * 32


class PixelBackbone:
    """Stands in for the network: features of a token are fixed mixtures of its mean colour and of noise."""

    features_sha256 = SHA
    channels = C
    patch_size = 14

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.mixtures = rng.normal(size=(3, 4, C))
        self.noise = rng.normal(0, 0.05, (3, 40 * 40, C))
        self.seen: list[tuple[tuple[int, ...], int]] = []
        self.asked: list[tuple[str, int | None]] = []

    def features(self, image: Any, *, long_side: int) -> TokenFeatures:
        height, width = image.shape[:2]
        self.seen.append((tuple(image.shape), long_side))
        if (height, width) == (60, 61):
            raise MemoryError
        grid = (height // 4, width // 4)
        pixels = image.read(0, 0, grid[0] * 4, grid[1] * 4).astype(float) / 255
        colours = pixels.reshape(grid[0], 4, grid[1], 4, 3).mean(axis=(1, 3)).reshape(-1, 3)
        # Centred colours, and one to tell dark from black.
        tokens = np.column_stack([colours - 0.5, np.full(len(colours), 0.2)])
        kinds = [
            (tokens @ m + n[: len(tokens)]).astype(np.float32) for m, n in zip(self.mixtures, self.noise, strict=True)
        ]
        if (height, width) == (60, 65):
            kinds[0] *= 1e6
        return TokenFeatures(*kinds, grid, 14, (height, width), 3.5, {})


@pytest.fixture
def backbone(monkeypatch: pytest.MonkeyPatch) -> PixelBackbone:
    fake = PixelBackbone()

    def open_backbone(ctx: object, model: str, threads: int | None, **provider: object) -> PixelBackbone:
        assert provider == {"provider": "auto", "provider_options": {}}
        fake.asked.append((model, threads))
        return fake

    monkeypatch.setattr("sparsespec.cli.fit.open_backbone", open_backbone)
    return fake


def photograph(path: Path, number: int = 0, size: tuple[int, int] = (80, 60)) -> None:
    """A bright thing that shades across and down, on a dark ground."""
    rng = np.random.default_rng(number)
    pixels = np.full((size[1], size[0], 3), (30, 40, 50), np.uint8)
    top, left = rng.integers(8, 20), rng.integers(8, 36)
    x, y = np.meshgrid(np.linspace(120, 255, 28), np.linspace(120, 255, 32))
    pixels[top : top + 32, left : left + 28] = np.dstack([np.full_like(x, 240), x, y]).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        photograph(tmp_path / "in" / f"{number}.png", number)
    return tmp_path / "in"


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_folder_of_photographs(invoke: Invoke, backbone: PixelBackbone, folder: Path, tmp_path: Path) -> None:
    photograph(folder / "deeper" / "7.jpg", 7)
    (folder / "notes.txt").write_text("no photograph")
    target = tmp_path / "mine.npz"
    result = invoke("fit", "--input", folder, "--output", target)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"fitted to 7 photographs; directions in {target}",
        f"to use them: sparsespec run --input {folder} --directions {target}",
    ]
    assert result.stderr.splitlines() == ["note: 7 photographs are few; from 20 on directions carry over better"]
    assert backbone.asked == [("default", None)]
    assert backbone.seen == [((60, 80, 3), 448)] * 7
    directions = Directions.load(target)
    assert directions.source_sha256 == SHA
    assert directions.photographs == 7
    assert directions.channels == C
    # They tell the thing from the ground in a photograph that they weren't fitted to.
    photograph(tmp_path / "new.png", 99)
    with Image.open(tmp_path / "new.png") as image:
        pixels = np.asarray(image)
    tokens = backbone.features(Pixels(pixels), long_side=448)
    bright = pixels[::4, ::4, 0].ravel()[: len(tokens.keys)] > 200
    objectness = directions.objectness_of(tokens.keys, tokens.queries, tokens.values)
    assert objectness[bright].mean() > objectness[~bright].mean() + 1


class Pixels:
    def __init__(self, pixels: np.ndarray) -> None:
        self.shape = pixels.shape
        self._pixels = pixels

    def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        return self._pixels[top:bottom, left:right]


def test_same_photographs_same_file(invoke: Invoke, backbone: PixelBackbone, folder: Path, tmp_path: Path) -> None:
    for name in ("one.npz", "two.npz"):
        assert invoke("fit", "--input", folder, "--output", tmp_path / name, "--threads", 1).exit_code == 0
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_options_reach_the_network(invoke: Invoke, backbone: PixelBackbone, folder: Path, tmp_path: Path) -> None:
    result = invoke(
        "fit", "--input", folder, "--output", tmp_path / "a b", "--model", "other.onnx", "--long-side", 672,
        "--threads", 1, "--limit", 3,
    )  # fmt: skip
    assert result.exit_code == 0
    assert backbone.asked == [("other.onnx", 1)]
    assert backbone.seen == [((60, 80, 3), 672)] * 3
    assert Directions.load(tmp_path / "a b").photographs == 3
    # The command can be pasted into a shell.
    assert result.stdout.splitlines()[1] == (
        f"to use them: sparsespec run --input {folder} --directions '{tmp_path}/a b' --model other.onnx"
    )


def test_features_are_held_as_halves(
    invoke: Invoke, backbone: PixelBackbone, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[TokenFeatures] = []
    fit = fitting.fit_directions

    def watched(photographs: list[TokenFeatures], **options: Any) -> Directions:
        held.extend(photographs)
        return fit(photographs, **options)

    monkeypatch.setattr(fitting, "fit_directions", watched)
    assert invoke("fit", "--input", folder, "--output", tmp_path / "mine.npz").exit_code == 0
    assert len(held) == 6
    for tokens in held:
        assert {kind.dtype for kind in (tokens.keys, tokens.queries, tokens.values)} == {np.dtype(np.float16)}


@pytest.mark.parametrize(("count", "limit"), [(1, 300), (10, 300), (10, 10), (10, 4), (10, 1), (1000, 300)])
def test_the_choice_is_spread_evenly(count: int, limit: int) -> None:
    images = tuple(f"{k:04}.jpg" for k in range(count))
    chosen = _spread(images, limit)
    assert len(chosen) == min(count, limit)
    assert chosen == sorted(set(chosen))
    places = np.array([images.index(name) for name in chosen])
    gaps = np.diff(np.concatenate([[-0.5], places + 0.0, [count - 0.5]]))
    step = count / len(chosen)
    assert (np.abs(gaps[1:-1] - step) <= 1).all()
    assert (gaps[[0, -1]] <= step / 2 + 1).all()


def test_bad_photographs_are_listed_and_left_out(
    invoke: Invoke, backbone: PixelBackbone, folder: Path, tmp_path: Path
) -> None:
    (folder / "a-empty.jpg").write_bytes(b"")
    (folder / "b\x1b[2J.jpg").write_text("a letter")
    photograph(folder / "c-large.png", size=(61, 60))
    photograph(folder / "d-wild.png", size=(65, 60))
    result = invoke("fit", "--input", folder, "--output", tmp_path / "mine.npz")
    assert result.exit_code == 1
    listed = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert len(listed) == 4
    assert listed[0] == "failed: a-empty.jpg: it is empty (zero bytes); copy or export it again"
    assert "it is not an image that can be read" in listed[1]
    assert listed[2] == "failed: c-large.png: out of memory (61 x 60 pixels); make the image smaller"
    assert re.match(r"failed: d-wild.png: ValueError: queries must be finite", listed[3])
    assert "\x1b" not in result.output
    assert result.stdout.startswith("fitted to 6 photographs, 4 failed; directions in ")
    assert Directions.load(tmp_path / "mine.npz").photographs == 6


def test_a_folder_that_cannot_be_listed(
    invoke: Invoke, backbone: PixelBackbone, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "closed").mkdir()
    scan = os.scandir

    def guarded(path: Any = ".") -> Any:
        # The superuser, who runs tests in containers, may list everything.
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    result = invoke("fit", "--input", folder, "--output", tmp_path / "mine.npz")
    assert result.exit_code == 1
    assert "failed: closed/: the folder cannot be listed: Permission denied" in result.stderr
    assert result.stdout.startswith("fitted to 6 photographs, 1 failed; ")


def test_nothing_that_can_be_read(invoke: Invoke, backbone: PixelBackbone, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "in" / name).write_bytes(b"")
    result = invoke("fit", "--input", tmp_path / "in", "--output", tmp_path / "mine.npz")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[2:] == [
        "sparsespec: nothing was fitted, nothing written: none of the 2 photographs could be read"
    ]
    assert files(tmp_path) == ["in"]


def test_nothing_to_fit_to(invoke: Invoke, backbone: PixelBackbone, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    backbone.noise[:] = 0
    for number in range(3):
        Image.new("RGB", (80, 60), (90, 90, 90)).save(tmp_path / "in" / f"{number}.png")
    result = invoke("fit", "--input", tmp_path / "in", "--output", tmp_path / "mine.npz")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        "sparsespec: nothing was fitted, nothing written: nothing stands out in any of the 3 photographs: give some"
        " that show objects\n"
    )
    assert files(tmp_path) == ["in"]


def test_a_file_is_replaced_only_when_asked(
    invoke: Invoke, backbone: PixelBackbone, folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "mine.npz"
    target.write_bytes(b"precious")
    arguments = ("fit", "--input", folder, "--output", target)
    refused = invoke(*arguments)
    assert refused.exit_code == 2
    assert "exists: replace it with --overwrite" in " ".join(refused.stderr.split())
    assert target.read_bytes() == b"precious"
    assert backbone.seen == []
    # What can't be fitted replaces nothing either.
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"")
    assert invoke("fit", "--input", tmp_path / "bad", "--output", target, "--overwrite").exit_code == 1
    assert target.read_bytes() == b"precious"
    assert invoke(*arguments, "--overwrite").exit_code == 0
    assert Directions.load(target).photographs == 6


def test_a_full_disk_leaves_the_old_file(
    invoke: Invoke, backbone: PixelBackbone, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "mine.npz"
    target.write_bytes(b"precious")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsespec._atomic.os.fsync", full)
    result = invoke("fit", "--input", folder, "--output", target, "--overwrite")
    assert result.exit_code == 1
    assert f"sparsespec: cannot write {target}: No space left on device" in result.stderr
    assert target.read_bytes() == b"precious"
    assert files(tmp_path) == ["in", "mine.npz"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "{tmp}/mine.npz"), "Missing option '--input'"),
        (("--input", "{in}"), "Missing option '--output'"),
        (("--input", "{tmp}/missing", "--output", "{tmp}/mine.npz"), "missing' does not exist"),
        (("--input", "{tmp}/empty", "--output", "{tmp}/mine.npz"), "holds no image"),
        (("--input", "", "--output", "{tmp}/mine.npz"), "empty string"),
        (("--input", "{in}", "--output", "{tmp}/empty"), "is a directory"),
        (("--input", "{in}", "--output", "{tmp}/nowhere/mine.npz"), "nowhere/mine.npz' does not exist: make it"),
        (("--input", "{in}", "--output", "{tmp}/mine.npz", "--limit", "0"), "'--limit': 0 is not in the range x>=1"),
        (("--input", "{in}", "--output", "{tmp}/mine.npz", "--limit", "all"), "'all' is not a valid integer"),
        (("--input", "{in}", "--output", "{tmp}/mine.npz", "--long-side", "0"), "'--long-side': 0 is not in the range"),
        (("--input", "{in}", "--output", "{tmp}/mine.npz", "--threads", "0"), "'--threads': 0 is not in the range"),
        (("--input", "{in}", "--output", "{tmp}/mine.npz", "surplus"), "unexpected extra argument"),
    ],
)
def test_wrong_usage(
    invoke: Invoke, backbone: PixelBackbone, folder: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    result = invoke("fit", *(option.replace("{in}", str(folder)).replace("{tmp}", str(tmp_path)) for option in options))
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert files(tmp_path) == ["empty", "in"]
    assert backbone.seen == []


@pytest.mark.parametrize("model", ["vit-xxl", "missing.onnx"])
def test_wrong_model(invoke: Invoke, folder: Path, tmp_path: Path, model: str) -> None:
    result = invoke("fit", "--input", folder, "--output", tmp_path / "mine.npz", "--model", model)
    assert result.exit_code == 2
    assert f"cannot use the model '{model}'" in result.stderr
    assert files(tmp_path) == ["in"]


def test_interrupted(
    invoke: Invoke, backbone: PixelBackbone, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "fit_directions", stop)
    result = invoke("fit", "--input", folder, "--output", tmp_path / "mine.npz")
    assert result.exit_code == 128 + signal.SIGINT
    assert result.stderr.strip() == "sparsespec: interrupted"
    assert files(tmp_path) == ["in"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_steps_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(2) as progress:
        progress.show("objectness, round 1 of 3")
        progress.show("x" * 5000)
        assert terminal.getvalue().endswith("x" * 20)
    written = terminal.getvalue()
    assert "] 0/2" in written
    assert "\robjectness, round 1 of 3\r" in written
    assert len(written) < 2000
    assert written.endswith("\r")


def test_no_steps_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(2) as progress:
        progress.show("objectness, round 1 of 3")
    assert stream.getvalue() == ""


@pytest.mark.slow
def test_fitted_with_the_model_and_used_in_a_run(invoke: Invoke, tmp_path: Path) -> None:
    examples = Path(__file__).parents[2] / "docs" / "examples"
    target = tmp_path / "mine.npz"
    result = invoke("fit", "--input", examples, "--output", target, "--long-side", 336)
    assert result.exit_code == 0, result.output
    directions = Directions.load(target)
    backbone = sparsespec.Backbone()
    assert directions.source_sha256 == backbone.features_sha256
    assert directions.channels == backbone.channels
    arguments = ("run", "--input", examples / "astronaut.jpg", "--output", tmp_path / "out", "--directions", target)
    assert invoke(*arguments).exit_code == 0
    assert (tmp_path / "out" / "masks" / "astronaut.png").is_file()
