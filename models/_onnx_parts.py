"""The parts of a vision transformer, found in an ONNX graph by structure: layers, norms, attention, activation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._onnx_graph import Graph, Node, NoMatchError
from ._onnx_ops import MOVES, Array
from .vit import Attention, FeedForward, Linear, Norm, Rest, float32

ATTENTION_OPS = ("Softmax", "Attention", "MultiHeadAttention")


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer in the graph, the tensor that goes in and the one that comes out."""

    linear: Linear
    source: str
    output: str


@dataclass(frozen=True, eq=False)
class Projection:
    """Outputs of a linear layer after reshapes and selections: ``codes`` numbers them row by row.

    An entry of ``codes`` is row * width + column in the output of the layer; ``scale`` is what it was multiplied by.
    """

    layer: Layer
    codes: Array
    scale: float

    def columns(self, codes: Array) -> Array:
        """Columns of the layer behind (..., N, c) codes, one row of them for all N; N are the rows in their order."""
        rows, columns = np.divmod(codes, self.layer.linear.weight.shape[1])
        if not (rows == np.arange(codes.shape[-2])[:, None]).all() or not (columns == columns[..., :1, :]).all():
            raise NoMatchError(
                f"the rows of {self.layer.output!r} are regrouped on their way, as by attention within windows"
            )
        return np.asarray(columns[..., 0, :])


@dataclass(frozen=True, eq=False)
class Tap:
    """Where to find queries, keys or values: a tensor, the layer still to be applied to it, columns and a factor."""

    tensor: str
    layer: Linear | None
    columns: Array
    factor: float


@dataclass(frozen=True, eq=False)
class AttentionMatch:
    """Attention of one block: its weights, the state it starts from, what comes out."""

    attention: Attention
    heads: int
    source: str
    normed: str
    output: str
    taps: tuple[Tap, Tap, Tap]


@dataclass(frozen=True, eq=False)
class _Core:
    """Softmax(queries x keys) x values; ``keys_last``: whether the tokens are the last axis of the keys."""

    operands: tuple[str, str, str]
    keys_last: bool
    scale: float | None
    heads: int | None
    output: str


def _needed(graph: Graph, tensor: str) -> Array:
    value = graph.value(tensor)
    if value is None:
        raise NoMatchError(f"{tensor!r} isn't a constant")
    return value


def _made(graph: Graph, tensor: str, what: str) -> Node:
    node = graph.maker(graph.rows(tensor))
    if node is None:
        kind = "a constant" if graph.is_constant(tensor) else "made by no node of the graph"
        raise NoMatchError(f"expected {what}, found {tensor!r}, which is {kind}")
    return node


# Layers


def linear(graph: Graph, tensor: str) -> Layer:
    """Match MatMul, Gemm or MatMul + Add with constant weights, by what comes out."""
    what = "a linear layer (MatMul or Gemm with a constant matrix)"
    node = _made(graph, tensor, what)
    added: Array | None = None
    if node.op == "Add" and (parts := graph.split_constant(node)) is not None:
        added = _needed(graph, parts[1])
        node = _made(graph, parts[0], what)
    if node.op not in ("MatMul", "Gemm", "FusedMatMul") or len(node.inputs) < 2:
        raise NoMatchError(f"expected {what}, found {node}")
    if graph.is_constant(node.inputs[0]) or not graph.is_constant(node.inputs[1]):
        raise NoMatchError(f"expected {what}, but the second operand of {node} isn't a constant")
    weight = _needed(graph, node.inputs[1])
    if weight.ndim < 2 or set(weight.shape[:-2]) - {1} or node.attributes.get("transA"):
        raise NoMatchError(f"expected {what}, but {node} has one of shape {weight.shape}")
    weight = weight.reshape(-1, weight.shape[-1])
    if node.attributes.get("transB"):
        weight = weight.T
    if node.op != "MatMul" and node.attributes.get("alpha", 1.0) != 1.0:
        weight = weight * node.attributes["alpha"]
    bias = np.zeros(weight.shape[1], np.float32)
    if node.op == "Gemm" and len(node.inputs) > 2 and node.inputs[2]:
        bias = bias + _vector(_needed(graph, node.inputs[2]), len(bias), node) * node.attributes.get("beta", 1.0)
    if added is not None:
        bias = bias + _vector(added, len(bias), node)
    return Layer(Linear(float32(weight), float32(bias)), graph.rows(node.inputs[0]), graph.root(tensor))


def _vector(value: Array, size: int, node: Node) -> Array:
    """One entry per channel, from a constant that is broadcast over the tokens."""
    if value.size not in (1, size) or (value.ndim and value.shape[-1] != value.size):
        raise NoMatchError(f"what is combined with {node} has the shape {value.shape}, expected {size} channels")
    return np.broadcast_to(value.reshape(-1), (size,))


def scaled_linear(graph: Graph, tensor: str) -> Layer:
    """Match a linear layer and the layer scale behind it, multiplied together."""
    factors: list[Array] = []
    name = tensor
    while (node := graph.maker(graph.rows(name))) is not None and node.op in ("Mul", "Div"):
        parts = graph.split_constant(node)
        if parts is None or (node.op == "Div" and node.inputs[0] == parts[1]):
            break
        value = _needed(graph, parts[1]).astype(np.float64)
        factors.append(1 / value if node.op == "Div" else value)
        name = parts[0]
    layer = linear(graph, name)
    if not factors:
        return layer
    weight, bias = layer.linear.weight, layer.linear.bias
    gamma = np.ones(len(bias))
    for factor in factors:
        gamma = gamma * _vector(factor, len(bias), node) if node is not None else gamma
    folded = Linear(float32(weight * gamma), float32(bias * gamma))
    return Layer(folded, layer.source, graph.root(tensor))


def projection(graph: Graph, tensor: str) -> Projection:
    """Match a linear layer followed by reshapes, selections and a factor, by what comes out."""
    name, scale = graph.root(tensor), 1.0
    while (node := graph.maker(name)) is not None:
        if node.op in MOVES or node.op == "Split":
            name = node.inputs[0]
            continue
        parts = graph.split_constant(node) if node.op in ("Mul", "Div") else None
        factor = None if parts is None else graph.scalar(parts[1])
        if parts is None or factor is None or (node.op == "Div" and node.inputs[0] == parts[1]) or factor == 0:
            break
        scale = scale / factor if node.op == "Div" else scale * factor
        name = parts[0]
    layer = linear(graph, name)
    shape = graph.shape(name)
    if shape is None:
        raise NoMatchError(f"the shape of {name!r} isn't known")
    codes = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    return Projection(layer, graph.evaluate(tensor, {name: codes}, skip_scale=True), scale)


# Norms


def norm(graph: Graph, tensor: str) -> tuple[Norm, str]:
    """Match a layer normalisation, as one operator or spelled out; return it and the tensor that goes in."""
    what = "a layer normalisation"
    node = _made(graph, tensor, what)
    if node.op == "LayerNormalization":
        shape = graph.shape(node.inputs[0])
        axis = node.attributes.get("axis", -1)
        if len(node.inputs) < 2 or (axis != -1 and (shape is None or axis != len(shape) - 1)):
            raise NoMatchError(f"expected {what} over the channels, {node} is another")
        weight = _needed(graph, node.inputs[1]).reshape(-1)
        bias = np.zeros_like(weight)
        if len(node.inputs) > 2 and node.inputs[2]:
            bias = _needed(graph, node.inputs[2]).reshape(-1)
        found = Norm(float32(weight), float32(bias), float(node.attributes.get("epsilon", 1e-5)))
        return found, graph.rows(node.inputs[0])

    shift = scale = None
    if node.op == "Add" and (parts := graph.split_constant(node)) is not None:
        shift, node = _needed(graph, parts[1]), _made(graph, parts[0], what)
    if node.op == "Mul" and (parts := graph.split_constant(node)) is not None:
        scale, node = _needed(graph, parts[1]), _made(graph, parts[0], what)
    for centred, spread in _normalised(graph, node):
        try:
            source = _centred(graph, centred)
            epsilon = _epsilon(graph, spread, source)
        except NoMatchError:
            continue
        shape = graph.shape(source)
        if not shape:
            break
        weight = np.ones(shape[-1]) if scale is None else _vector(scale, shape[-1], node)
        bias = np.zeros(shape[-1]) if shift is None else _vector(shift, shape[-1], node)
        return Norm(float32(weight), float32(bias), epsilon), graph.rows(source)
    raise NoMatchError(f"expected {what}, found {node}")


def _normalised(graph: Graph, node: Node) -> list[tuple[str, str]]:
    """(x - mean, variance + epsilon) out of (x - mean) / sqrt(variance + epsilon) in any spelling."""
    if node.op == "Div" and len(node.inputs) == 2:
        root = graph.maker(node.inputs[1])
        return [(node.inputs[0], root.inputs[0])] if root is not None and root.op == "Sqrt" else []
    found = []
    if node.op == "Mul" and len(node.inputs) == 2:
        for centred, other in (node.inputs, node.inputs[::-1]):
            inverse = graph.maker(other)
            if inverse is None:
                continue
            if inverse.op == "Pow" and len(inverse.inputs) == 2 and graph.scalar(inverse.inputs[1]) == -0.5:
                found.append((centred, inverse.inputs[0]))
            if inverse.op == "Reciprocal" or (inverse.op == "Div" and graph.scalar(inverse.inputs[0]) == 1):
                root = graph.maker(inverse.inputs[-1])
                if root is not None and root.op == "Sqrt":
                    found.append((centred, root.inputs[0]))
    return found


def _centred(graph: Graph, tensor: str) -> str:
    """Return x out of x - mean(x)."""
    node = graph.maker(tensor)
    if node is None or node.op != "Sub" or len(node.inputs) != 2:
        raise NoMatchError("no difference")
    mean = graph.maker(node.inputs[1])
    _check_mean(graph, mean, node.inputs[0])
    return graph.root(node.inputs[0])


def _check_mean(graph: Graph, node: Node | None, source: str) -> None:
    """Whether a node is the mean of a tensor over its last axis."""
    if node is None or node.op != "ReduceMean" or graph.root(node.inputs[0]) != graph.root(source):
        raise NoMatchError("no mean")
    before, after = graph.shape(source), graph.shape(node.outputs[0])
    if before is None or after != (*before[:-1], 1):
        raise NoMatchError("a mean over other axes")


def _epsilon(graph: Graph, spread: str, source: str) -> float:
    """Return epsilon out of mean((x - mean(x))^2) + epsilon."""
    node = graph.maker(spread)
    epsilon = 0.0
    if node is not None and node.op == "Add" and (parts := graph.split_constant(node)) is not None:
        value = graph.scalar(parts[1])
        if value is None:
            raise NoMatchError("no epsilon")
        epsilon, node = value, graph.maker(parts[0])
    square = graph.maker(node.inputs[0]) if node is not None and node.inputs else None
    if square is None or len(square.inputs) != 2:
        raise NoMatchError("no square")
    _check_mean(graph, node, square.outputs[0])
    doubled = square.op == "Mul" and square.inputs[0] == square.inputs[1]
    if not doubled and not (square.op == "Pow" and graph.scalar(square.inputs[1]) == 2):
        raise NoMatchError("no square")
    if _centred(graph, square.inputs[0]) != source:
        raise NoMatchError("the square of something else")
    return epsilon


# Attention


def _core(graph: Graph, node: Node) -> _Core:
    if node.op == "Softmax":
        return _spelled_core(graph, node)
    more = [name for name in node.inputs[3:] if name]
    if len(node.inputs) < 3 or not all(node.inputs[:3]) or any(not _masks_nothing(graph, name) for name in more):
        raise NoMatchError(f"{node} has a mask, a cache or packed inputs, expected queries, keys and values alone")
    if node.attributes.get("is_causal") or node.attributes.get("unidirectional") or node.attributes.get("softcap"):
        raise NoMatchError(f"{node} is causal or caps its scores")
    heads = node.attributes.get("num_heads", node.attributes.get("q_num_heads"))
    if node.attributes.get("kv_num_heads", heads) != heads:
        raise NoMatchError(f"{node} has fewer heads of keys than of queries")
    scale = node.attributes.get("scale") or None
    queries, keys, values = node.inputs[:3]
    return _Core((queries, keys, values), False, scale, heads, graph.root(node.outputs[0]))


def _masks_nothing(graph: Graph, tensor: str) -> bool:
    """Whether a mask lets everything through: all true, or zeros that are added."""
    if not graph.is_constant(tensor):
        return False
    mask = _needed(graph, tensor)
    return bool(mask.all()) if mask.dtype == np.bool_ else mask.dtype.kind == "f" and not mask.any()


def _spelled_core(graph: Graph, softmax: Node) -> _Core:
    shape = graph.shape(softmax.outputs[0])
    if shape is not None and softmax.attributes.get("axis", -1) not in (-1, len(shape) - 1):
        raise NoMatchError(f"{softmax} runs over axis {softmax.attributes['axis']} of {len(shape)}")
    name, scale = softmax.inputs[0], 1.0
    while True:
        node = _made(graph, name, "scores (a product of queries and keys)")
        parts = graph.split_constant(node)
        factor = None if parts is None else graph.scalar(parts[1])
        if node.op in ("Mul", "Div") and parts is not None and factor:
            scale = scale / factor if node.op == "Div" else scale * factor
        elif node.op == "Add" and parts is not None and _masks_nothing(graph, parts[1]):
            pass
        else:
            break
        name = parts[0]
    if node.op == "Add":
        raise NoMatchError(f"{node} adds something to the scores (a mask or a relative position), expected nothing")
    if node.op not in ("MatMul", "FusedMatMul") or any(graph.is_constant(n) for n in node.inputs):
        raise NoMatchError(f"expected scores (a product of queries and keys) in front of {softmax}, found {node}")
    if node.attributes.get("transA"):
        raise NoMatchError(f"{node} turns its first operand around")
    scale *= node.attributes.get("alpha", 1.0)
    products = [
        taker
        for taker in graph.takers(softmax.outputs[0])
        if taker.op == "MatMul"
        and graph.rows(taker.inputs[0]) == graph.rows(softmax.outputs[0])
        and not graph.is_constant(taker.inputs[1])
    ]
    if len(products) != 1:
        raise NoMatchError(f"expected one product of {softmax} with values, found {len(products)}")
    operands = (node.inputs[0], node.inputs[1], products[0].inputs[1])
    return _Core(operands, not node.attributes.get("transB", 0), scale, None, products[0].outputs[0])


def _by_heads(codes: Array, heads: int | None, tokens_last: bool) -> Array:
    """Bring (1, H, N, c), (H, N, c) or (1, N, H * c) to (H, N, c)."""
    if codes.ndim == 4 and codes.shape[0] == 1:
        codes = codes[0]
    elif codes.ndim == 3 and heads is not None:
        if codes.shape[0] != 1 or codes.shape[2] % heads:
            raise NoMatchError(f"{heads} heads don't fit an operand of shape {codes.shape}")
        return codes[0].reshape(codes.shape[1], heads, -1).transpose(1, 0, 2)
    elif codes.ndim != 3:
        raise NoMatchError(f"expected the shape (1, heads, tokens, channels), found {codes.shape}")
    return codes.transpose(0, 2, 1) if tokens_last else codes


def attention(graph: Graph, node: Node) -> AttentionMatch:
    """Match the attention of a block: norm, three projections, scores.

    Parameters
    ----------
    graph : Graph
        The graph.
    node : Node
        One of :data:`ATTENTION_OPS`.

    Raises
    ------
    NoMatchError
        When something else stands there.
    """
    core = _core(graph, node)
    projections, columns = [], []
    for place, (operand, part) in enumerate(zip(core.operands, ("queries", "keys", "values"), strict=True)):
        try:
            found = projection(graph, operand)
            codes = _by_heads(found.codes, core.heads, core.keys_last and place == 1)
            columns.append(found.columns(codes))
        except NoMatchError as error:
            raise NoMatchError(f"{part} of {node}: {error}{_guess(graph, operand)}") from None
        projections.append(found)
    if len({c.shape for c in columns}) != 1:
        raise NoMatchError(f"queries, keys and values of {node} have the shapes {[c.shape for c in columns]}")
    sources = {p.layer.source for p in projections}
    if len(sources) != 1:
        raise NoMatchError(f"queries, keys and values of {node} come from {len(sources)} different tensors")
    found_norm, source = norm(graph, projections[0].layer.source)

    heads, width = columns[0].shape
    default = 1 / math.sqrt(width)
    # Half precision rounds the factor; anything further off is meant and goes into the queries.
    ratio = projections[0].scale * projections[1].scale * (default if core.scale is None else core.scale) / default
    factors = [1.0 if abs(ratio - 1) < 2e-3 else ratio, 1.0, projections[2].scale]
    parts, taps = [], []
    for found, places, factor in zip(projections, columns, factors, strict=True):
        chosen = places.reshape(-1)
        weight, bias = found.layer.linear.weight, found.layer.linear.bias
        if not np.array_equal(chosen, np.arange(weight.shape[1])):
            weight, bias = np.ascontiguousarray(weight[:, chosen]), bias[chosen]
        if factor != 1.0:
            weight, bias = float32(weight * np.float64(factor)), float32(bias * np.float64(factor))
        parts.append(Linear(weight, bias))
        taps.append(Tap(found.layer.output, found.layer.linear, chosen, factor))
    normed = projections[0].layer.source
    q, k, v = taps
    return AttentionMatch(Attention(found_norm, *parts), heads, source, normed, core.output, (q, k, v))


def _guess(graph: Graph, tensor: str) -> str:
    """Name the likely reason why an operand of attention isn't a plain projection."""
    name = graph.root(tensor)
    while (node := graph.maker(name)) is not None:
        parts = graph.split_constant(node) if node.op in ("Mul", "Div") else None
        if node.op not in MOVES and (parts is None or graph.scalar(parts[1]) is None):
            break
        name = node.inputs[0] if parts is None else parts[0]
    if node is None:
        return ""
    parts = graph.split_constant(node)
    if node.op in ("Concat", "RotaryEmbedding") or (node.op in ("Add", "Sub") and parts is None):
        return "; it looks like rotary positions (RoPE, as in DINOv3), which aren't supported"
    if "Norm" in node.op or (node.op in ("Add", "Div", "Mul") and parts is not None and _made_by_norm(graph, name)):
        return "; it looks like a norm of queries and keys (qk_norm), which isn't supported"
    return ""


def _made_by_norm(graph: Graph, tensor: str) -> bool:
    try:
        norm(graph, tensor)
    except NoMatchError:
        return False
    return True


# The rest of a block


def attention_output(graph: Graph, tensor: str, match: AttentionMatch) -> Linear:
    """Match the projection of what attention mixed, by what is added to the state."""
    layer = scaled_linear(graph, tensor)
    name = graph.root(layer.source)
    while name != match.output and (node := graph.maker(name)) is not None and node.op in MOVES:
        name = node.inputs[0]
    shape = graph.shape(match.output)
    if name != match.output or shape is None:
        raise NoMatchError(f"the layer that makes {tensor!r} doesn't take what attention mixed")
    width = len(match.attention.value.bias)
    codes: Array = np.arange(math.prod(shape), dtype=np.int64)
    if shape[-1] != width:
        # Numbered by token, head and channel, as the columns of the values are.
        codes = codes.reshape(-1, match.heads, width // match.heads).transpose(1, 0, 2)
    codes = codes.reshape(shape)
    order = graph.evaluate(layer.source, {match.output: codes}).reshape(-1, width)
    if not (order == order[:1] + width * np.arange(len(order))[:, None]).all():
        raise NoMatchError(f"the tokens in front of {tensor!r} are in another order than before attention")
    weight = layer.linear.weight
    if not np.array_equal(order[0], np.arange(width)):
        weight = weight[np.argsort(order[0])]
    if len(weight) != width:
        raise NoMatchError(f"the layer that makes {tensor!r} takes {len(weight)} channels, attention gives {width}")
    return Linear(float32(weight), layer.linear.bias)


def feed_forward(graph: Graph, tensor: str) -> tuple[FeedForward, Norm, str]:
    """Match norm, first layer, activation and second layer, by what is added to the state.

    Returns
    -------
    feed_forward : FeedForward
    norm : Norm
    source : str
        The state it starts from.
    """
    second = scaled_linear(graph, tensor)
    kind, leaves = _activation(graph, second.source)
    layers = []
    for leaf in leaves:
        found = projection(graph, leaf)
        codes = found.codes.reshape(-1, found.codes.shape[-1])
        chosen = found.columns(codes)
        weight = found.layer.linear.weight
        whole = np.array_equal(chosen, np.arange(weight.shape[1]))
        if found.scale != 1.0:
            raise NoMatchError(f"{leaf!r} is scaled by {found.scale}")
        layers.append((found.layer.source, weight if whole else weight[:, chosen], found.layer.linear.bias[chosen]))
    if len({source for source, _, _ in layers}) != 1:
        raise NoMatchError(f"gate and values in front of {tensor!r} come from different tensors")
    weight = layers[0][1] if len(layers) == 1 else np.hstack([w for _, w, _ in layers])
    first = Linear(float32(weight), np.concatenate([b for _, _, b in layers]))
    if second.linear.weight.shape[0] * len(layers) != weight.shape[1]:
        raise NoMatchError(f"layers of {weight.shape} and {second.linear.weight.shape} follow each other")
    found_norm, source = norm(graph, layers[0][0])
    return FeedForward(first, second.linear, kind), found_norm, source


_erf = np.vectorize(math.erf, otypes=[float])


def _silu(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-x)))


def _gelu(x: Array) -> Array:
    return np.asarray(x * (1 + _erf(x / math.sqrt(2))) / 2)


def _gelu_tanh(x: Array) -> Array:
    return np.asarray(x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2)


def _quick_gelu(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-1.702 * x)))


_POINTWISE: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Neg": np.negative,
    "Exp": np.exp,
    "Sqrt": np.sqrt,
    "Tanh": np.tanh,
    "Erf": _erf,
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Relu": lambda x: np.maximum(x, 0),
    "FastGelu": _gelu_tanh,
    "QuickGelu": _quick_gelu,
    "Swish": _silu,
}
_KNOWN: dict[str, Callable[..., Any]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "quick GELU": _quick_gelu,
    "SiLU": _silu,
    "tanh": np.tanh,
}


def _activation(graph: Graph, tensor: str) -> tuple[str, list[str]]:
    """Name what is computed entry by entry in front of a tensor, and where it starts.

    However it is spelled, it is a function of one number (or, gated, of two), so it is known by its values.
    """
    leaves: list[str] = []
    order: list[str] = []
    pending = [graph.root(tensor)]
    while pending:
        name = pending.pop()
        if name in order or name in leaves or graph.is_constant(name):
            continue
        node = graph.maker(name)
        inside = (
            node is not None
            and (node.op in _POINTWISE or node.op == "Gelu")
            and all(graph.scalar(n) is not None for n in node.inputs if graph.is_constant(n))
        )
        if node is None or not inside:
            leaves.append(name)
        else:
            order.append(name)
            pending += node.inputs
        if len(order) > 50 or len(leaves) > 2:
            raise NoMatchError(f"expected an activation in front of {tensor!r}, found a larger computation")
    if not order:
        raise NoMatchError(f"expected an activation between two layers in front of {tensor!r}, found none")

    points = np.linspace(-5, 5, 41)
    grids = [points] if len(leaves) == 1 else [g.reshape(-1) for g in np.meshgrid(points, points[::3])]
    values: dict[str, Any] = dict(zip(leaves, grids, strict=True))
    found = _tabulate(graph, graph.root(tensor), values)
    if len(leaves) == 1:
        distance = {name: float(np.abs(function(points) - found).max()) for name, function in _KNOWN.items()}
        nearest = min(distance, key=lambda name: distance[name])
        # Constants kept in half precision put the curve off by less than this; the two kinds of GELU differ by more.
        if not distance[nearest] < 2e-4:
            raise NoMatchError(f"the activation in front of {tensor!r} isn't a GELU or another that is known here")
        if not nearest.startswith("gelu"):
            raise NoMatchError(f"the activation in front of {tensor!r} is {nearest}, expected GELU")
        return nearest, leaves
    for gate, value in ((0, 1), (1, 0)):
        if np.abs(_silu(grids[gate]) * grids[value] - found).max() < 1e-2:
            return "swiglu", [leaves[gate], leaves[value]]
    raise NoMatchError(f"the gated activation in front of {tensor!r} isn't SwiGLU")


def _tabulate(graph: Graph, tensor: str, values: dict[str, Any]) -> Array:
    pending = [tensor]
    with np.errstate(all="ignore"):
        while pending:
            name = pending[-1]
            if name in values:
                pending.pop()
                continue
            if (number := graph.scalar(name)) is not None:
                values[name] = number
                continue
            node = graph.maker(name)
            assert node is not None
            missing = [n for n in node.inputs if n and n not in values]
            if missing:
                pending += missing
                continue
            function = _POINTWISE.get(node.op)
            if function is None:
                function = _gelu_tanh if node.attributes.get("approximate") == "tanh" else _gelu
            try:
                values[name] = function(*(values[n] for n in node.inputs if n))
            except TypeError:
                raise NoMatchError(f"{node} has {len(node.inputs)} inputs") from None
    return np.asarray(values[tensor], np.float64)


def rest(graph: Graph, match: AttentionMatch) -> tuple[Rest, str]:
    """Match what follows attention in a block: two sums with the state.

    Returns
    -------
    rest : Rest
    state : str
        What the next block starts from.
    """
    out, middle = _residual(graph, match.source, lambda name: attention_output(graph, name, match))

    def feed(name: str) -> tuple[FeedForward, Norm]:
        found, found_norm, source = feed_forward(graph, name)
        if source != middle:
            raise NoMatchError(f"the feed-forward layers in front of {name!r} don't start from the state")
        return found, found_norm

    (layers, found_norm), state = _residual(graph, middle, feed)
    return Rest(out, found_norm, layers), state


def _residual(graph: Graph, state: str, match: Callable[[str], Any]) -> tuple[Any, str]:
    """Find the sum of the state and a branch that matches."""
    reasons = []
    for node in graph.takers(state):
        if node.op != "Add" or len(node.inputs) != 2 or any(graph.is_constant(n) for n in node.inputs):
            continue
        for own, branch in (node.inputs, node.inputs[::-1]):
            if graph.rows(own) != state or graph.rows(branch) == state:
                continue
            try:
                return match(branch), graph.rows(node.outputs[0])
            except NoMatchError as error:
                reasons.append(str(error))
    raise NoMatchError(reasons[0] if reasons else f"expected a sum of the state {state!r} and a branch, found none")
