from __future__ import annotations

import base64
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsespec.models import ModelFormatError, get_model, read_trunk_metadata, resolve
from sparsespec.models.metadata import (
    PREFIX,
    TrunkMetadata,
    decode_table,
    describe,
    encode_table,
    parse_trunk_metadata,
    read_metadata_props,
)
from sparsespec.position_table import PositionRule
from tests.tiny_vit import random_vit

DEFAULT = get_model("default")


def _varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _model_file(path: Path, props: dict[str, str]) -> Path:
    """Write the smallest ONNX file: IR version, an empty graph, the properties."""
    entries = [_field(14, _field(1, k.encode()) + _field(2, v.encode())) for k, v in props.items()]
    path.write_bytes(bytes([8, 8]) + _field(7, b"") + b"".join(entries))
    return path


def test_metadata_is_what_onnx_runtime_reads() -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(DEFAULT.path, providers=["CPUExecutionProvider"])
    assert read_metadata_props(DEFAULT.path) == session.get_modelmeta().custom_metadata_map


def test_metadata_of_the_default_model() -> None:
    metadata = read_trunk_metadata(DEFAULT.path)
    np.testing.assert_allclose(metadata.mean, [0.485, 0.456, 0.406], rtol=1e-6)
    np.testing.assert_allclose(metadata.std, [0.229, 0.224, 0.225], rtol=1e-6)
    assert metadata.positions.shape == (37, 37, 384)
    assert metadata.positions.dtype == metadata.prefix.dtype == np.float32
    assert metadata.prefix.shape == (1, 384)
    assert metadata.rule == PositionRule()
    assert metadata.output_blocks == (11,)
    # A table that was learnt is smooth: neighbours resemble each other far more than distant entries.
    table = metadata.positions - metadata.positions.mean((0, 1))
    assert np.square(np.diff(table, axis=0)).mean() < 0.5 * np.square(table[18:] - table[:19]).mean()


def test_metadata_of_a_hand_made_file(tmp_path: Path) -> None:
    props = {"a": "1", "ä": "x" * 300, "": ""}
    assert read_metadata_props(_model_file(tmp_path / "m.onnx", props)) == props
    read_trunk_metadata(_model_file(tmp_path / "n.onnx", _tiny_props()))


@pytest.mark.parametrize(
    "content", [b"", b"not a model", b"\x08\x08", b"\x3a\x05ab", b"\xff" * 40, b"\x80", b"\x00\x00"]
)
def test_files_that_are_not_onnx(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError, match=r"m\.onnx' isn't an ONNX file"):
        resolve(path)


def test_truncated_model(tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    path.write_bytes(DEFAULT.path.read_bytes()[:1_000_000])
    with pytest.raises(ModelFormatError, match="cut short"):
        resolve(path)


def test_two_entries_of_one_name(tmp_path: Path) -> None:
    path = _model_file(tmp_path / "m.onnx", {"a": "1"})
    path.write_bytes(path.read_bytes() + _field(14, _field(1, b"a") + _field(2, b"2")))
    with pytest.raises(ModelFormatError, match="two entries 'a'"):
        read_metadata_props(path)


def _tiny_props(**changes: str | None) -> dict[str, str]:
    props = describe(
        random_vit(prefix=5, blocks=12, rule=PositionRule(0.1)),
        output_blocks=(8, 11),
        precision="float16",
        name="tiny-float16",
        source="nowhere.onnx",
        source_sha256="ab" * 32,
    )
    return _changed(props, changes)


def _version_1(**changes: str | None) -> dict[str, str]:
    """Describe a network as the first version did: one class token, its last block, one way to resize the table."""
    vit = random_vit(prefix=1, blocks=12)
    table = np.concatenate([vit.prefix, vit.positions.reshape(9, 16)])
    props = _tiny_props(
        version="1",
        positions=encode_table(table),
        **dict.fromkeys(("prefix", "output_blocks", "position_offset", "position_antialias")),
    )
    return _changed(props, changes)


def _changed(props: dict[str, str], changes: dict[str, Any]) -> dict[str, str]:
    ours = {PREFIX + key: value for key, value in changes.items()}
    return {key: value for key, value in {**props, **ours}.items() if value is not None}


def test_description_comes_back(tmp_path: Path) -> None:
    vit = random_vit(prefix=5, blocks=12)
    found = read_trunk_metadata(_model_file(tmp_path / "m.onnx", _tiny_props()))
    assert (found.name, found.precision, found.source) == ("tiny-float16", "float16", "nowhere.onnx")
    assert (found.patch_size, found.embed_dim, found.heads, found.blocks) == (4, 16, 2, 12)
    assert found.output_blocks == (8, 11)
    assert found.rule == PositionRule(offset=0.1, antialias=False)
    assert found.source_sha256 == "ab" * 32
    np.testing.assert_array_equal(found.prefix, vit.prefix)
    np.testing.assert_array_equal(found.positions, vit.positions)
    np.testing.assert_array_equal(found.mean, np.float32(vit.mean))
    np.testing.assert_array_equal(found.std, np.float32(vit.std))


def test_network_without_class_token() -> None:
    props = describe(
        random_vit(prefix=0, table=(1, 2), rule=PositionRule(antialias=True)),
        output_blocks=(2,),
        precision="float32",
        name="a",
        source="b",
        source_sha256="0" * 64,
    )
    found = parse_trunk_metadata(props, where="m")
    assert found.prefix.shape == (0, 16)
    assert found.positions.shape == (1, 2, 16)
    assert found.rule == PositionRule(antialias=True)


def test_first_version_is_still_read() -> None:
    vit = random_vit(prefix=1, blocks=12)
    found = parse_trunk_metadata(_version_1(), where="m")
    assert found.output_blocks == (11,)
    assert found.outputs() == ("queries", "keys", "values")
    assert found.rule == PositionRule()
    np.testing.assert_array_equal(found.prefix, vit.prefix)
    np.testing.assert_array_equal(found.positions, vit.positions)


def _metadata() -> TrunkMetadata:
    return parse_trunk_metadata(_tiny_props(), where="m")


@pytest.mark.parametrize(("block", "end"), [(None, ""), (11, ""), (-1, ""), (8, ".8"), (-4, ".8"), (np.int64(8), ".8")])
def test_outputs_of_a_block(block: Any, end: str) -> None:
    assert _metadata().outputs(block) == (f"queries{end}", f"keys{end}", f"values{end}")


@pytest.mark.parametrize("block", [7, 12, -2, -13, 100])
def test_block_that_the_file_does_not_give(block: int) -> None:
    with pytest.raises(ValueError, match=rf"'tiny-float16' gives no features of block {block}: .* gives 8, 11; build"):
        _metadata().outputs(block)


@pytest.mark.parametrize("block", ["8", 8.0, True])
def test_block_that_is_no_number(block: Any) -> None:
    with pytest.raises(ValueError, match="whole number or None"):
        _metadata().outputs(block)


def test_block_of_a_file_that_was_cut_early() -> None:
    found = replace(_metadata(), output_blocks=(3, 8))
    assert found.outputs() == found.outputs(8) == ("queries", "keys", "values")
    assert found.outputs(-9) == ("queries.3", "keys.3", "values.3")
    with pytest.raises(ValueError, match="gives no features of block -1"):
        found.outputs(-1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": None}, "says nothing of its format"),
        ({"format": "yolo"}, "says its format is 'yolo'"),
        ({"version": "3"}, "version 3.*reads versions 1 and 2"),
        ({"version": None}, "version missing"),
        *(
            ({key: None}, f"incomplete.*no entry 'sparsespec.{key}'")
            for key in (
                *("name", "precision", "patch_size", "embed_dim", "heads", "blocks", "output_blocks", "mean", "std"),
                *("source", "source_sha256", "prefix", "position_grid", "position_offset", "position_antialias"),
                "positions",
            )
        ),
        ({"name": ""}, "entry name is '', expected some text"),
        ({"precision": "int4"}, "entry precision is 'int4', expected one of float32, float16, int8"),
        ({"heads": "six"}, "entry heads is 'six', expected a whole number from 1 to 16"),
        ({"heads": "3"}, "entry heads is '3', expected a divisor of embed_dim 16"),
        ({"heads": "0"}, "entry heads is '0'"),
        ({"heads": "17"}, "entry heads is '17'"),
        ({"heads": " 2"}, "entry heads is ' 2'"),
        ({"heads": "٢"}, "entry heads is '٢'"),
        ({"embed_dim": "-16"}, "entry embed_dim is '-16'"),
        ({"embed_dim": "9" * 5000}, r"entry embed_dim is '9{57}\.\.\.', expected"),
        ({"blocks": "1_2"}, "entry blocks is '1_2'"),
        ({"patch_size": "0"}, "entry patch_size is '0'"),
        ({"patch_size": "14.0"}, "entry patch_size is '14.0'"),
        ({"output_blocks": ""}, "entry output_blocks is ''"),
        ({"output_blocks": "12"}, "entry output_blocks is '12', expected ascending block numbers from 0 to 11"),
        ({"output_blocks": "-1"}, "entry output_blocks is '-1'"),
        ({"output_blocks": "11,8"}, "entry output_blocks is '11,8'"),
        ({"output_blocks": "8,8"}, "entry output_blocks is '8,8'"),
        ({"output_blocks": "8,"}, "entry output_blocks is '8,'"),
        ({"mean": "0.5"}, "entry mean is '0.5', expected three numbers"),
        ({"mean": "0.5,0.5,nan"}, "entry mean is"),
        ({"std": "0.5,0,0.5"}, "entry std is"),
        ({"std": "0.5,0.5,inf"}, "entry std is"),
        ({"position_grid": "3"}, "entry position_grid is '3', expected rows and columns"),
        ({"position_grid": "0x9"}, "entry position_grid is '0x9'"),
        ({"position_grid": "3x3x1"}, "entry position_grid is '3x3x1'"),
        ({"position_grid": "3x2"}, "entry positions is .* can't be unpacked: .*11 x 16"),
        ({"position_grid": "99x99"}, "entry positions is .* can't be unpacked"),
        ({"position_grid": "9999x9999"}, "entry positions is .* is said to be of 99980006 x 16 numbers"),
        ({"prefix": "4"}, "entry positions is .* can't be unpacked"),
        ({"prefix": "-1"}, "entry prefix is '-1'"),
        ({"position_offset": "1"}, "entry position_offset is '1'"),
        ({"position_offset": "nan"}, "entry position_offset is 'nan'"),
        ({"position_antialias": "yes"}, "entry position_antialias is 'yes', expected one of true, false"),
        ({"positions": "AAAA"}, "entry positions is 'AAAA', which can't be unpacked"),
        ({"positions": "no base64"}, "entry positions is 'no base64', which can't be unpacked"),
        ({"positions": encode_table(np.full((14, 16), np.nan, np.float32))}, "aren't finite"),
        ({"source_sha256": "ab"}, "entry source_sha256 is 'ab', expected 64 hexadecimal digits"),
        ({"source_sha256": "AB" * 32}, "entry source_sha256 is"),
    ],
)
def test_onnx_files_of_another_format(changes: dict[str, str | None], words: str, tmp_path: Path) -> None:
    path = _model_file(tmp_path / "m.onnx", _tiny_props(**changes))
    with pytest.raises(ModelFormatError, match=rf"m\.onnx' .*{words}"):
        read_trunk_metadata(path)


@pytest.mark.parametrize("changes", [{"heads": "5"}, {"position_grid": "4x2"}, {"blocks": None}])
def test_first_version_with_nonsense(changes: dict[str, str | None]) -> None:
    with pytest.raises(ModelFormatError, match=rf"'m' .*{next(iter(changes))}|'m' .*entry positions"):
        parse_trunk_metadata(_version_1(**changes), where="m")


@pytest.mark.parametrize("shape", [(1,), (5, 7), (2, 3, 4)])
def test_tables_survive_packing(shape: tuple[int, ...]) -> None:
    table = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    table.flat[0] = -0.0
    assert decode_table(encode_table(table), shape).tobytes() == table.tobytes()
    with pytest.raises(ValueError, match="isn't of"):
        decode_table(encode_table(table), (*shape, 2))


def test_table_that_unpacks_to_too_much() -> None:
    bomb = base64.b64encode(zlib.compress(bytes(10_000_000), 9)).decode("ascii")
    with pytest.raises(ValueError, match="isn't of 2 x 3 numbers"):
        decode_table(bomb, (2, 3))


def test_table_that_is_cut_short() -> None:
    raw = zlib.compress(np.zeros(6, np.float32).tobytes())
    with pytest.raises(ValueError, match="isn't of 2 x 3 numbers"):
        decode_table(base64.b64encode(raw[:-5]).decode("ascii"), (2, 3))
