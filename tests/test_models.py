from __future__ import annotations

import hashlib
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparsespec import models
from sparsespec.models import (
    UnknownModelError,
    get_model,
    list_models,
    read_trunk_metadata,
    registry,
    resolve,
    shipped_directions,
)
from sparsespec.models.registry import ModelInfo

DEFAULT = get_model("default")


# Registry


def test_names() -> None:
    names = [model.name for model in list_models()]
    assert "dinov2-vits14-int8" in names
    everything = names + [alias for model in list_models() for alias in model.aliases]
    assert len(set(everything)) == len(everything)
    for name in everything:
        assert get_model(name).path == resolve(name)
    assert get_model("default") is get_model("dinov2-vits14-int8")


@pytest.mark.parametrize("model", list_models(), ids=lambda model: model.name)
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
    for fact in (model.name, model.sha256, f"{model.size_bytes:,}", metadata.source_sha256, "Apache-2.0", "MIT"):
        assert fact in card
    assert model.licence
    assert model.description.endswith(".")


def test_directions_of_the_models() -> None:
    sources = {read_trunk_metadata(model.path).source_sha256: model for model in list_models()}
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


def test_model_info_travels() -> None:
    assert pickle.loads(pickle.dumps(DEFAULT)) == DEFAULT


@pytest.mark.parametrize("name", ["resnet50", "", "Default", "dinov2-vits14"])
def test_unknown_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UnknownModelError, match=r"valid names are 'default', 'dinov2-vits14-int8'.*sparsespec\.models\.build"
    ):
        get_model(name)
    with pytest.raises(
        UnknownModelError, match=r"valid names are 'default', 'dinov2-vits14-int8'.*sparsespec\.models\.build"
    ):
        resolve(name)


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
    with pytest.raises(UnknownModelError, match="is a folder"):
        resolve(tmp_path)


def test_missing_file_of_a_known_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sparsespec.models import registry

    monkeypatch.setattr(registry, "_FOLDER", tmp_path)
    with pytest.raises(UnknownModelError, match="missing from this installation"):
        resolve("default")


def test_import_is_light() -> None:
    code = (
        "import sys, sparsespec.models as m; m.list_models(); m.resolve('default');"
        "sys.exit(', '.join({'onnx', 'onnxruntime', 'scipy', 'numba', 'skimage'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(models.__all__) <= set(dir(models))
