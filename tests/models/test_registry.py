from __future__ import annotations

import hashlib
import logging
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsespec import models
from sparsespec.models import (
    ModelFormatError,
    UnknownModelError,
    get_model,
    list_models,
    read_trunk_metadata,
    registry,
    resolve,
    shipped_directions,
)
from sparsespec.models.metadata import PRECISIONS
from sparsespec.models.registry import ModelInfo
from sparsespec.models.store import Store, StoreError
from sparsespec.models.vit import BuildError
from tests.models import exports
from tests.models.conftest import write_trunk
from tests.models.hub_server import HubServer

DEFAULT = get_model("default")
EMBEDDED = [model for model in list_models() if model.embedded]
PULLED = [model for model in list_models() if not model.embedded]


def test_names() -> None:
    names = [model.name for model in list_models()]
    assert {"dinov2-vits14-int8", "dino-vits16", "dino-vitb8", "dinov2-vitl14-reg"} <= set(names)
    everything = names + [alias for model in list_models() for alias in model.aliases]
    assert len(set(everything)) == len(everything)
    for model in EMBEDDED:
        for name in (model.name, *model.aliases):
            assert get_model(name).path == resolve(name) == model.path
    assert get_model("default") is get_model("dinov2-vits14-int8")


@pytest.mark.parametrize("model", EMBEDDED, ids=lambda model: model.name)
def test_registry_says_the_truth(model: ModelInfo) -> None:
    content = model.path.read_bytes()
    assert len(content) == model.size_bytes
    assert hashlib.sha256(content).hexdigest() == model.sha256
    metadata = read_trunk_metadata(model.path)
    assert metadata.name == model.name
    assert metadata.precision == model.precision
    described = (model.patch_size, model.dim, model.heads, model.blocks)
    assert (metadata.patch_size, metadata.embed_dim, metadata.heads, metadata.blocks) == described
    card = model.path.with_suffix(".md").read_text(encoding="utf-8")
    assert model.sha256 is not None
    for fact in (model.name, model.sha256, f"{model.size_bytes:,}", metadata.source_sha256, "Apache-2.0", "MIT"):
        assert fact in card
    assert model.licence
    assert model.description.endswith(".")


@pytest.mark.parametrize("model", PULLED, ids=lambda model: model.name)
def test_what_is_pulled_is_described(model: ModelInfo) -> None:
    # dino-vits16, dinov2-vitl14-reg: generation, width, patch size, registers.
    match = re.fullmatch(r"dino(v2)?-vit([sbl])(\d+)(-reg)?", model.name)
    assert match is not None
    width = {"s": (384, 6, 12), "b": (768, 12, 12), "l": (1024, 16, 24)}[match[2]]
    assert (model.dim, model.heads, model.blocks) == width
    assert model.patch_size == int(match[3])
    assert model.registers == (4 if match[4] else 0)
    assert model.rule is not None
    assert (model.rule.offset, model.rule.antialias) == ((0.0, True) if match[4] else (0.1, False))
    # Nothing but data is ever asked for, and everything has a place inside the store.
    assert model.repository is not None
    assert model.revision is not None
    assert model.files[0].name.endswith((".onnx", ".safetensors"))
    assert all(file.name.endswith((".onnx", ".safetensors", ".json")) for file in model.files)
    root = Store(Path("root"))
    for file in model.files:
        assert root.download_path(model.repository, model.revision, file.name).parts[:2] == ("root", "downloads")
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
    assert model.revision == "main" or re.fullmatch("[0-9a-f]{40}", model.revision)
    # A pinned checksum without a pinned commit would break with the next commit.
    assert model.revision != "main" or not any(file.sha256 for file in model.files)
    # Four bytes for each weight of the blocks, the patches and the table, to a percent.
    weights = model.blocks * (12 * model.dim + 13) * model.dim + 3 * model.patch_size**2 * model.dim
    assert 4 * weights < model.size_bytes < 4 * 1.05 * weights + 4 * 1400 * model.dim
    assert model.licence == "Apache-2.0"


def test_spelling_and_precision() -> None:
    assert get_model("DINO_ViTS16") is get_model("dino-vits16")
    assert get_model("Default") is DEFAULT
    for precision in PRECISIONS:
        model = get_model(f"dino_vitb8_{precision}")
        assert model == get_model("dino-vitb8", precision=precision)
        assert model == get_model("dino-vitb8-int8", precision=precision)
        assert (model.precision, model.family) == (precision, "dino-vitb8")
        assert model.file == f"dino-vitb8-{precision}.onnx"
        assert get_model(model.name) == model
    assert get_model("dino-vitb8-float32").name == "dino-vitb8"
    # One of them comes with the package, made from another file.
    assert get_model("dinov2-vits14", precision="int8") is DEFAULT
    assert get_model("dinov2-vits14").repository == "facebook/dinov2-small"
    assert get_model("default", precision="float16").name == "dinov2-vits14-float16"
    with pytest.raises(ValueError, match="precision must be one of float32, float16, int8, got 'int4'"):
        get_model("dino-vits16", precision="int4")


def test_directions_of_the_models() -> None:
    sources = {read_trunk_metadata(model.path).source_sha256: model for model in EMBEDDED}
    assert set(registry._DIRECTIONS) <= set(sources)
    for source, model in sources.items():
        path = shipped_directions(source)
        assert path is not None
        assert path.parent == model.path.parent
        with np.load(path, allow_pickle=False) as stored:
            assert str(stored["source_sha256"]) == source
            assert stored["objectness"].shape == (3 * model.dim,)
            photographs = int(stored["photographs"])
        card = model.path.with_suffix(".md").read_text(encoding="utf-8")
        for fact in (
            path.name,
            f"3 x {3 * model.dim:,} numbers",
            f"{photographs} photographs, of which only the pixels",
        ):
            assert fact in card
    assert shipped_directions("00" * 32) is None
    assert shipped_directions("") is None


@pytest.mark.parametrize("model", list_models(), ids=lambda model: model.name)
def test_model_info_travels(model: ModelInfo) -> None:
    assert pickle.loads(pickle.dumps(model)) == model


@pytest.mark.parametrize("name", ["resnet50", "", "dino", "default-int8", "dino-vits16-int4", "dino-vits16-int8-int8"])
def test_unknown_name(name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownModelError, match=r"valid names are 'default', 'dinov2-vits14-int8', 'dino-vits16'"):
        get_model(name)
    with pytest.raises(UnknownModelError, match=r"valid names are 'default', 'dinov2-vits14-int8', 'dino-vits16'"):
        resolve(name)
    assert not home.exists()


@pytest.mark.parametrize(
    ("name", "meant"),
    [("dino-vit-s16", "dino-vits16"), ("dinov2_vits14_regs", "dinov2-vits14-reg"), ("defualt", "default")],
)
def test_the_nearest_name_is_suggested(name: str, meant: str) -> None:
    with pytest.raises(UnknownModelError, match=rf"unknown model {name!r}; did you mean {meant!r}\?"):
        get_model(name)


@pytest.mark.parametrize("name", ["../dino-vits16", "/dino-vits16", "..", "dino-vits16/../default", "..\\dino-vits16"])
def test_names_that_lead_elsewhere(name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownModelError):
        get_model(name)
    with pytest.raises(UnknownModelError):
        resolve(name)
    assert not home.exists()


def test_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "mine.onnx"
    shutil.copy(DEFAULT.path, copy)
    assert resolve(copy) == resolve(str(copy)) == copy.resolve()
    monkeypatch.chdir(tmp_path)
    assert resolve("mine.onnx") == copy.resolve()
    # A name of the registry wins over a file of that name, as long as no folder is given.
    shutil.copy(copy, tmp_path / "default")
    assert resolve("default") == DEFAULT.path
    assert resolve("./default") == resolve(Path("default")) == (tmp_path / "default").resolve()


def test_path_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"there is no file .*absent\.onnx.*valid names"):
        resolve(tmp_path / "absent.onnx")
    with pytest.raises(UnknownModelError, match=r"there is no file 'absent\.safetensors'"):
        resolve("absent.safetensors")
    with pytest.raises(UnknownModelError, match=r"is a folder.*'sparsespec models build .* -o OUT\.onnx'"):
        resolve(tmp_path)


def test_missing_file_of_a_known_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "_FOLDER", tmp_path)
    with pytest.raises(UnknownModelError, match="missing from this installation"):
        resolve("default")


def test_the_embedded_model_needs_no_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sparsespec.backbone import Backbone

    def refuse() -> Path:
        raise StoreError("the store was looked for")

    monkeypatch.setattr("sparsespec.models.store.home", refuse)
    assert resolve("default") == DEFAULT.path
    assert Backbone("default").patch_size == 14
    with pytest.raises(StoreError, match="was looked for"):
        resolve("dino-vits16")
    assert not get_model("dino-vits16").is_installed()


def test_the_first_use_pulls(
    server: HubServer, builds: list[dict[str, Any]], caplog: pytest.LogCaptureFixture, home: Path
) -> None:
    server.publish("Xenova/dino-vits16", {"onnx/model.onnx": b"weights"})
    caplog.set_level(logging.INFO, "sparsespec.models")
    path = resolve("dino_vits16")
    assert path == home / "models/dino-vits16-float32.onnx"
    assert read_trunk_metadata(path).patch_size == 16
    assert f"model dino-vits16 isn't in {home} yet: it is made now, once" in caplog.text
    assert "downloading onnx/model.onnx of Xenova/dino-vits16" in caplog.text
    caplog.clear()
    server.requests.clear()
    assert resolve("dino-vits16") == path
    assert (server.requests, len(builds), caplog.text) == ([], 1, "")


def _export(path: Path, content: bytes = b"") -> Path:
    """Write an ONNX file that says nothing about sparsespec: IR version, a graph, a documentation string."""
    path.write_bytes(bytes([8, 8, 7 << 3 | 2, 0, 6 << 3 | 2, len(content)]) + content)
    return path


def test_a_foreign_file_is_built_once(
    home: Path, tmp_path: Path, builds: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sparsespec.models")
    export = _export(tmp_path / "my export.onnx")
    path = resolve(export)
    digest = hashlib.sha256(export.read_bytes()).hexdigest()
    assert path == home / f"models/{digest}-float32.onnx"
    assert [(build["source"], build["precision"]) for build in builds] == [(export, "float32")]
    assert f"{export} is built into {path} now, once" in caplog.text
    # By content, not by name.
    assert resolve(export) == resolve(shutil.copy(export, tmp_path / "copy.onnx")) == path
    assert len(builds) == 1
    assert resolve(_export(export, b"other")) != path
    assert len(builds) == 2
    path.write_bytes(b"damaged")
    with pytest.raises(StoreError, match=r"7 bytes, but \d+ when it was built; delete it"):
        resolve(tmp_path / "copy.onnx")


def test_weights_are_known_by_their_configuration_too(home: Path, tmp_path: Path, builds: list[dict[str, Any]]) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    first = resolve(weights)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 6}')
    second = resolve(weights)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 12}')
    assert len({first, second, resolve(weights)}) == len(builds) == 3


@pytest.mark.parametrize("location", ["export.onnx_data", "some weights.bin"])
def test_an_export_is_built_for_good_with_what_lies_beside_it(
    home: Path, tmp_path: Path, location: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The real build, in the layout of the hub: weights in another file, the normalisation in a third."""
    onnx = pytest.importorskip("onnx", reason="building a model needs the extra 'build'")
    from sparsespec.backbone import Backbone

    caplog.set_level(logging.INFO, "sparsespec.models")
    (tmp_path / "hub" / "onnx").mkdir(parents=True)
    export = tmp_path / "hub" / "onnx" / "model.onnx"
    onnx.save(exports.load("dinov2_registers-new20"), export, save_as_external_data=True, location=location)
    path = resolve(export)
    assert f"{export} is built into {path} now, once" in caplog.text
    assert path.parent == home / "models"
    metadata = read_trunk_metadata(path)
    assert (metadata.patch_size, metadata.blocks, len(metadata.prefix)) == (4, 2, 5)
    backbone = Backbone(export)
    features = backbone.features(np.full((16, 16, 3), 0.5, np.float32), long_side=16)
    assert features.keys.shape == (16, 16)
    assert np.isfinite(features.keys).all()

    caplog.clear()
    assert resolve(export) == path
    assert caplog.text == ""
    (tmp_path / "hub" / "preprocessor_config.json").write_text('{"image_mean": [0.25, 0.5, 0.75]}')
    described = resolve(export)
    assert described != path
    assert read_trunk_metadata(described).mean.tolist() == [0.25, 0.5, 0.75]
    content = bytearray((export.parent / location).read_bytes())
    content[0] ^= 1  # the last bit of one number
    (export.parent / location).write_bytes(content)
    assert resolve(export) not in (path, described)
    (export.parent / location).unlink()
    with pytest.raises(BuildError, match="lie in another file"):
        resolve(export)


def test_a_foreign_file_and_no_store(tmp_path: Path, home: Path, builds: list[dict[str, Any]]) -> None:
    home.parent.mkdir(exist_ok=True)
    home.write_text("a file stands in the way")
    with pytest.raises(StoreError, match=r"models build FILE -o OUT\.onnx"):
        resolve(_export(tmp_path / "export.onnx"))
    assert builds == []


def test_files_that_are_no_models(tmp_path: Path, home: Path) -> None:
    letter = tmp_path / "letter.onnx"
    letter.write_text("Dear Sir or Madam")
    with pytest.raises(ModelFormatError, match="isn't an ONNX file"):
        resolve(letter)
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(DEFAULT.path.read_bytes()[:100_000])
    with pytest.raises(ModelFormatError, match="cut short"):
        resolve(cut)
    # Ours, but damaged: not to be taken for somebody else's.
    with pytest.raises(ModelFormatError, match="version 99"):
        resolve(write_trunk(tmp_path / "newer.onnx", version=99))
    pickled = tmp_path / "weights.pth"
    pickled.write_bytes(b"\x80\x04.")
    with pytest.raises(ModelFormatError, match=r"'sparsespec models build .*weights\.pth -o OUT\.onnx'"):
        resolve(pickled)
    assert not home.exists()


def test_import_is_light() -> None:
    code = (
        "import sys, sparsespec.models as m; m.list_models(); m.resolve('default');"
        "sys.exit(', '.join({'onnx', 'onnxruntime', 'scipy', 'numba', 'skimage'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert set(models.__all__) <= set(dir(models))
    for name in models.__all__:
        assert getattr(models, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        models.nosuch  # noqa: B018
