from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from sparsespec.backbone import Backbone, TokenFeatures
from sparsespec.cli._ablation import PARTS
from sparsespec.evaluation.ablation import plans
from sparsespec.formats import write_label_png
from sparsespec.models import resolve


def fake_features(backbone: Backbone, image: np.ndarray, *, long_side: int = 448) -> TokenFeatures:
    """Tokens of 8 x 8 pixels that know their colour, at any size that is asked for."""
    height, width = image.shape[:2]
    grid = max(1, height // 8), max(1, width // 8)
    colours = image[4::8, 4::8][: grid[0], : grid[1]] if min(height, width) >= 8 else image[:1, :1]
    mean = np.resize(colours.reshape(-1, 3) / 255, (grid[0] * grid[1], 3))
    features = np.resize(np.hstack([mean, 1 - mean]), (len(mean), backbone.channels)).astype(np.float32)
    info = {"model": "", "provider": "", "tiles": 1, "views": 0}
    return TokenFeatures(features, features, features, grid, 8, (height, width), 1.0, info)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr(Backbone, "features", fake_features)
    rng = np.random.default_rng(0)
    roots = []
    for name in ("first", "second"):
        root = tmp_path / name
        (root / "images").mkdir(parents=True)
        for number in range(3):
            labels = np.zeros((64, 96), int)
            labels[8:40, 16 + 8 * number : 56] = 1
            pixels = np.where(labels[..., None] > 0, (230, 90, 40), (40, 60, 80)) + rng.integers(0, 9, (64, 96, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"{number}.png")
            (root / "labels").mkdir(exist_ok=True)
            write_label_png(root / "labels" / f"{number}.png", labels)
        roots.append(root)
    return roots


def test_parts_are_the_tables() -> None:
    assert tuple(plan.key for plan in plans()) == PARTS


@pytest.mark.slow
def test_tables(invoke: Callable[..., Result], folders: list[Path]) -> None:
    result = invoke("eval", "--ablation", "--truth", folders[0], "--truth", folders[1], "--part", "bounds")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "told the foreground and the count" in result.stdout
    assert "first" in result.stdout
    assert "mean of the sets" in result.stdout
    assert "TokenCut" not in result.stdout


def test_json_of_the_first_images(invoke: Callable[..., Result], folders: list[Path], tmp_path: Path) -> None:
    model = tmp_path / "float32.onnx"
    model.symlink_to(resolve("default"))
    more = ("--part", "resolution", "--limit", 2, "--long-side", 960, "--model", model)
    result = invoke("eval", "--ablation", "--truth", folders[0], *more, "--json")
    assert result.exit_code == 0
    values = json.loads(result.stdout)
    assert values["command"] == (
        "sparsespec eval --ablation --truth first --limit 2 --model float32.onnx --long-side 960 --part resolution"
    )
    assert values["sets"]["first"]["images"] == 2
    rows = [row["title"] for row in values["tables"]["resolution"]["rows"]]
    assert rows[-2:] == ["960 pixels", "448 pixels, float32.onnx"]


def test_a_page_is_updated(invoke: Callable[..., Result], folders: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- begin sets -->\n<!-- end sets -->\nkept\n<!-- begin bounds -->\n<!-- end bounds -->\n")
    arguments = ("eval", "--ablation", "--truth", folders[0], "--update", page)
    result = invoke(*arguments, "--part", "bounds")
    assert result.exit_code == 0
    assert result.output == ""
    text = page.read_text(encoding="utf-8")
    assert "kept" in text
    assert "| true tokens |" in text
    assert str(tmp_path) not in text

    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "<!-- begin peers -->" in " ".join(result.stderr.split())
    result = invoke("eval", "--ablation", "--truth", folders[0], "--update", tmp_path / "nosuch.md")
    assert result.exit_code == 2
    assert "nosuch.md" in result.stderr


def test_what_is_left_out_is_listed(invoke: Callable[..., Result], folders: list[Path]) -> None:
    (folders[0] / "labels" / "1.png").unlink()
    (folders[0] / "images" / "2.png").unlink()
    result = invoke("eval", "--ablation", "--truth", folders[0], "--part", "bounds", "--json")
    assert result.exit_code == 0
    assert "first: no truth for 1" in result.stderr
    assert "first: no image for 2" in result.stderr
    assert json.loads(result.stdout)["sets"]["first"]["without_image"] == ["2"]


def test_truth_of_another_size(invoke: Callable[..., Result], folders: list[Path]) -> None:
    write_label_png(folders[0] / "labels" / "1.png", np.ones((10, 12), int))
    result = invoke("eval", "--ablation", "--truth", folders[0], "--part", "bounds")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "12 x 10" in result.stderr
    assert "96 x 64" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ablation", "--truth", "nowhere"], "nowhere"),
        (["--ablation", "--truth", "t", "--part", "all"], "paper-ours"),
        (["--ablation", "--truth", "t", "--model", "nosuch.onnx"], "nosuch.onnx"),
        (["--ablation", "--truth", "t", "--long-side", 0], "--long-side"),
        (["--pred", "p", "--truth", "t", "--part", "peers"], "--part needs --ablation"),
        (["--pred", "p", "--truth", "t", "--long-side", 960], "--long-side needs --ablation"),
    ],
)
def test_wrong_usage(invoke: Callable[..., Result], arguments: list[object], message: str) -> None:
    result = invoke("eval", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in " ".join(result.stderr.split())


def test_two_sets_of_one_name(invoke: Callable[..., Result], folders: list[Path]) -> None:
    result = invoke("eval", "--ablation", "--truth", folders[0], "--truth", folders[0], "--part", "bounds")
    assert result.exit_code == 2
    assert "two sets are called 'first'" in " ".join(result.stderr.split())
