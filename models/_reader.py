"""Reads the one export that the embedded model comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec.position_table import PositionRule

from .vit import Attention, Block, BuildError, FeedForward, Linear, Norm, Rest, Vit

_Array = npt.NDArray[Any]


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


def read_trunk(model: Any) -> tuple[Vit, tuple[str, str, str]]:
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
    blocks: list[Block] = []
    state = added.output[0]
    heads = 0
    for softmax in softmaxes:
        attention, heads, taps, mixed = _read_attention(graph, state, softmax)
        if softmax is softmaxes[-1]:
            blocks.append(Block(attention, None))
            side = round((len(positions) - 1) ** 0.5)
            prefix = (positions[:1] + class_token).astype(np.float32)
            table = positions[1:].reshape(side, side, embed_dim).astype(np.float32)
            return Vit(patch, prefix, table, PositionRule(), heads, tuple(blocks)), taps
        rest, state = _read_rest(graph, state, mixed)
        blocks.append(Block(attention, rest))
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
    return Rest(out, norm, FeedForward(fc1, fc2)), state


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
