from __future__ import annotations

import argparse
import dataclasses
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sparsespec.models.from_weights import load_config, load_tensors, read_weights
from sparsespec.models.vit import BuildError, UnrecognisedModelError, Vit
from sparsespec.position_table import PositionRule
from tests import tiny_models
from tests.reference.vit import forward

STYLES = tiny_models.styles()

RULES = {
    "dino": PositionRule(0.1, False),
    "dinov2": PositionRule(0.1, False),
    "dinov2-chunks": PositionRule(0.1, False),
    "dinov2-giant": PositionRule(0.1, False),
    "dinov2-registers": PositionRule(0.0, True),
    "timm-dinov2": PositionRule(0.0, True),
    "timm-giant": PositionRule(0.0, True),
    "timm-registers": PositionRule(0.0, True),
    "timm-registers-positions": PositionRule(0.0, True),
    "timm-vit": PositionRule(0.0, True),
    "transformers-dinov2": PositionRule(),
    "transformers-giant": PositionRule(),
    "transformers-giant-in-memory": PositionRule(),
    "transformers-registers": PositionRule(0.0, True),
    "transformers-vit": PositionRule(),
    "transformers-vit-in-memory": PositionRule(),
}


def read(style: str, **changes: Any) -> Vit:
    arguments: dict[str, Any] = {"config": tiny_models.config(style), "heads": tiny_models.HEADS} | changes
    return read_weights(tiny_models.tensors(style), **arguments)


def difference(vit: Vit, style: str) -> float:
    """Largest difference of any query, key or value to PyTorch, relative to the largest of its kind."""
    worst = 0.0
    for grid in tiny_models.GRIDS:
        expected = tiny_models.expected(style, grid)
        found = np.array(forward(vit, tiny_models.image(grid)))[:, :, -expected.shape[2] :]
        assert found.shape == expected.shape
        scale = np.abs(expected).max(axis=(2, 3), keepdims=True)
        worst = max(worst, float((np.abs(found - expected) / scale).max()))
    return worst


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], kind: str = "F32") -> None:
    """Write the format by hand: bfloat16 is a type that NumPy doesn't have."""
    header, content = {}, b""
    for name, tensor in tensors.items():
        if kind == "BF16":
            part = (tensor.view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            part = tensor.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2", "F8_E4M3": "u1"}[kind]).tobytes()
        offsets = [len(content), len(content) + len(part)]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}
        content += part
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


# What PyTorch computes


@pytest.mark.parametrize("style", STYLES)
def test_computes_what_pytorch_does(style: str) -> None:
    vit = read(style)
    assert vit.rule == RULES[style]
    assert difference(vit, style) < 1e-5


def test_every_style_has_its_rule() -> None:
    assert sorted(RULES) == STYLES


@pytest.mark.parametrize("style", ["dino", "dinov2-registers", "timm-vit", "transformers-dinov2"])
def test_another_rule_is_noticed(style: str) -> None:
    for offset in (0.0, 0.1):
        for antialias in (False, True):
            rule = PositionRule(offset, antialias)
            if rule != RULES[style]:
                assert difference(read(style, rule=rule), style) > 1e-3


@pytest.mark.parametrize("style", ["transformers-vit", "dino"])
def test_another_epsilon_is_noticed(style: str) -> None:
    vit = read(style)
    epsilons = {block.attention.norm.epsilon for block in vit.blocks}
    epsilons |= {block.rest.norm.epsilon for block in vit.blocks if block.rest}
    assert epsilons == {1e-2 if style == "transformers-vit" else 1e-6}
    if style == "transformers-vit":
        without = tiny_models.config(style) | {"layer_norm_eps": 1e-12}
        assert difference(read(style, config=without), style) > 1e-3


def test_arrays_are_float32_and_contiguous() -> None:
    def arrays(value: Any) -> list[np.ndarray]:
        if isinstance(value, np.ndarray):
            return [value]
        if isinstance(value, tuple):
            return [array for part in value for array in arrays(part)]
        if dataclasses.is_dataclass(value):
            return [array for part in dataclasses.fields(value) for array in arrays(getattr(value, part.name))]
        return []

    for style in STYLES:
        found = arrays(read(style))
        assert len(found) > 30
        for array in found:
            assert array.dtype == np.float32
            assert array.flags.c_contiguous


# Names


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "model.", "vit.", "_orig_mod.module.backbone.", "a.b.c."])
@pytest.mark.parametrize("style", ["dinov2-chunks", "transformers-registers"])
def test_any_prefix(style: str, prefix: str) -> None:
    tensors = {prefix + name: tensor for name, tensor in tiny_models.tensors(style).items()}
    tensors["classifier.weight"] = np.ones((3, 16), np.float32)
    vit = read_weights(tensors, config=tiny_models.config(style), heads=2)
    assert difference(vit, style) < 1e-5


def test_the_teacher_is_read() -> None:
    teacher = tiny_models.tensors("dino")
    tensors = {f"student.module.backbone.{name}": -tensor for name, tensor in teacher.items()}
    tensors |= {f"teacher.backbone.{name}": tensor for name, tensor in teacher.items()}
    tensors |= {"teacher.head.mlp.0.weight": np.ones((8, 16), np.float32)}
    assert difference(read_weights(tensors, heads=2), "dino") < 1e-5


def test_two_models_at_once() -> None:
    tensors = {start + name: t for start in ("left.", "right.") for name, t in tiny_models.tensors("dino").items()}
    with pytest.raises(UnrecognisedModelError, match=r"several vision transformers, under 'left\.', 'right\.'"):
        read_weights(tensors, heads=2)


def test_training_heads_are_left_aside() -> None:
    extra = {
        name: np.ones((8, 16), np.float32)
        for name in ("head.mlp.0.weight", "head.last_layer.weight_v", "dino_head.mlp.0.weight", "mask_token")
    }
    vit = read_weights(tiny_models.tensors("dinov2") | extra, heads=2)
    assert difference(vit, "dinov2") < 1e-5


def test_timm_without_a_config_is_told_by_its_layer_scale() -> None:
    assert read("timm-dinov2", config=None).rule == PositionRule(antialias=True)
    assert read("timm-registers", config=None).rule == PositionRule(antialias=True)
    # Here nothing tells them apart.
    assert read("timm-vit", config=None).rule == read("dino").rule == PositionRule(0.1)


# What no tensor says


@pytest.mark.parametrize(("width", "heads"), [(128, 2), (384, 6), (768, 12), (1024, 16), (1536, 24)])
def test_heads_of_64_channels(width: int, heads: int) -> None:
    assert read_weights(blank(width)).heads == heads
    assert read_weights(blank(width), heads=8).heads == 8
    assert read_weights(blank(width), config={"num_attention_heads": 4}).heads == 4
    assert read_weights(blank(width), config={"num_attention_heads": 4}, heads=8).heads == 8


@pytest.mark.parametrize("width", [16, 200, 1280, 1408])
def test_heads_that_must_be_said(width: int) -> None:
    with pytest.raises(BuildError, match=rf"heads of a model of {width} channels .* heads="):
        read_weights(blank(width))


@pytest.mark.parametrize("heads", [0, -2, 7, 2.0])
def test_heads_that_do_not_fit(heads: Any) -> None:
    with pytest.raises(BuildError, match="don't share 128 channels"):
        read_weights(blank(128), heads=heads)


def blank(width: int) -> dict[str, np.ndarray]:
    """One block of DINO with nothing in it."""
    shapes = {
        "patch_embed.proj.weight": (width, 3, 2, 2),
        "patch_embed.proj.bias": (width,),
        "cls_token": (1, 1, width),
        "pos_embed": (1, 5, width),
        "blocks.0.attn.qkv.weight": (3 * width, width),
        "blocks.0.attn.proj.weight": (width, width),
        "blocks.0.mlp.fc1.weight": (4, width),
        "blocks.0.mlp.fc2.weight": (width, 4),
    }
    shapes |= {f"blocks.0.norm{i}.{part}": (width,) for i in (1, 2) for part in ("weight", "bias")}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def test_normalisation() -> None:
    vit = read("dino")
    assert (vit.mean, vit.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    config = {"image_mean": [0.5, 0.5, 0.25], "image_std": [0.1, 0.2, 0.3]}
    assert read("dino", config=config).mean == (0.5, 0.5, 0.25)
    assert read("dino", config=config).std == (0.1, 0.2, 0.3)
    assert read("dino", config=config, mean=(0.0, 0.0, 1.0)).mean == (0.0, 0.0, 1.0)
    timm = {"architecture": "vit", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    assert read("timm-vit", config=timm).std == (0.4, 0.5, 0.6)
    with pytest.raises(BuildError, match=r"mean must be three numbers.*got \[0\.5\]"):
        read("dino", config={"image_mean": [0.5]})


def test_activations() -> None:
    config = tiny_models.config("transformers-vit")
    assert read("transformers-vit").blocks[0].rest.feed_forward.activation == "gelu"  # type: ignore[union-attr]
    for name in ("gelu_new", "gelu_pytorch_tanh"):
        found = read("transformers-vit", config=config | {"hidden_act": name}).blocks[0].rest
        assert found is not None
        assert found.feed_forward.activation == "gelu_tanh"
    with pytest.raises(UnrecognisedModelError, match="hidden_act = 'relu'"):
        read("transformers-vit", config=config | {"hidden_act": "relu"})


@pytest.mark.parametrize("change", [{"hidden_size": 384}, {"num_hidden_layers": 12}, {"num_register_tokens": 4}])
def test_config_of_another_model(change: dict[str, int]) -> None:
    with pytest.raises(BuildError, match=rf"config.json says {next(iter(change))} = \d+, but the weights have"):
        read("transformers-vit", config=tiny_models.config("transformers-vit") | change)


def test_table_that_is_not_square() -> None:
    tensors = tiny_models.tensors("timm-vit")
    tensors["pos_embed"] = np.arange(1 + 3 * 8, dtype=np.float32)[None, :, None] * np.ones(16, np.float32)
    with pytest.raises(BuildError, match=r"pos_embed has 24 positions.*config\.json"):
        read_weights(tensors | {"pos_embed": tensors["pos_embed"][:, :24]}, heads=2)
    config = tiny_models.config("timm-vit") | {"pretrained_cfg": {"input_size": [3, 12, 32]}}
    vit = read_weights(tensors, config=config)
    np.testing.assert_array_equal(vit.positions[..., 0], 1 + np.arange(24).reshape(3, 8))
    np.testing.assert_array_equal(vit.prefix, tensors["cls_token"][0])


# What isn't whole, or isn't a vision transformer


@pytest.mark.parametrize(
    ("style", "name"),
    [
        ("dino", "patch_embed.proj.bias"),
        ("dino", "cls_token"),
        ("transformers-dinov2", "embeddings.cls_token"),
        ("dino", "blocks.1.attn.qkv.weight"),
        ("dino", "blocks.0.attn.proj.bias"),
        ("dinov2-chunks", "blocks.1.1.ls2.gamma"),
        ("dinov2-giant", "blocks.0.mlp.w12.weight"),
        ("dinov2-giant", "blocks.0.mlp.w3.bias"),
        ("transformers-vit", "encoder.layer.1.layernorm_after.bias"),
        ("transformers-vit", "encoder.layer.0.attention.attention.key.weight"),
        ("transformers-vit-in-memory", "layers.1.attention.v_proj.bias"),
        ("transformers-giant-in-memory", "encoder.layer.1.mlp.up_proj.weight"),
    ],
)
def test_missing_tensor(style: str, name: str) -> None:
    tensors = tiny_models.tensors(style)
    del tensors[name]
    with pytest.raises(BuildError) as caught:
        read_weights(tensors, config=tiny_models.config(style), heads=2)
    assert f"incomplete, these tensors are missing: {name}" in str(caught.value)


def test_missing_block() -> None:
    tensors = {k.replace("blocks.1.", "blocks.7."): t for k, t in tiny_models.tensors("dino").items()}
    with pytest.raises(BuildError, match="block 1 is missing, though there are 2 others, up to 7"):
        read_weights(tensors, heads=2)


def test_what_every_block_lacks() -> None:
    tensors = {k: t for k, t in tiny_models.tensors("transformers-vit").items() if ".query." not in k}
    with pytest.raises(BuildError, match=r"tensors are missing: encoder\.layer\.0\.attention\.attention\.query\.w"):
        read_weights(tensors, heads=2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.0.attn.q_norm.weight", "normalised queries and keys aren't supported.*q_norm"),
        ("blocks.1.attn.relative_position_bias_table", "belong to no part.*relative_position_bias_table"),
        ("norm_pre.weight", "belong to no part.*norm_pre"),
        ("dist_token", "belong to no part.*dist_token"),
        ("decoder_blocks.0.norm1.weight", "belong to no part.*decoder_blocks"),
    ],
)
def test_tensor_that_would_be_left_out(name: str, message: str) -> None:
    with pytest.raises(UnrecognisedModelError, match=message):
        read_weights(tiny_models.tensors("dino") | {name: np.ones(16, np.float32)}, heads=2)


def test_many_tensors_too_many() -> None:
    extra = {f"extra.{i}": np.ones(1, np.float32) for i in range(9)}
    with pytest.raises(UnrecognisedModelError, match=r"tensors .*extra\.0, .*extra\.4 and 4 more"):
        read_weights(tiny_models.tensors("dino") | extra, heads=2)


@pytest.mark.parametrize(
    ("style", "name", "shape", "message"),
    [
        ("dino", "blocks.1.attn.qkv.weight", (47, 16), r"blocks\.1\.attn\.qkv\.weight .*\(47, 16\).*\(48, 16\)"),
        ("dino", "blocks.0.mlp.fc2.weight", (16, 31), r"fc1\.weight .*\(32, 16\) instead of \(31, 16\)"),
        ("dino", "blocks.0.norm1.bias", (15,), r"norm1\.bias .*\(15,\) instead of \(16,\)"),
        ("dino", "blocks.0.mlp.fc2.weight", (512,), r"fc2\.weight .*\(512,\)"),
        ("dinov2-giant", "blocks.0.mlp.w12.bias", (32,), r"w12\.bias .*\(32,\) instead of \(64,\)"),
        ("dino", "pos_embed", (1, 26, 15), r"pos_embed has the shape \(1, 26, 15\) instead of \(1, positions, 16\)"),
        ("dino", "pos_embed", (2, 26, 16), r"pos_embed has the shape \(2, 26, 16\)"),
        ("dino", "pos_embed", (16,), r"pos_embed has the shape \(16,\)"),
        ("dino", "pos_embed", (1, 24, 16), "24 positions, and neither 23 nor 24 patches"),
        ("dino", "cls_token", (1, 1, 8), "class token .* 16 channels"),
        ("transformers-registers", "embeddings.register_tokens", (1, 3, 4), "registers must have 16 channels"),
        ("dino", "patch_embed.proj.weight", (16, 4, 4, 4), r"\(16, 4, 4, 4\): a patch embedding of square patches"),
        ("dino", "patch_embed.proj.weight", (16, 3, 4, 2), r"\(16, 3, 4, 2\): a patch embedding"),
        ("dino", "patch_embed.proj.weight", (16, 3, 0, 0), r"\(16, 3, 0, 0\): a patch embedding"),
        ("dino", "patch_embed.proj.weight", (16, 48), r"\(16, 48\): a patch embedding"),
    ],
)
def test_wrong_shape(style: str, name: str, shape: tuple[int, ...], message: str) -> None:
    tensors = tiny_models.tensors(style) | {name: np.ones(shape, np.float32)}
    with pytest.raises(BuildError, match=message):
        read_weights(tensors, config=tiny_models.config(style), heads=2)


@pytest.mark.parametrize("name", ["blocks.1.mlp.fc1.weight", "pos_embed", "patch_embed.proj.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(name: str, value: float) -> None:
    tensors = tiny_models.tensors("dino")
    tensors[name].flat[3] = value
    with pytest.raises(BuildError, match=f"{name} holds numbers that aren't finite"):
        read_weights(tensors, heads=2)


def test_weights_in_eight_bits() -> None:
    tensors = tiny_models.tensors("dino")
    tensors["blocks.0.mlp.fc1.weight"] = np.ones((32, 16), np.int8)
    with pytest.raises(BuildError, match="kept as int8"):
        read_weights(tensors, heads=2)


def test_neither_class_token_nor_positions() -> None:
    tensors = tiny_models.tensors("dino") | {"pos_embed": np.ones(16, np.float32)}
    del tensors["cls_token"]
    with pytest.raises(BuildError, match=r"pos_embed has the shape \(16,\)"):
        read_weights(tensors, heads=2)


def test_convolutional_network() -> None:
    tensors = {f"layer1.{i}.conv1.weight": np.ones((8, 8, 3, 3), np.float32) for i in range(9)}
    with pytest.raises(UnrecognisedModelError, match=r"no patch embedding .* 9 tensors \(layer1\.0\.conv1\.weight, "):
        read_weights(tensors)
    with pytest.raises(UnrecognisedModelError, match="no patch embedding"):
        read_weights({})


@pytest.mark.parametrize(
    "names",
    [
        ["patch_embed.proj.weight", "storage_tokens", "rope_embed.periods", "blocks.0.norm1.weight"],
        ["embeddings.patch_embeddings.weight", "embeddings.cls_token", "layer.0.norm1.weight"],
        ["patch_embed.proj.weight", "cls_token", "reg_token", "blocks.0.gamma_1"],
    ],
)
def test_rotary_positions(names: list[str]) -> None:
    with pytest.raises(UnrecognisedModelError, match=r"RoPE.*DINOv3.*aren't supported"):
        read_weights({name: np.ones(16, np.float32) for name in names})


def test_patch_embedding_alone() -> None:
    tensors = {name: t for name, t in tiny_models.tensors("dino").items() if not name.startswith("blocks.")}
    with pytest.raises(UnrecognisedModelError, match=r"no blocks found.*blocks\.0\."):
        read_weights(tensors)


# Files


@pytest.mark.parametrize("kind", ["F64", "F32", "F16"])
@pytest.mark.parametrize("style", ["dinov2-registers", "transformers-vit"])
@pytest.mark.needs("safetensors")
def test_safetensors(tmp_path: Path, style: str, kind: str) -> None:
    write_safetensors(tmp_path / "model.safetensors", tiny_models.tensors(style), kind)
    (tmp_path / "config.json").write_text(json.dumps(tiny_models.config(style)))
    for path in (tmp_path / "model.safetensors", tmp_path):
        tensors, config = load_tensors(path), load_config(path)
        assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
        vit = read_weights(tensors, config=config, heads=2)
        assert difference(vit, style) < 1e-5


@pytest.mark.needs("safetensors")
def test_bfloat16(tmp_path: Path) -> None:
    tensors = tiny_models.tensors("dino")
    write_safetensors(tmp_path / "m.safetensors", tensors, "BF16")
    found = load_tensors(tmp_path / "m.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_allclose(found[name], tensor, rtol=2**-7, err_msg=name)
        assert found[name].shape == tensor.shape
    assert not np.array_equal(found["pos_embed"], tensors["pos_embed"])


@pytest.mark.needs("safetensors")
def test_type_that_is_not_read(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"a": np.zeros(4)}, "F8_E4M3")
    with pytest.raises(BuildError, match=r"m\.safetensors keeps a as F8_E4M3"):
        load_tensors(tmp_path / "m.safetensors")


def in_parts(folder: Path) -> Path:
    tensors = tiny_models.tensors("transformers-dinov2")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:20], "model-2.safetensors": names[20:]}
    for file, held in parts.items():
        write_safetensors(folder / file, {name: tensors[name] for name in held})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, held in parts.items() for name in held}}))
    return index


@pytest.mark.needs("safetensors")
def test_weights_in_several_files(tmp_path: Path) -> None:
    index = in_parts(tmp_path)
    expected = tiny_models.tensors("transformers-dinov2")
    for path in (index, tmp_path):
        found = load_tensors(path)
        assert set(found) == set(expected)
        np.testing.assert_array_equal(found["layernorm.weight"], expected["layernorm.weight"])


def test_one_file_of_several_is_missing(tmp_path: Path) -> None:
    index = in_parts(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(BuildError, match=r"names model-2\.safetensors, which isn't beside it"):
        load_tensors(index)


@pytest.mark.needs("safetensors")
def test_index_that_promises_more(tmp_path: Path) -> None:
    index = in_parts(tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"]["more"] = "model-1.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(BuildError, match="promises 1 tensors that its files don't hold: more"):
        load_tensors(index)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_index_that_points_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "m.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(BuildError, match="must lie beside it"):
        load_tensors(tmp_path / "m.index.json")


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 200_000, '{"a":' * 200_000]
)
def test_bad_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "m.index.json").write_text(content)
    with pytest.raises(BuildError, match=r"m\.index\.json"):
        load_tensors(tmp_path / "m.index.json")


@pytest.mark.needs("safetensors")
def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, tiny_models.tensors("dino"))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-1], whole[:5], b"\xff" * 200, b"<!doctype html>" * 9):
        path.write_bytes(content)
        with pytest.raises(BuildError, match=r"m\.safetensors can't be read as safetensors"):
            load_tensors(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    with pytest.raises(BuildError, match="Git LFS"):
        load_tensors(path)
    write_safetensors(path, {})
    with pytest.raises(BuildError, match="holds no tensors"):
        load_tensors(path)


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**40]}}, None),
        ({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}}, None),
        ({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}}, None),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, None),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, None),
        ({"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 8]}}, None),
        ({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}, None),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 2**63),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 2**31),
        (["a"], None),
    ],
)
@pytest.mark.needs("safetensors")
def test_header_that_lies(tmp_path: Path, header: Any, size: int | None) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes((size or len(text)).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(BuildError, match=r"m\.safetensors can't be read as safetensors"):
        load_tensors(tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(BuildError, match=f"{name} is empty"):
        load_tensors(tmp_path / name)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file of weights at .*m\.safetensors"):
        load_tensors(tmp_path / "m.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none of model\.safetensors, .* give the file"):
        load_tensors(tmp_path)


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "m.h5").write_bytes(b"something")
    with pytest.raises(BuildError, match=r"\.safetensors, .*; \.h5 is none of them"):
        load_tensors(tmp_path / "m.h5")


def test_config_beside_the_weights(tmp_path: Path) -> None:
    assert load_config(tmp_path / "m.safetensors") == {}
    (tmp_path / "config.json").write_text('{"num_attention_heads": 3}')
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "do_resize": true}')
    expected = {"num_attention_heads": 3, "image_mean": [0.5, 0.5, 0.5]}
    assert load_config(tmp_path / "m.safetensors") == load_config(tmp_path) == expected
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BuildError, match=r"config\.json can't be read as JSON"):
        load_config(tmp_path)


# PyTorch's files


class Payload:
    """What a malicious pickle looks like."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_pytorch_is_asked_for_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "m.pth").write_bytes(b"something")
    with pytest.raises(ImportError, match=r"m\.pth needs PyTorch 2\.6 .*pip install torch.*\.safetensors"):
        load_tensors(tmp_path / "m.pth")


def test_safetensors_is_asked_for_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "m.safetensors").write_bytes(b"something")
    with pytest.raises(ImportError, match=r"pip install 'sparsespec\[build\]'"):
        load_tensors(tmp_path / "m.safetensors")


def test_old_pytorch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="2.5.1+cpu"))
    (tmp_path / "m.pth").write_bytes(b"something")
    with pytest.raises(ImportError, match=r"PyTorch 2\.5\.1\+cpu can be made to execute code .*2\.6"):
        load_tensors(tmp_path / "m.pth")


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", minversion="2.6", reason="needs PyTorch")


@pytest.mark.parametrize("name", ["m.pth", "m.pt", "pytorch_model.bin"])
def test_pytorch_file(tmp_path: Path, torch: Any, name: str) -> None:
    state = {key: torch.from_numpy(tensor) for key, tensor in tiny_models.tensors("dinov2").items()}
    torch.save(state, tmp_path / name)
    assert difference(read_weights(load_tensors(tmp_path / name), heads=2), "dinov2") < 1e-5


def test_checkpoint(tmp_path: Path, torch: Any) -> None:
    state = {key: torch.from_numpy(tensor) for key, tensor in tiny_models.tensors("dino").items()}
    content = {
        "student": {f"module.backbone.{key}": -tensor for key, tensor in state.items()},
        "teacher": {f"backbone.{key}": tensor.to(torch.bfloat16).double() for key, tensor in state.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=16),
    }
    torch.save(content, tmp_path / "m.pth")
    tensors = load_tensors(tmp_path / "m.pth")
    assert tensors["teacher.backbone.pos_embed"].dtype == np.float32
    vit = read_weights(tensors, heads=2)
    assert 1e-5 < difference(vit, "dino") < 0.05


def test_code_is_not_executed(tmp_path: Path, torch: Any) -> None:
    trace = tmp_path / "executed"
    torch.save({"a": Payload(trace)}, tmp_path / "m.pth")
    with pytest.raises(BuildError, match="code or objects besides tensors, which are not executed"):
        load_tensors(tmp_path / "m.pth")
    assert not trace.exists()


def test_damaged_pytorch_file(tmp_path: Path, torch: Any) -> None:
    path = tmp_path / "m.pth"
    torch.save({"a": torch.ones(1000)}, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"garbage" * 20, b"\x80\x04."):
        path.write_bytes(content)
        with pytest.raises(BuildError, match=r"m\.pth can't be read"):
            load_tensors(path)


def test_pytorch_file_without_a_state_dict(tmp_path: Path, torch: Any) -> None:
    path = tmp_path / "m.pth"
    torch.save([torch.ones(2)], path)
    with pytest.raises(BuildError, match="holds a list, not a state dict"):
        load_tensors(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(BuildError, match="holds no tensors"):
        load_tensors(path)
    torch.save({"a": torch.ones(2, 2).to_sparse()}, path)
    with pytest.raises(BuildError, match="keeps a in a quantised or sparse form"):
        load_tensors(path)
