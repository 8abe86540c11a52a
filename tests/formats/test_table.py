from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparsespec.formats import instance_annotations, table
from sparsespec.formats.table import COLUMNS, TABLE_KINDS, TableKind, TableWriter, instance_properties


def scene(dtype: type = np.uint8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(8)
    labels = np.zeros((50, 70), np.uint16)
    labels[10:40, 5:50] = 1
    labels[20:30, 20:35] = 2
    labels[0, :] = labels[:, -1] = 4
    labels[-1, -1] = 5
    image = rng.random((50, 70, 3)).astype(np.float32)
    return image if dtype is np.float32 else (image * np.iinfo(dtype).max).astype(dtype), labels


@pytest.mark.parametrize("pixels", [1, 333, 1 << 20])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_properties(monkeypatch: pytest.MonkeyPatch, dtype: type, pixels: int) -> None:
    monkeypatch.setattr(table, "_PIXELS_AT_ONCE", pixels)
    image, labels = scene(dtype)
    annotations = instance_annotations(labels, [0.5] * 5)
    found = instance_properties(image, labels, annotations)
    assert [annotation["label"] for annotation in annotations] == [1, 2, 4, 5]
    largest = 1 if dtype is np.float32 else np.iinfo(dtype).max
    for annotation, properties in zip(annotations, found, strict=True):
        y, x = np.nonzero(labels == annotation["label"])
        colour = image[y, x].astype(np.float64).mean(axis=0) / largest
        assert list(properties) == ["centroid_x", "centroid_y", "mean_red", "mean_green", "mean_blue"]
        np.testing.assert_allclose(list(properties.values()), [x.mean(), y.mean(), *colour], atol=6e-7)


def test_a_part_of_the_instances_is_enough() -> None:
    image, labels = scene()
    annotations = instance_annotations(labels, [0.5] * 5)
    assert instance_properties(image, labels, annotations[1:2]) == instance_properties(image, labels, annotations)[1:2]
    assert instance_properties(image, labels, []) == []
    (one,) = instance_properties(image[:1, :1], np.ones((1, 1), int), instance_annotations(np.ones((1, 1), int), [1]))
    assert (one["centroid_x"], one["centroid_y"]) == (0, 0)


def test_labels_that_do_not_fit() -> None:
    image, labels = scene()
    annotations = instance_annotations(labels, [0.5] * 5)
    with pytest.raises(ValueError, match=r"size of the image \(50, 70\), got \(70, 50\)"):
        instance_properties(image, labels.T, annotations)
    with pytest.raises(ValueError, match="label 1 has no pixel in the box"):
        instance_properties(image, np.where(labels == 1, 0, labels), annotations)


def write(path: Path, kind: TableKind, names: list[str]) -> TableWriter:
    image, labels = scene()
    annotations = instance_annotations(labels, [0.9, 0.8, 0.7, 1 / 3, 0.5])
    properties = instance_properties(image, labels, annotations)
    writer = TableWriter(path, kind)
    for number, name in enumerate(names, start=1):
        page = number if number % 2 else None
        mask = None if number == 2 else f"masks/{number}.png"
        writer.add(number, name, page, 70, 50, annotations, properties, mask)
        writer.add(1000 + number, name, None, 70, 50, [], [], mask)
    writer.close()
    return writer


def read_rows(path: Path) -> list[dict[str, object]]:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow reads Parquet")
    return parquet.read_table(path).to_pylist()


NAMES = ["a/b.jpg", 'a,"b"\n.jpg', "日本.png"]


@pytest.mark.parametrize("rows", [1, 5, 1 << 14])
@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: TableKind, rows: int) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow writes Parquet")
    monkeypatch.setattr(table, "_ROWS_AT_ONCE", rows)
    path = tmp_path / f"instances.{kind}"
    assert write(path, kind, NAMES).replaced_names == 0
    assert list(tmp_path.iterdir()) == [path]
    found = read_rows(path)
    assert [row["file_name"] for row in found] == [name for name in NAMES for _ in range(4)]
    assert list(found[0]) == list(COLUMNS)
    nothing = "" if kind == "csv" else None
    assert {row["page"] for row in found[4:8]} == {nothing}
    assert {row["mask"] for row in found[4:8]} == {nothing}
    image, labels = scene()
    annotations = instance_annotations(labels, [0.9, 0.8, 0.7, 1 / 3, 0.5])
    properties = instance_properties(image, labels, annotations)
    for row, annotation, measured in zip(found[8:], annotations, properties, strict=True):
        expected = {
            "image_id": 3,
            "file_name": "日本.png",
            "page": 3,
            "image_width": 70,
            "image_height": 50,
            "label": annotation["label"],
            "score": annotation["score"],
            "area": annotation["area"],
            **dict(zip(("x", "y", "width", "height"), annotation["bbox"], strict=True)),
            **measured,
            "mask": "masks/3.png",
        }
        assert row == ({name: str(value) for name, value in expected.items()} if kind == "csv" else expected)


@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_same_bytes_again(tmp_path: Path, kind: TableKind) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow writes Parquet")
    for name in "ab":
        write(tmp_path / name, kind, NAMES)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_arrow_types(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow writes Parquet")
    write(tmp_path / "x.parquet", "parquet", NAMES)
    schema = parquet.read_schema(tmp_path / "x.parquet")
    names = {"double": "float64"}
    assert {field.name: names.get(str(field.type), str(field.type)) for field in schema} == COLUMNS
    assert [field.name for field in schema if field.nullable] == ["page", "mask"]


@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_a_table_of_nothing(tmp_path: Path, kind: TableKind) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow writes Parquet")
    path = tmp_path / f"x.{kind}"
    TableWriter(path, kind).close()
    assert read_rows(path) == []
    if kind == "csv":
        assert path.read_bytes() == ",".join(COLUMNS).encode() + b"\r\n"


HOSTILE = ["=HYPERLINK(1)", "+1.jpg", "-1.jpg", "@x.jpg", "\t=x", "\r=x", "\n=x", "＝x", "＋x", "－x", "＠x"]


def test_names_that_are_formulas_to_a_spreadsheet(tmp_path: Path) -> None:
    write(tmp_path / "x.csv", "csv", [*HOSTILE, "a=b.jpg"])
    names = [row["file_name"] for row in read_rows(tmp_path / "x.csv")][::4]
    assert names == ["./" + name for name in HOSTILE] + ["a=b.jpg"]
    pytest.importorskip("pyarrow", reason="pyarrow writes Parquet")
    write(tmp_path / "x.parquet", "parquet", HOSTILE)
    assert [row["file_name"] for row in read_rows(tmp_path / "x.parquet")][::4] == HOSTILE


@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_names_that_are_not_unicode(tmp_path: Path, kind: TableKind) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow writes Parquet")
    path = tmp_path / f"x.{kind}"
    writer = write(path, kind, ["fine.jpg", "x\udcff.jpg", "\ud800é.jpg"])
    assert writer.replaced_names == 4  # each was added with instances and without
    assert [row["file_name"] for row in read_rows(path)][::4] == ["fine.jpg", "x\ufffd.jpg", "\ufffdé.jpg"]


@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_discarded(tmp_path: Path, kind: TableKind) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow writes Parquet")
    path = tmp_path / "x"
    path.write_text("as it was")
    writer = TableWriter(path, kind)
    image, labels = scene()
    annotations = instance_annotations(labels, [0.5] * 5)
    writer.add(1, "x", None, 70, 50, annotations, instance_properties(image, labels, annotations), None)
    writer.discard()
    assert path.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, kind: TableKind) -> None:
    resource = pytest.importorskip("resource", reason="no limit of a file's size on this system")
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow writes Parquet")
    image, labels = scene()
    annotations = instance_annotations(labels, [0.5] * 5)
    properties = instance_properties(image, labels, annotations)
    writer = TableWriter(tmp_path / "x", kind)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        for number in range(500):
            writer.add(number, f"{number}", None, 70, 50, annotations, properties, None)
        with pytest.raises(OSError, match="too large"):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of csv, parquet, got 'xlsx'"):
        TableWriter(tmp_path / "x", "xlsx")  # type: ignore[arg-type]
    writer = TableWriter(tmp_path / "x")
    annotations = instance_annotations(np.ones((2, 2), int), [1.0])
    with pytest.raises(ValueError, match="shorter"):
        writer.add(1, "x", None, 2, 2, annotations, [], None)
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_without_pyarrow(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from sparsespec.formats.table import TableWriter\n"
        "TableWriter('x.csv').close()\n"
        "try:\n    TableWriter('x.parquet', 'parquet')\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, timeout=60
    )
    assert "pip install 'sparsespec[table]'" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]
