from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsespec.models._external import external_files
from sparsespec.models.from_onnx import load_export
from sparsespec.models.metadata import ModelFormatError
from sparsespec.models.sources import read_source
from sparsespec.models.vit import BuildError
from tests.models import exports

onnx = pytest.importorskip("onnx", reason="reading an export needs the extra 'build'")


def _outside(folder: Path, change: Callable[[dict[str, str]], None] | None = None) -> Path:
    """Write a tiny export with its weights in another file; change what it says of where the first one lies."""
    path = folder / "export.onnx"
    onnx.save(
        exports.load("vit-old17"),
        path,
        save_as_external_data=True,
        location="export.bin",
        size_threshold=0,
        convert_attribute=True,
    )
    if change is not None:
        model = onnx.load(path, load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.data_location == t.EXTERNAL)
        said = {entry.key: entry.value for entry in tensor.external_data}
        change(said)
        del tensor.external_data[:]
        for key, value in said.items():
            tensor.external_data.add(key=key, value=value)
        path.write_bytes(model.SerializeToString())
    return path


def _weights(model: Any) -> list[np.ndarray]:
    constants = [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")]
    return [onnx.numpy_helper.to_array(tensor) for tensor in [*model.graph.initializer, *constants]]


def test_every_weight_is_fetched(tmp_path: Path) -> None:
    path = _outside(tmp_path)
    original = _weights(exports.load("vit-old17"))
    assert any(t.op_type == "Constant" for t in exports.load("vit-old17").graph.node)
    assert external_files(path) == [tmp_path / "export.bin"]
    for found, expected in zip(_weights(load_export(path)), original, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_an_export_that_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "export.onnx"
    path.write_bytes(exports.files()["timm-new18.onnx"])
    assert external_files(path) == []


def test_links_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    path = _outside(tmp_path)
    for name, blob in (("export.onnx", "aa"), ("export.bin", "bb")):
        (tmp_path / name).rename(tmp_path / "blobs" / blob)
        (tmp_path / "snapshot" / name).symlink_to(Path("..", "blobs", blob))
    source = read_source(tmp_path / "snapshot" / path.name)
    assert source.files == (tmp_path / "snapshot" / "export.onnx", tmp_path / "snapshot" / "export.bin")


def test_a_link_to_the_model_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.onnx"
    link.symlink_to(_outside(tmp_path))
    assert external_files(link) == [tmp_path / "export.bin"]
    assert len(read_source(link).vit.blocks) == 2


@pytest.mark.parametrize(
    "name",
    [
        "../export.bin",
        "/etc/passwd",
        "a/../../export.bin",
        "..",
        "",
        "C:\\export.bin",
        "C:export.bin",
        "..\\export.bin",
        "\\\\server\\share\\export.bin",
        "a\0b",
    ],
)
def test_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "inner").mkdir()
    path = _outside(tmp_path / "inner", lambda said: said.update(location=name))
    # What it points to is there: only the name can be what is refused.
    (tmp_path / "export.bin").write_bytes((tmp_path / "inner" / "export.bin").read_bytes())
    for read in (external_files, load_export, read_source):
        with pytest.raises(BuildError, match="refused, because they must lie in its own folder"):
            read(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"offset": "-1"},
        {"length": "-1"},
        {"length": str(2**50)},
        {"offset": str(2**50), "length": "4"},
        {"offset": "some"},
    ],
)
def test_places_that_are_not_in_the_file(tmp_path: Path, wrong: dict[str, str]) -> None:
    path = _outside(tmp_path, lambda said: said.update(wrong))
    with pytest.raises(BuildError, match=r"the weight '.*' of .*export\.onnx' .*export\.bin', which has \d+: it"):
        load_export(path)


def test_a_file_of_weights_that_is_cut_short(tmp_path: Path) -> None:
    path = _outside(tmp_path)
    whole = (tmp_path / "export.bin").read_bytes()
    (tmp_path / "export.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BuildError, match="it is cut short"):
        read_source(path)


def test_a_weight_of_another_size_than_it_says(tmp_path: Path) -> None:
    path = _outside(tmp_path, lambda said: said.update(length="4"))
    with pytest.raises(BuildError, match=r"export\.onnx'"):
        read_source(path)


@pytest.mark.parametrize("content", [b"\xff" * 30, b"\x3a\x10\x2a\xff\xff\xff\xff\x0f" + bytes(10)])
def test_files_that_are_no_models(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelFormatError, match=r"m\.onnx' isn't an ONNX file"):
        external_files(tmp_path / "m.onnx")


def test_shapes_of_any_size(tmp_path: Path) -> None:
    """A weight that says it is huge takes no memory and is said not to be there."""
    model = exports.load("vit-old17")
    kernel = next(t for t in model.graph.initializer if len(t.dims) == 4)
    for dims in ([2**40, 3, 4, 4], [2**62, 2**62, 2, 2], [-1, 3, 4, 4]):
        kernel.dims[:] = dims
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(BuildError, match=r"m\.onnx'"):
            read_source(tmp_path / "m.onnx")
