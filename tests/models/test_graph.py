from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsespec.models import get_model
from sparsespec.models.graph import chosen_blocks, quantised_columns, write_graph
from sparsespec.models.metadata import parse_trunk_metadata
from sparsespec.models.vit import Block, BuildError, Linear, Rest, Vit
from tests.reference.vit import forward
from tests.tiny_vit import random_vit

DEFAULT = get_model("default")
PARTS = ("queries", "keys", "values")
GRIDS = [(1, 1), (3, 3), (2, 5), (6, 1), (1, 40), (7, 4)]


def _write(vit: Vit, **options: Any) -> Any:
    pytest.importorskip("onnx", reason="writing a graph needs the extra 'build'")
    given = {"name": "tiny", "source": "nowhere", "source_sha256": "0" * 64, **options}
    return write_graph(vit, **given)


def _open(model: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _feeds(vit: Vit, grid: tuple[int, int], batch: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    p = vit.patch_size
    image = rng.normal(size=(batch, 3, p * grid[0], p * grid[1])).astype(np.float32)
    rows = rng.normal(size=(grid[0] * grid[1], vit.embed_dim)).astype(np.float32)
    return {"image": image, "positions": np.concatenate([vit.prefix, rows])[None]}


def _expected(vit: Vit, feeds: dict[str, np.ndarray], block: int = -1) -> list[np.ndarray]:
    """Queries, keys and values of a block for each image of the batch, without the rows in front of the patches."""
    prefix = len(vit.prefix)
    found = [forward(vit, image, feeds["positions"][0, prefix:])[block] for image in feeds["image"]]
    return [np.stack([one[part][prefix:] for one in found]) for part in range(3)]


def _assert_near(found: list[np.ndarray], expected: list[np.ndarray], relative: float) -> None:
    for one, reference in zip(found, expected, strict=True):
        assert one.dtype == np.float32
        assert one.shape == reference.shape
        assert np.abs(one - reference).max() <= relative * np.abs(reference).max()


def _worst_cosine(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return min(
        float(((a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))).min())
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
def test_graph_computes_a_vision_transformer(activation: str, prefix: int, grid: tuple[int, int]) -> None:
    vit = random_vit(activation=activation, prefix=prefix)
    feeds = _feeds(vit, grid, batch=2)
    expected = _expected(vit, feeds)
    _assert_near(_open(_write(vit)).run(list(PARTS), feeds), expected, 1e-5)
    _assert_near(_open(_write(vit, precision="float16")).run(list(PARTS), feeds), expected, 1e-2)
    rounded = _open(_write(vit, precision="int8")).run(list(PARTS), feeds)
    assert _worst_cosine(rounded, expected) > 0.99
    assert _worst_cosine(rounded, expected) < 1 - 1e-7


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_several_blocks(prefix: int, precision: str) -> None:
    vit = random_vit(prefix=prefix, blocks=5, complete=True)
    model = _write(vit, precision=precision, blocks=(-2, 0, 1))
    session = _open(model)
    names = [*PARTS, *(f"{part}.{block}" for block in (0, 1) for part in PARTS)]
    assert [output.name for output in session.get_outputs()] == names
    feeds = _feeds(vit, (2, 5), batch=2)
    found = session.run(names, feeds)
    for at, block in enumerate((3, 0, 1)):
        part, expected = found[3 * at : 3 * at + 3], _expected(vit, feeds, block)
        if precision == "int8":
            assert _worst_cosine(part, expected) > 0.99
        else:
            _assert_near(part, expected, 1e-5 if precision == "float32" else 1e-2)
    # What lies behind the last block wanted is left out.
    assert not any(weight.name.startswith(("block.4", "block.3.fc")) for weight in model.graph.initializer)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(("channels", "heads"), [(21, 3), (10, 5), (15, 15), (37, 1), (72, 1)])
def test_heads_of_odd_sizes(channels: int, heads: int, precision: str) -> None:
    vit = random_vit(channels=channels, heads=heads, prefix=1)
    feeds = _feeds(vit, (9, 11))
    found = _open(_write(vit, precision=precision)).run(list(PARTS), feeds)
    _assert_near(found, _expected(vit, feeds), 1e-5 if precision == "float32" else 1e-2)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_biases_that_are_zero_are_left_out(precision: str) -> None:
    vit = random_vit(biases=False)
    model = _write(vit, precision=precision)
    biases = [weight.name for weight in model.graph.initializer if weight.name.endswith(".bias")]
    assert all(".norm" in name for name in biases)
    feeds = _feeds(vit, (3, 4))
    found, expected = _open(model).run(list(PARTS), feeds), _expected(vit, feeds)
    assert _worst_cosine(found, expected) > 0.99
    if precision != "int8":
        _assert_near(found, expected, 1e-5 if precision == "float32" else 1e-2)


def test_attention_stays_on_the_path_of_linear_memory() -> None:
    # With a bias, a mask or a second output ONNX Runtime takes another one.
    for node in _write(random_vit()).graph.node:
        if node.op_type == "MultiHeadAttention":
            assert len(node.input) == 3
            assert len(node.output) == 1


def test_int8_keeps_no_matrix_in_floats() -> None:
    model = _write(random_vit(activation="swiglu"), precision="int8")
    matrices = [w for w in model.graph.initializer if len(w.dims) == 2]
    assert len(matrices) == 2 * 4 + 1
    assert {w.data_type for w in matrices} == {3}
    assert not any(node.op_type == "MatMul" for node in model.graph.node)


@pytest.mark.parametrize("blocks", [(-1,), (0, 2)])
def test_int8_is_fused_when_it_is_loaded(blocks: tuple[int, ...], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="writing a graph needs the extra 'build'")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3  # it warns that such a file is for this machine only
    content = _write(random_vit(), precision="int8", blocks=blocks).SerializeToString()
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert kinds.count("DynamicQuantizeMatMul") == 2 * 4 + 1
    assert "MatMulInteger" not in kinds


def test_weights_are_rounded_as_the_quantiser_of_onnx_runtime_does(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="writing a graph needs the extra 'build'")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    vit = random_vit(prefix=5)
    out = vit.blocks[0].rest.out.weight  # type: ignore[union-attr]
    out[:, 3] = 0
    out[:, 4] *= 1e-30
    out[:, 5] = np.abs(out[:, 5])
    onnx.save(_write(vit), tmp_path / "float32.onnx")
    quantize_dynamic(
        tmp_path / "float32.onnx",
        tmp_path / "int8.onnx",
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul"],
        extra_options={"DefaultTensorType": 1},
    )
    theirs = {w.name: onnx.numpy_helper.to_array(w) for w in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    ours = {w.name: onnx.numpy_helper.to_array(w) for w in _write(vit, precision="int8").graph.initializer}
    assert set(ours) == set(theirs)
    assert sum(name.endswith("_quantized") for name in ours) == 9
    for name, weight in ours.items():
        np.testing.assert_array_equal(weight, theirs[name], err_msg=name)


def test_rounded_columns_are_near() -> None:
    weight = np.random.default_rng(3).normal(size=(50, 8)).astype(np.float32) * np.logspace(-6, 6, 8, dtype=np.float32)
    weight[:, 0] = 0
    integers, scales = quantised_columns(weight)
    assert (np.abs(integers * scales - weight) <= 0.501 * scales).all()
    assert (np.abs(integers).max(axis=0)[1:] == 127).all()
    assert not integers[:, 0].any()


def test_activations_that_grow_large_stay_finite_in_half_precision() -> None:
    # A few channels of DINOv2 carry values in the hundreds from block to block.
    vit = random_vit(blocks=4)
    first = vit.blocks[0]
    assert first.rest is not None
    out = first.rest.out
    loud = replace(first.rest, out=replace(out, bias=out.bias + np.eye(1, 16, 3, dtype=np.float32)[0] * 60_000))
    vit = replace(vit, blocks=(replace(first, rest=loud), *vit.blocks[1:]))
    feeds = _feeds(vit, (3, 4))
    feeds["positions"][..., 3] = 50_000
    found = _open(_write(vit, precision="float16")).run(list(PARTS), feeds)
    _assert_near(found, _expected(vit, feeds), 1e-2)


def test_weight_too_large_for_half_precision() -> None:
    vit = random_vit()
    attention = vit.blocks[1].attention
    huge = replace(attention, key=replace(attention.key, weight=attention.key.weight * 1e6))
    vit = replace(vit, blocks=(vit.blocks[0], replace(vit.blocks[1], attention=huge), vit.blocks[2]))
    with pytest.raises(BuildError, match=r"block\.1\.qkv\.weight holds .*e\+0\d, .* too large for half precision"):
        _write(vit, precision="float16")
    _write(vit, precision="int8")


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_graph_describes_itself(precision: str) -> None:
    vit = random_vit(prefix=5)
    model = _write(vit, precision=precision, name="n", source="s", source_sha256="ab" * 32, blocks=(1,))
    metadata = parse_trunk_metadata({p.key: p.value for p in model.metadata_props}, where="m")
    assert (metadata.name, metadata.precision, metadata.source) == ("n", precision, "s")
    assert metadata.source_sha256 == "ab" * 32
    assert (metadata.patch_size, metadata.embed_dim, metadata.heads, metadata.blocks) == (4, 16, 2, 3)
    assert metadata.output_blocks == (1,)
    np.testing.assert_array_equal(metadata.positions, vit.positions)
    np.testing.assert_array_equal(metadata.prefix, vit.prefix)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_graph_is_valid_and_written_the_same_twice(precision: str) -> None:
    onnx = pytest.importorskip("onnx", reason="writing a graph needs the extra 'build'")
    models = [_write(random_vit(prefix=5), precision=precision, blocks=(0, -1)) for _ in range(2)]
    onnx.checker.check_model(models[0], full_check=True)
    assert models[0].SerializeToString(deterministic=True) == models[1].SerializeToString(deterministic=True)


def test_writing_does_not_change_logging() -> None:
    before = logging.root.manager.disable, logging.root.level, list(logging.root.handlers)
    _write(random_vit(), precision="int8")
    assert (logging.root.manager.disable, logging.root.level, list(logging.root.handlers)) == before


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match="precision must be one of float32, float16, int8, int8-static, got 'int4'"):
        _write(random_vit(), precision="int4")


def test_unknown_activation() -> None:
    with pytest.raises(BuildError, match="activation 'relu'"):
        _write(random_vit(activation="relu"))


def test_model_too_large_for_a_file() -> None:
    vit = random_vit()
    block = vit.blocks[0]
    assert block.rest is not None
    wide = Linear(np.broadcast_to(np.float32(1), (2**15, 2**14)), np.zeros(2**14, np.float32))
    rest = Rest(wide, block.rest.norm, block.rest.feed_forward)
    with pytest.raises(BuildError, match="at most 2 GB and this model needs more in float32: choose float16 or int8"):
        _write(replace(vit, blocks=(Block(block.attention, rest), vit.blocks[-1])))


def test_block_behind_one_that_was_cut() -> None:
    vit = random_vit(blocks=2)
    vit = replace(vit, blocks=(replace(vit.blocks[0], rest=None), vit.blocks[1]))
    with pytest.raises(BuildError, match="block 0 ends after its queries, keys and values, but block 1 is wanted"):
        _write(vit)
    _write(vit, blocks=(0,))


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [((-1,), (11,)), ([11, 8], (8, 11)), ((8, -4), (8,)), (range(12), tuple(range(12))), ((np.int64(3),), (3,))],
)
def test_chosen_blocks(blocks: Any, expected: tuple[int, ...]) -> None:
    assert chosen_blocks(blocks, 12) == expected


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ((), r"blocks must be block numbers such as .* got \(\)"),
        ("11", "got '11'"),
        (11, "got 11"),
        ((1.5,), "whole numbers, got 1.5"),
        ((True,), "whole numbers, got True"),
        ((12,), "there is no block 12: this network has blocks 0 to 11, or -12 to -1"),
        ((0, -13), "there is no block -13"),
    ],
)
def test_blocks_that_are_not_there(blocks: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        chosen_blocks(blocks, 12)


# The embedded model


@pytest.fixture(scope="module")
def session() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(DEFAULT.path, options, providers=["CPUExecutionProvider"])


def test_inputs_and_outputs(session: Any) -> None:
    inputs = {i.name: (i.type, i.shape) for i in session.get_inputs()}
    assert inputs == {
        "image": ("tensor(float)", ["batch", 3, "height", "width"]),
        "positions": ("tensor(float)", [1, "positions", 384]),
    }
    outputs = {o.name: (o.type, o.shape) for o in session.get_outputs()}
    assert outputs == {name: ("tensor(float)", ["batch", "tokens", 384]) for name in ("queries", "keys", "values")}


@pytest.mark.parametrize(("batch", "grid"), [(1, (1, 1)), (1, (3, 7)), (2, (4, 2)), (3, (1, 5))])
def test_any_batch_and_size(session: Any, batch: int, grid: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    count = grid[0] * grid[1]
    feeds = {
        "image": rng.normal(size=(batch, 3, 14 * grid[0], 14 * grid[1])).astype(np.float32),
        "positions": 0.01 * rng.normal(size=(1, 1 + count, 384)).astype(np.float32),
    }
    together = session.run(None, feeds)
    for part in together:
        assert part.shape == (batch, count, 384)
        assert np.isfinite(part).all()
    # The 8-bit range of the activations is that of the whole batch, so pictures in it feel each other slightly.
    for index in range(batch):
        alone = session.run(None, {**feeds, "image": feeds["image"][index : index + 1]})
        for one, many in zip(alone, together, strict=True):
            a, b = one[0].ravel(), many[index].ravel()
            assert a @ b > 0.99 * np.linalg.norm(a) * np.linalg.norm(b)


def test_positions_matter(session: Any) -> None:
    image = np.zeros((1, 3, 28, 42), np.float32)
    nowhere = session.run(["keys"], {"image": image, "positions": np.zeros((1, 7, 384), np.float32)})[0][0]
    np.testing.assert_allclose(nowhere, nowhere[:1].repeat(6, 0), atol=1e-4)
    rng = np.random.default_rng(0)
    somewhere = 0.1 * rng.normal(size=(1, 7, 384)).astype(np.float32)
    assert session.run(["keys"], {"image": image, "positions": somewhere})[0][0].std(0).max() > 0.1
